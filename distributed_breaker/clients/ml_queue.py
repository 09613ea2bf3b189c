"""Calls that wait for a model, and the thread that runs it for them, as many at once as it takes.

A call ends in time whatever the model does: its caller leaves, the late result is dropped, and a
run for which nobody waits any more is left behind with its thread, while another thread goes on
with the queue.  An engine that ends its runs itself (a process that is killed) is never left so.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..process import OwnLock
from ..workers import start_thread
from .ml_batches import Joins
from .ml_files import InferenceTimeout
from .ml_modules import out_of_memory
from .ml_request import (
    DONE,
    LEFT,
    RUNNING,
    WAITING,
    Bounds,
    Engine,
    ModelOverloaded,
    Request,
    Run,
    ring,
    wake_callers,
)
from .ml_values import finite

MOST_STUCK = 4  # threads that are left behind in a model, before no further one is risked
MOST_GATHERING = 0.002  # s that a run waits for those who were answered together before it
LOOK_AGAIN = 0.05  # s between two looks at why calls are put off
GROW_AFTER = 8  # full batches without trouble, after which a larger one is tried
MOST_WAIT = 60.0  # s that a refused caller is asked to wait, at most

clock = time.monotonic


class Queue:
    """Calls of one model.

    Args:
        name: of the circuit, for messages.
        engine: what runs the model.
        bounds: its numbers; may be replaced.
        hold: asked before each run: why it should not begin now, or nothing.
    """

    _lock = OwnLock()

    def __init__(
        self, name: str, engine: Engine, bounds: Bounds, hold: Callable[[], str] = str
    ) -> None:
        self.name = name
        self.engine = engine
        self.bounds = bounds
        self.hold = hold
        self.joins = Joins("")
        self.runs = self.inputs = self.most_joined = self.halved = 0
        self.rejected = self.timeouts = 0
        self.looks = True
        """Whether outputs are looked at for NaN and infinity."""
        self.held = ""
        """Why calls are put off at present."""
        self._seconds = 0.0  # that a run takes, about
        self._room = bounds.batch
        self._full = 0
        self._whole: Any = None  # what the model has given for a batch
        self._closed = False
        self.forked()

    def forked(self) -> None:
        """A child has none of its parent's threads and calls."""
        vars(self).pop("_lock", None)
        self._waiting: list[tuple[int, int, Request]] = []
        self._count = itertools.count()
        self._gone = 0  # of those that wait, how many have left
        self._run: Run | None = None
        self._thread: object = None  # which thread goes on with the queue
        self._stuck = 0
        self._idle = False
        self._wanted = 1  # calls that must wait before the idle thread is woken
        self._crowd = 0  # calls that were answered together the last time …
        self._ended_at = 0.0  # … and when
        self._wake = threading.Lock()
        self._wake.acquire()

    @property
    def room(self) -> int:
        """Inputs that fit into one run at present."""
        return min(self._room, self.bounds.batch)

    @property
    def length(self) -> int:
        """Calls that wait."""
        return len(self._waiting) - self._gone

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and what there is now."""
        return {
            "waiting": self.length,
            "runs": self.runs,
            "inputs": self.inputs,
            "most_in_a_run": self.most_joined,
            "batch_size": self.room,
            "batch_halved": self.halved,
            "rejected": self.rejected,
            "timeouts": self.timeouts,
            "stuck_threads": self._stuck,
            "put_off": self.held or None,
        }

    # ------------------------------------------------------------------ callers

    def ask(self, requests: Sequence[Request]) -> None:
        """Have these run, and wait until each has an output or an error.

        Raises:
            ModelOverloaded: there is no room or no time for them.
            InferenceTimeout: the model has not answered one of them in time.
        """
        wait, wake = self._put(requests)
        if wake is not None:
            ring(wake)
        try:
            for request in requests:
                while not request._done.acquire(True, wait):
                    wait = self._patience(request)
        except BaseException:
            self._leave(requests)
            raise

    async def ask_async(self, requests: Sequence[Request]) -> None:
        """The same on an event loop."""
        loop = asyncio.get_running_loop()
        for request in requests:
            request.future = loop.create_future()
        wait, wake = self._put(requests)
        if wake is not None:
            ring(wake)
        try:
            for request in requests:
                await self._answered(loop, request, wait)
        except BaseException:
            self._leave(requests)
            raise

    async def _answered(
        self, loop: asyncio.AbstractEventLoop, request: Request, wait: float
    ) -> None:
        future = request.future
        assert future is not None
        timer: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal timer
            if future.done():
                return
            try:
                timer = loop.call_later(self._patience(request), look)
            except Exception as error:
                future.set_exception(error)

        timer = loop.call_later(wait, look)
        try:
            await future
        finally:
            timer.cancel()

    def _put(self, requests: Sequence[Request]) -> tuple[float, threading.Lock | None]:
        """Add to the queue; seconds after which to look at how it goes, and what wakes the thread.

        The thread wants Python's lock as soon as it is woken, so that is the last thing to do.
        """
        now, bounds, first = clock(), self.bounds, requests[0]
        for request in requests:
            request.put_at = now
            if request.timeout is not None:
                request.until = now + request.timeout
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self.name} is closed")
            run = self._run
            if self._thread is None or (run is not None and now >= run.until):
                self._go_on(now)
            if len(self._waiting) - self._gone + len(requests) > bounds.calls:
                self._make_room(len(requests), first.priority)
            waiting, count = self._waiting, self._count
            for request in requests:
                heapq.heappush(waiting, (-request.priority, next(count), request))
            wake = None
            if self._idle and len(waiting) >= self._wanted:
                self._idle = False
                wake = self._wake
        wait = min(first.limit, bounds.queue, first.until - now)
        return (wait if run is None else max(0.0, min(wait, run.until - now))), wake

    def _make_room(self, count: int, priority: int) -> None:
        """Have calls of a lower priority go, the last first, where there is no room otherwise."""
        wanted = self.length + count - self.bounds.calls
        less = [e for e in self._waiting if -e[0] < priority and e[2].state == WAITING]
        if len(less) < wanted:
            raise self._overloaded(f"{self.length} calls wait for the model")
        for _, _, request in heapq.nlargest(wanted, less, key=lambda entry: entry[:2]):
            request.error = self._overloaded("calls of a higher priority have come")
            request.state = DONE
            self._gone += 1
            wake_callers([request])

    def _patience(self, request: Request) -> float:
        """Seconds after which to look again; raises when the caller's time is over."""
        now = clock()
        with self._lock:
            run = self._run
            if request.state == DONE:
                return 0.0
            if request.state == RUNNING:
                end = min(request.began + request.limit, request.until)
                if now < end:
                    return end - now
                self._leave_now(request, now)
                run = request.run
                if run is not None and all(r.state == LEFT for r in run.requests):
                    self._leave_behind(run)
                raise self._late(request, now)
            self._go_on(now)
            end = min(request.put_at + self.bounds.queue, request.until)
            if self.engine.loading:
                end = min(end, request.put_at + request.limit)
            if now < end:
                # It may begin at once, and then has no longer than its limit.
                ends = end, now + request.limit, self._run.until if self._run else end
                return max(0.0, min(ends) - now)
            self._leave_now(request, now)
            # It has not even begun, since one run has lasted longer than all that it had.
            if run is not None and run.began <= request.put_at and not self.held:
                if all(r.state == LEFT for r in run.requests):
                    self._leave_behind(run)
                raise self._late(request, now)
            raise self._overloaded(self.held or f"{self.length} calls wait for the model")

    def _leave(self, requests: Iterable[Request]) -> None:
        """Their caller does not wait any more."""
        with self._lock:
            now = clock()
            for request in requests:
                self._leave_now(request, now)

    def _leave_now(self, request: Request, now: float) -> None:
        if request.state == WAITING:
            self._gone += 1
        if request.state in (WAITING, RUNNING):
            request.state = LEFT
            request.nanoseconds = round((now - (request.began or request.put_at)) * 1e9)

    def _late(self, request: Request, now: float) -> InferenceTimeout:
        self.timeouts += 1
        waited = now - (request.began or request.put_at)
        return InferenceTimeout(f"{self.name}: the model has not answered within {waited:.3g} s")

    def _overloaded(self, reason: str) -> ModelOverloaded:
        self.rejected += 1
        runs = self.length / max(1, self.room)
        wait = min(MOST_WAIT, max(0.1, self._seconds * runs)) if not self.held else 1.0
        return ModelOverloaded(self.name, wait, "closed", "shadow", reason)

    # ------------------------------------------------------------------ the thread

    def _go_on(self, now: float) -> None:
        """See to it that a thread goes on with the queue."""
        run = self._run
        if run is not None and now >= run.until and not self.engine.hard:
            self._leave_behind(run)
        if self._thread is None:
            if self._stuck >= MOST_STUCK:
                self.timeouts += 1
                raise InferenceTimeout(
                    f"{self.name}: {self._stuck} threads hang in the model, and no further one "
                    "is risked before one of them returns"
                )
            self._start()

    def _start(self) -> None:
        self._idle = False
        self._wake = threading.Lock()
        self._wake.acquire()
        me = self._thread = object()
        wake = self._wake
        start_thread("circuit-breaker-model", lambda: self._work(me, wake))

    def _leave_behind(self, run: Run) -> None:
        """Nobody waits for this run any more: another thread goes on."""
        if self._run is not run or self.engine.hard:
            return
        run.left_behind = True
        self._run, self._thread = None, None
        self._stuck += 1
        if self._stuck < MOST_STUCK and self.length:
            self._start()

    def _work(self, me: object, wake: threading.Lock) -> None:
        idle = False
        while (run := self._take(me, wake, idle)) is not None:
            answered = self._carry_out(run.requests, run)
            goes_on = self._ended(run)
            idle = goes_on and self._idle
            # Who is woken wants Python's lock, which this thread keeps until it waits itself.
            wake_callers(answered)
            if not goes_on or (run.learns and not self._learn(run)):
                return

    def _take(self, me: object, wake: threading.Lock, idle: bool) -> Run | None:
        """The next run; None: this thread is no longer the one.  ``idle``: nothing waits."""
        if idle:
            wake.acquire()
            self._idle = False
        while True:
            # What keeps runs from beginning is asked without the lock: it is not ours.
            any_waits = bool(self._waiting)
            held = self.hold() if any_waits else ""
            with self._lock:
                if self._thread is not me or self._closed:
                    return None
                if self._waiting and not any_waits:
                    continue  # one has come just now
                self.held = held
                self._wanted = 1
                pause = LOOK_AGAIN
                if not held:
                    now = clock()
                    pause = self._gather(now)
                    if pause == 0.0:
                        return self._form(now)
                self._idle = True
            wake.acquire(True, pause)
            self._idle = False

    def nudge(self) -> None:
        """What kept runs from beginning may be over."""
        with self._lock:
            if self._idle:
                self._idle = False
                ring(self._wake)

    def _gather(self, now: float) -> float:
        """Seconds to wait for further inputs; below 0: there are none at all."""
        waiting = self._waiting
        while waiting and waiting[0][2].state != WAITING:
            heapq.heappop(waiting)
            self._gone -= 1
        if not waiting:
            return -1.0
        count, crowd, wait = len(waiting) - self._gone, self._crowd, self.bounds.wait
        if count >= self.room or not (wait or count < crowd):
            return 0.0
        first = waiting[0][2]
        until = first.put_at + wait
        if count < crowd:
            # Those who were answered together a moment ago are about to ask again.
            until = max(until, self._ended_at + min(MOST_GATHERING, self._seconds / 2))
        left = min(until, first.until) - now
        if left <= 0.0 or self.joins.kind(first.inputs) is None:
            return 0.0
        self._wanted = self.room if wait else crowd
        return left

    def _form(self, now: float) -> Run:
        """Take from the queue what can be run at once; there is something."""
        waiting, joins = self._waiting, self.joins
        if joins.version != self.engine.version:  # of another model nothing is known
            joins = self.joins = Joins(self.engine.version)
        first: Request = heapq.heappop(waiting)[2]
        first.state, first.began = RUNNING, now
        requests = [first]
        run = self._run = first.run = Run(requests, now, now + first.limit)
        if self.bounds.batch == 1:
            return run
        run.learns = joins.unknown(first.inputs)
        if not waiting or run.learns:
            return run
        kind, room = joins.kind(first.inputs), self.room
        while kind is not None and waiting and len(requests) < room:
            request: Request = waiting[0][2]
            if request.state == WAITING:
                if joins.kind(request.inputs) != kind:
                    break
                request.state, request.began, request.run = RUNNING, now, run
                run.until = max(run.until, now + request.limit)
                requests.append(request)
            else:
                self._gone -= 1
            heapq.heappop(waiting)
        return run

    def _carry_out(self, requests: list[Request], run: Run) -> list[Request]:
        """Run the model for some requests at once; for fewer, if that cannot be done.  Returns
        those whose callers are still to be told."""
        began = time.perf_counter_ns()
        try:
            seconds = run.until - clock()
            if seconds <= 0.0:
                raise InferenceTimeout(f"{self.name}: the model has not answered in time")
            if len(requests) == 1:
                outputs = [self.engine.run(requests[0].inputs, seconds)]
            else:
                outputs = self._joined([request.inputs for request in requests], seconds)
        except BaseException as error:  # A model's SystemExit is its caller's to see, too.
            if len(requests) == 1 or run.left_behind or isinstance(error, TimeoutError):
                return self._answer(requests, [], error, time.perf_counter_ns() - began)
            parts = self._parts(requests, error)
        else:
            took = time.perf_counter_ns() - began
            self._look(requests, outputs)
            return self._answer(requests, outputs, None, took)
        for part in parts:
            wanted = [request for request in part if request.state == RUNNING]
            if wanted:
                wake_callers(self._carry_out(wanted, run))
        return []

    def _joined(self, inputs: list[Any], seconds: float) -> list[Any]:
        joins, engine = self.joins, self.engine

        def run(joined: Any) -> Any:
            self._whole = engine.run(joined, seconds)
            return self._whole

        outputs = joins.run(run, inputs)
        if engine.version != joins.version:
            # What is known is of the model before, and this one may not take them together.
            raise RuntimeError("the model has changed meanwhile")
        return outputs

    def _look(self, requests: list[Request], outputs: list[Any]) -> None:
        """Look for NaN and infinity where it costs least: here, and in all of a batch at once."""
        whole, self._whole = self._whole, None
        if not self.looks:
            return
        # An output with which that cannot be done is left to its caller.
        with contextlib.suppress(Exception):
            fine = len(requests) > 1 and finite(whole)
            for request, output in zip(requests, outputs, strict=True):
                request.finite = fine or finite(output)

    def _parts(self, requests: list[Request], error: BaseException) -> list[list[Request]]:
        """Out of memory, half of them are tried; else one is at fault, and must not fail others."""
        if not out_of_memory(error):
            return [[request] for request in requests]
        half = (len(requests) + 1) // 2
        with self._lock:
            self._room = half
            self._full = 0
            self.halved += 1
        return [requests[:half], requests[half:]]

    def _answer(
        self, requests: list[Request], outputs: list[Any], error: BaseException | None, took: int
    ) -> list[Request]:
        """Note what came of some requests; those whose callers are to be told."""
        answered = []
        with self._lock:
            for i, request in enumerate(requests):
                if request.state == RUNNING:
                    if error is None:
                        request.output = outputs[i]
                    else:
                        request.error = error
                    request.nanoseconds = took
                    request.state = DONE
                    answered.append(request)
            count = len(requests)
            self.runs += 1
            self.inputs += count
            if count > self.most_joined:
                self.most_joined = count
            self._seconds += (took / 1e9 - self._seconds) / 16
            if count == self._room < self.bounds.batch and error is None:
                self._full += 1
                if self._full >= GROW_AFTER:
                    self._room, self._full = self._room * 2, 0
        return answered

    def _ended(self, run: Run) -> bool:
        """Whether the thread that has carried out a run goes on with the queue."""
        with self._lock:
            if run.left_behind:
                self._stuck -= 1
                return False
            self._run = None
            count = self._crowd = len(run.requests)
            if count > 1:
                self._ended_at = clock()
            if not (self._waiting or run.learns or self._closed):
                self._idle, self._wanted = True, 1
            return True

    def _learn(self, run: Run) -> bool:
        """Find out whether inputs such as the last one can be joined; False as ``_ended``."""
        request = run.requests[0]
        if request.error is not None:
            return True
        seconds = request.limit
        with self._lock:
            now = clock()
            own = self._run = Run([], now, now + seconds)
            own.learns = True
        self.joins.learn(lambda inputs: self.engine.run(inputs, seconds), request.inputs)
        return self._ended(own)

    def close(self) -> None:
        """Answer nobody any more, and let the thread end."""
        with self._lock:
            self._closed = True
            left = [request for _, _, request in self._waiting if request.state == WAITING]
            for request in left:
                request.state, request.error = DONE, RuntimeError(f"{self.name} is closed")
            self._waiting.clear()
            self._gone = 0
        self.nudge()
        wake_callers(left)
