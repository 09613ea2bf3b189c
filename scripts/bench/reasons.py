"""Why ours is not ahead, row by row: the one place where that is answered for.

A pattern is matched (as in fnmatch) with ``topic: row``, and the first that fits is taken.  A row
that is behind and fits none fails the run, so nothing gets behind without an explanation.  A
reason is technical and honest: what the other does not do, or what ours does that costs this.
"""

from __future__ import annotations

REASONS: dict[str, str] = {
    "calls: closed, with breaker*": (
        "`with breaker:` is `with breaker.guard():` with a context variable for its permit, so "
        "that threads, tasks and nested blocks may enter one breaker at the same time; purgatory "
        "makes an object for each call instead. `guard()` is the fast form."
    ),
    "calls: closed, *with*": (
        "A block's permit is an object with the call's era, its start and what the block says of "
        "its outcome; the faster peer takes no time and lets a block say nothing."
    ),
    "calls: closed, *generator*": (
        "Ours takes each step of the generator itself, so that only the time inside it is "
        "measured and an early close counts for nothing; the faster peer loops over it in one "
        "block, and counts an early close as a success."
    ),
    "calls: closed, *no durations": (
        "An append to the tally that the store gets; the faster peer does nothing on success but "
        "set a count to zero."
    ),
    "calls: closed, *": (
        "Two clock reads, which the faster peer does not make: it measures no durations and "
        "shares nothing. The rows without durations compare like with like."
    ),
    "calls: rejected, *": (
        "The exception says for how long the circuit stays open, in which state, by whose "
        "decision and why; the faster peer's carries the breaker alone, or a name."
    ),
    "threads: * thread*": (
        "Ours takes two clock reads for a call's duration and appends it for the store; the "
        "faster peer measures nothing and takes no lock, either."
    ),
    "traffic: *": (
        "interlock-cb tells the server of no outcome: it only asks for the state once a second, "
        "and each process judges its own calls alone. Ours reports every outcome, in batches, so "
        "that the fleet has one window; the other peers pay for each call."
    ),
    "trips: *": (
        "A peer that asks Redis before each call sees a trip with its next call, and pays a round "
        "trip for every call. Ours is pushed and takes no I/O in a call: it is heard once the "
        "failing process's link, the server and the hearing process's thread have had their turn "
        "on the cores."
    ),
    "outage: *": (
        "Neither waits for the server in a call. One call in fifty fails here, which wakes the "
        "thread of ours that reports it, and the two then compete for the interpreter's lock and "
        "a core; interlock-cb reports nothing. Each figure is a single longest call."
    ),
    "recovery: from the good probe*": (
        "A peer that asks Redis before each call has closed with the next one, and one that lets "
        "every process probe at the same time closes everywhere at once; ours is pushed, and "
        "heard when the listening thread has its turn."
    ),
    "circuits: *without logs": (
        "A circuit of ours has a window of 12 buckets, totals with 16 duration buckets, its "
        "policy, and each reporter's share, for all processes together; the peers keep one to "
        "three short strings and their windows in each process, and interlock-cb keeps nothing "
        "until a circuit opens."
    ),
    "circuits: *server memory*": (
        "Four of these KB are the circuit's log of transitions with their evidence, a stream for "
        "which the server allocates the first block at once; it expires. No peer keeps a log. Of "
        "the rest speaks the row without logs."
    ),
    "circuits: *process memory*": (
        "A circuit of ours in a process is a mirror of the shared state and a whole machine of "
        "its own, with its window, that takes over when the store is away."
    ),
    "circuits: 1 circuit: server time": (
        "interlock-cb tells the server of no outcome: it only asks for the state once a second."
    ),
    "circuits: *server time": (
        "Calls that are spread over many circuits can't be batched: each circuit reports its own "
        "outcomes and is asked for its state every 2 s, used or not."
    ),
    "circuits: *process time": (
        "The link reports each circuit's outcomes and polls each circuit every 2 s; peers in "
        "memory do nothing between calls."
    ),
    "startup: memory*": (
        "Ours runs two threads with a connection each, and has a session, a mirror and a machine "
        "of its own for the time without a store; the leanest peers are a counter and a clock."
    ),
    "startup: *": (
        "Ours is some twenty modules, whose dataclasses and named tuples are generated when they "
        "are imported, and its first answer is the store's, so that a fresh process never calls "
        "through an open circuit. The fastest peers are one module and ask nobody."
    ),
}
