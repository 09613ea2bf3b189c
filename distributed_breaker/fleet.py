"""A fleet as its operator sees it: all circuits of a namespace, and steps on them, from outside.

A registry belongs to a process of the fleet: it reports, listens, and has threads.  This one only
asks: it blocks, is no reporter, and each of its steps says what the circuit was just before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from .address import redacted
from .breaker import bounded_json, host_name
from .errors import StoreDown, StoreError, StoreUnavailable
from .model import Step, load
from .nodes import Command
from .policy import Policy, State, check_circuit, check_namespace, check_number
from .snapshot import Change, Snapshot, change_of, snapshot_of
from .store import OF_ONE_KEY, RedisStore, key_of

T = TypeVar("T")

TRIES = 2  # that a reading is worth when the store has not answered in time
AT_ONCE = 64  # steps in one pipeline, so that it ends well within the time that a reply may take


class Done(NamedTuple):
    """What became of one step.

    Attributes:
        circuit: its name.
        before: its state just before the step; empty when the store did not hold the circuit.
        after: its state now.
        changed: whether the step made a transition.
        error: empty, or why it was not carried out, or why that is unknown.
    """

    circuit: str
    before: str = ""
    after: str = ""
    changed: bool = False
    error: str = ""


class Fleet:
    """The circuits of one namespace.

    Args:
        url: where they are kept; see ``CircuitBreakerRegistry.from_url``.
        namespace: the fleet's.

    Raises:
        ValueError: the URL or the namespace cannot be used; ``memory://`` has no fleet.

    All methods block, for less than two seconds when the store is not there, and then raise
    StoreUnavailable.
    """

    def __init__(self, url: str, namespace: str = "default") -> None:
        check_namespace(namespace)
        if isinstance(url, str) and url.startswith("memory://"):
            raise ValueError("circuits at memory:// belong to one process and cannot be seen")
        self.namespace = namespace
        self.place = redacted(url)
        self._store = RedisStore(url, namespace)
        self._random = random.SystemRandom()

    def snapshot(self) -> dict[str, Snapshot]:
        """Every circuit that the store holds, by name.

        One that cannot be read (a key of another type, a newer schema) has no shared state and the
        source ``shadow``: for such a circuit every process decides alone.
        """

        def read() -> dict[str, Snapshot]:
            names = self._store.names()
            now, all_fields = self._store.read(names)
            fields_of = dict(zip(names, all_fields, strict=True))
            return {name: _seen(name, fields, now) for name, fields in fields_of.items() if fields}

        return self._read(read)

    def history(self, circuit: str, count: int = 50) -> list[Change]:
        """The last transitions of a circuit, newest first; at most 50 are kept."""
        check_circuit(circuit)
        return [change_of(e) for e in self._read(lambda: self._store.log(circuit, count))]

    def histories(self, circuits: Sequence[str], count: int = 50) -> dict[str, list[Change]]:
        """The same of several circuits at once; of one whose log can't be read there is nothing."""
        return histories(self, [check_circuit(name) for name in circuits], count)

    def reset(
        self, circuits: Mapping[str, Policy | None], *, actor: str = "", reason: str = ""
    ) -> Iterator[Done]:
        """Close circuits for the whole fleet, whatever their states.

        Args:
            circuits: names, each with the policy that it gets if the store does not hold it.
            actor: who wants it.
            reason: why.
        """
        return self._operate("reset", circuits, actor, reason)

    def force_open(
        self,
        circuits: Mapping[str, Policy | None],
        *,
        actor: str = "",
        reason: str = "",
        ttl: float | None = None,
    ) -> Iterator[Done]:
        """Refuse all calls of the whole fleet until released, or for ``ttl`` seconds."""
        return self._force("forced_open", circuits, actor, reason, ttl)

    def force_closed(
        self,
        circuits: Mapping[str, Policy | None],
        *,
        actor: str = "",
        reason: str = "",
        ttl: float | None = None,
    ) -> Iterator[Done]:
        """Admit all calls of the whole fleet until released, or for ``ttl`` seconds."""
        return self._force("forced_closed", circuits, actor, reason, ttl)

    def release(
        self, circuits: Mapping[str, Policy | None], *, actor: str = "", reason: str = ""
    ) -> Iterator[Done]:
        """End overrides: forced_open goes on to half_open, forced_closed to closed."""
        return self._operate("release", circuits, actor, reason)

    def examine(self, commands: Sequence[Command]) -> list[Any]:
        """The server's answers to plain commands, each of them or a StoreError."""
        return self._read(lambda: self._store.ask(commands))

    def hear(self) -> str:
        """Open a subscription as processes do, and close it.

        Returns what the server says against PING on it, else the empty text.

        Raises:
            StoreError: the server refuses it.
        """
        try:
            channel = self._store.subscribe()
        except StoreDown as error:
            raise StoreError(str(error)) from error
        try:
            channel.ping()
            channel.get(1.0)
            return channel.refused
        finally:
            channel.close()

    @property
    def channel(self) -> str:
        """Where transitions are pushed."""
        return self._store.channel

    def close(self) -> None:
        """Close the connections."""
        self._store.close()

    def forked(self) -> None:
        """In a child: forget the parent's connections."""
        self._store.forked()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _read(self, read: Callable[[], T]) -> T:
        """Reading again harms nothing, and a busy server deserves a second question."""
        for left in reversed(range(TRIES)):
            try:
                return read()
            except StoreDown as error:
                if not (error.timeout and left):
                    raise StoreUnavailable(self._problem(error)) from error
        raise AssertionError("unreachable")

    def _problem(self, error: StoreDown) -> str:
        if error.timeout:
            return f"Redis at {self.place} does not answer in time"
        if error.code == "CONNECTION":
            return f"Redis at {self.place} can't be reached: {str(error).partition(': ')[2]}"
        return f"Redis at {self.place} refuses to serve: {error}"

    def _force(
        self,
        kind: str,
        circuits: Mapping[str, Policy | None],
        actor: str,
        reason: str,
        ttl: float | None,
    ) -> Iterator[Done]:
        ms = -1 if ttl is None else round(check_number("ttl", ttl, 0.001, 31_536_000) * 1000)
        return self._operate("override", circuits, actor, reason, kind=kind, ttl=ms)

    def _operate(
        self,
        op: str,
        circuits: Mapping[str, Policy | None],
        actor: str,
        reason: str,
        **arguments: Any,
    ) -> Iterator[Done]:
        detail = bounded_json({"host": host_name(), "actor": actor[:60], "reason": reason[:200]})
        steps = [
            (check_circuit(name), Step(op, self._nonce(), (policy or Policy()).numbers,
                                       detail=detail, **arguments))
            for name, policy in circuits.items()
        ]  # fmt: skip
        return self._carried_out(steps)

    def _carried_out(self, steps: Sequence[tuple[str, Step]]) -> Iterator[Done]:
        """Each step at most once; after a failure of the store the others are not tried.

        Raises StoreUnavailable when that is so from the first on.
        """
        problem = ""
        for start in range(0, len(steps), AT_ONCE):
            part = steps[start : start + AT_ONCE]
            if problem:
                yield from (Done(name, error=problem) for name, _ in part)
                continue
            try:
                replies = self._store.run(part)
            except StoreDown as error:
                problem = self._problem(error)
                said = problem + _unless_unsent(error)
                if not start:
                    raise StoreUnavailable(said) from error
                yield from (Done(name, error=said) for name, _ in part)
                continue
            made = []
            for (name, _), reply in zip(part, replies, strict=True):
                if isinstance(reply, StoreError):
                    yield Done(name, error=str(reply))
                    continue
                if not reply.old:
                    made.append(name)
                yield Done(name, reply.old, reply.header.split(" ")[3], bool(reply.cause))
            self._remember(made)

    def _remember(self, names: Sequence[str]) -> None:
        try:
            if names:
                self._store.remember(names)
        except StoreDown:
            pass  # The circuits work; the first process that uses them adds their names.

    def _nonce(self) -> str:
        return f"{self._random.getrandbits(32):08x}"


class _Examined(Protocol):
    namespace: str

    def examine(self, commands: Sequence[Command]) -> list[Any]: ...


def histories(
    store: _Examined, circuits: Sequence[str], count: int = 50
) -> dict[str, list[Change]]:
    """The last transitions of circuits, newest first, out of a fleet's or registry's store; of one
    whose log can't be read there is nothing."""
    keys = [key_of(store.namespace, name) + ":log" for name in circuits]
    asked = [Command(key, ("XREVRANGE", key, "+", "-", "COUNT", count)) for key in keys]
    answers = store.examine(asked) if asked else []
    return {
        name: [] if isinstance(answer, StoreError) else [change_of(dict(e)) for _, e in answer]
        for name, answer in zip(circuits, answers, strict=True)
    }


def _unless_unsent(error: StoreDown) -> str:
    """A step whose answer is lost may have been carried out, unless no connection came about."""
    lost = error.code in ("TIMEOUT", "CONNECTION") and "connecting to" not in str(error)
    return "; whether it was carried out is unknown" if lost else ""


def _seen(name: str, fields: dict[str, str] | StoreError, now: int) -> Snapshot:
    try:
        if isinstance(fields, StoreError):
            raise fields
        return snapshot_of(name, load(fields), now)
    except StoreError as error:
        if error.code not in OF_ONE_KEY:
            # A right is missing, or the like: then nothing is known of any circuit.
            raise StoreDown(error.code, str(error)) from error
        problem = str(error)
    except (ValueError, LookupError):
        problem = "CBCORRUPT a field cannot be read"
    code, _, message = problem.partition(" ")
    detail = {"error": code, "message": message}
    return Snapshot(name, State.CLOSED, None, "shadow", cause="unreadable", detail=detail)
