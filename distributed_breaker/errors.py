"""The exceptions of this library, and nothing else."""

from __future__ import annotations

from typing import Any

# Codes that retrying cannot mend: an operator must, so they are logged loudly, once.
NEEDS_OPERATOR = frozenset(
    {
        "NOPERM",
        "NOAUTH",
        "WRONGPASS",
        "WRONGTYPE",
        "CBSCHEMA",
        "CBCORRUPT",
        "CBARG",
        "CBOLD",
        "CBREFUSED",
        "CBANSWER",
        "ERR",
    }
)


class CircuitBreakerOpenException(Exception):
    """A call was refused because its circuit does not admit it.

    Attributes:
        circuit: name of the circuit.
        retry_after: seconds until another attempt is worth making; 0.0 when that is unknown
            (all permits are out, or an operator has forced the circuit open without an end).
        state: the state that refused, as its text (``"open"``, ``"half_open"``, …).
        source: who decided: ``"shared"``, ``"shadow"``, ``"quarantine"`` or ``"override"``.
        reason: one short phrase for people, free of parameters and credentials.

    Clients raise subclasses that are also the native error of their library.  The message is
    made only when somebody reads it, since a rejection must cost next to nothing.
    """

    def __init__(
        self,
        circuit: str,
        retry_after: float = 0.0,
        state: str = "open",
        source: str = "shared",
        reason: str = "",
    ) -> None:
        self.circuit = circuit
        self.retry_after = retry_after
        self.state = state
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        because = f": {self.reason}" if self.reason else ""
        wait = f"; retry in {self.retry_after:.3g} s" if self.retry_after > 0 else ""
        return f"circuit {self.circuit!r} is {self.state} ({self.source}){because}{wait}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            type(self),
            (self.circuit, self.retry_after, self.state, self.source, self.reason),
        )


class StoreUnavailable(Exception):
    """The shared store could not be asked, or did not answer in time.

    Only operator methods and ``flush`` raise it; a protected call never does.  After a timeout
    the message says that the outcome is unknown: the store may have carried out the step.
    """


class StoreError(Exception):
    """The store answered with an error.

    Attributes:
        code: the first word of the server's answer (``"WRONGTYPE"``, ``"NOPERM"``, ``"CBARG"``,
            …).  Only the code is compared: texts differ between servers and versions.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.split(" ", 1)[0]


class StoreDown(Exception):
    """The store as a whole cannot serve.

    Attributes:
        code: ``"TIMEOUT"``, ``"CONNECTION"``, or the first word of the server's error.
        timeout: the store did not answer in time, so it is unknown what it has carried out.
        loud: an operator must act; retrying alone will not help.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.timeout = code == "TIMEOUT"
        self.loud = code in NEEDS_OPERATOR
