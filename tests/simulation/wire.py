"""One process's way to the store, and what goes wrong on it.

TCP neither repeats nor reorders what goes over one connection; but a process that has given up on
an answer goes on over a new connection, and then the store carries out the old request later than
the new one.  Requests are repeated here only where the library itself may send them twice.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distributed_breaker.address import READ_TIMEOUT
from distributed_breaker.errors import StoreDown
from distributed_breaker.link import PING
from distributed_breaker.model import Step
from distributed_breaker.session import Ask
from tests.simulation.server import Server
from tests.simulation.timeline import Timeline

if TYPE_CHECKING:
    from tests.simulation.process import Process

Done = Callable[[Any], None]  # gets an answer, or the StoreDown to be thrown
REPEATABLE = frozenset({"settle", "cancel"})


class Wire:
    """Requests, replies and pushes between one process and the server."""

    def __init__(self, process: Process, timeline: Timeline, server: Server, seed: str) -> None:
        self._process = process
        self._timeline = timeline
        self._server = server
        self._chance = random.Random(seed)
        self._connection = 0  # grows when the connection is lost
        self._waiting: Done | None = None
        self._wanted = self._subscribing = self._subscribed = False
        self._failures = 0  # in a row
        self.trouble = -1  # when it last failed or was slow (ms)
        self.slow = self.partitioned = self.deaf = self.repeats = False

    def _delay(self) -> int:
        longest = 600 if self.slow else self._chance.choice([0, 1, 5])
        if self.slow:
            self.trouble = self._timeline.now
        return self._chance.randint(0, longest)

    # ------------------------------------------------------------------ requests

    def ask(self, ask: Ask, done: Done) -> None:
        """Carry out what a round asks for; ``done`` is called once, unless the process ends."""

        def answer(value: Any) -> None:
            if self._waiting is answer:
                self._waiting = None
                if isinstance(value, StoreDown):
                    self.trouble = self._timeline.now
                    self._connection += int(value.timeout)
                self._failures = self._failures + 1 if isinstance(value, StoreDown) else 0
                done(value)
                # What is refused alone, beside the steps, concerns nobody else.
                if self._failures and (ask.what == "run" or not value.loud):
                    self._process.world.oracle.failed(self._process, value, self._failures)

        self._waiting = answer
        timeout = StoreDown("TIMEOUT", "no answer in time")
        self._process.after(round(READ_TIMEOUT * 1000), lambda: answer(timeout))
        connection = self._connection
        if not self._server.up:
            self._process.after(1, lambda: answer(StoreDown("CONNECTION", "refused")))
        elif not self.partitioned:
            self._timeline.after(self._delay(), lambda: self._arrives(ask, answer, connection))

    def _arrives(self, ask: Ask, answer: Done, connection: int) -> None:
        cut = connection != self._connection
        if cut and self._chance.random() < 0.5:
            return  # the reset was faster

        def reply(value: Any) -> None:
            def comes_back() -> None:
                if not self.partitioned and connection == self._connection:
                    self._process.do(lambda: answer(value))

            self._timeline.after(self._delay(), comes_back)

        self._server.receive(lambda: self._carry_out(ask, reply))

    def _carry_out(self, ask: Ask, reply: Done) -> None:
        server = self._server
        if server.refusing:
            reply(StoreDown(server.refusing, "as a test says"))
        elif ask.what == "poll":
            reply(server.poll(ask.about))
        elif ask.what == "remember":
            reply(None)
        else:
            self._run(list(ask.about), [], reply)

    def _run(self, steps: list[tuple[str, Step]], replies: list[Any], reply: Done) -> None:
        """A pipeline is no transaction: other processes' steps may come between its steps."""
        server = self._server
        while steps:
            circuit, step = steps.pop(0)
            replies.append(server.execute(circuit, step))
            if self.repeats and step.op in REPEATABLE and self._chance.random() < 0.5:
                self._repeat(circuit, step)
            if steps and self._chance.random() < 0.2:
                go_on = functools.partial(self._run, steps, replies, reply)
                self._timeline.after(1, functools.partial(server.receive, go_on))
                return
        reply(replies)

    def _repeat(self, circuit: str, step: Step) -> None:
        server = self._server
        delay = self._chance.choice([0, 5, 400, 2_000])
        # A step that is sent again has a nonce of its own, as every step.
        twin = dataclasses.replace(step, nonce=f"{self._chance.getrandbits(32):08x}")
        again = functools.partial(server.execute, circuit, twin, repeated=True)
        self._timeline.after(delay, lambda: server.receive(again))

    # ------------------------------------------------------------------ the subscription

    def want_pushes(self, wanted: bool) -> None:
        """As the link's listening thread is told."""
        self._wanted = wanted
        if wanted and not (self._subscribing or self._subscribed):
            self._subscribing = True
            self._process.after(self._delay(), self._subscribe)

    def _subscribe(self) -> None:
        if not self._wanted:
            self._subscribing = False
        elif not self._server.up:
            self._subscription_failed("CONNECTION")
        elif self.partitioned or self._server.stopped:
            timeout = lambda: self._subscription_failed("TIMEOUT")  # noqa: E731
            self._process.after(round(READ_TIMEOUT * 1000), timeout)
        elif self._server.refusing:
            self._subscription_failed(self._server.refusing)
        else:
            self._subscribing, self._subscribed = False, True
            self._server.subscribers[self] = self._push
            self._process.session.subscribed()
            self._process.world.oracle.subscribed(self._process)
            self._watch()

    def _subscription_failed(self, code: str) -> None:
        self._subscribed, self._subscribing = False, True
        self._server.subscribers.pop(self, None)
        pause = self._process.session.subscription_lost(StoreDown(code, "as a test says"))
        self._process.after(round(pause * 1000), self._subscribe)

    def _watch(self) -> None:
        """PING: a subscription on which nothing comes any more is noticed."""
        silent = self.partitioned or self._server.stopped

        def look() -> None:
            if not self._subscribed:
                return
            if silent and (self.partitioned or self._server.stopped):
                self._subscription_failed("CONNECTION")
            else:
                self._watch()

        self._process.after(round(PING * 1000), look)

    def _push(self, text: str) -> None:
        connection = self._connection
        times = 2 if self.repeats and self._chance.random() < 0.3 else 1
        for _ in range(times):
            self._timeline.after(self._delay(), lambda: self._pushed(text, connection))

    def _pushed(self, text: str, connection: int) -> None:
        if self._subscribed and not (self.deaf or self.partitioned):
            self._process.do(lambda: self._heard(text))

    def _heard(self, text: str) -> None:
        self._process.session.pushed(text)
        self._process.world.oracle.heard(self._process, text)

    # ------------------------------------------------------------------ faults

    def cut(self) -> None:
        """Both connections are reset; what was under way may have been executed."""
        self._connection += 1
        waiting = self._waiting
        if waiting is not None:
            error = StoreDown("CONNECTION", "reset")
            self._process.after(self._delay(), lambda: waiting(error))
        if self._subscribed:
            self._subscribed = False
            self._server.subscribers.pop(self, None)
            self._process.after(0, lambda: self._subscription_failed("CONNECTION"))

    def end(self) -> None:
        """The process has gone."""
        self._waiting = None
        self._subscribed = False
        self._server.subscribers.pop(self, None)
