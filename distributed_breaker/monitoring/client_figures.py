"""What the clients of a process count and hold, as families of samples.

Pure.  A client says of itself what it likes (``Client.stats``); here stands what of it is exported.
All of that is of this process, but for what waits in an outbox, which is the host's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from .figures import NONE, Family, Figures, Labels, Table, family

Stats = Mapping[str, Any]
Found = Iterator[tuple[Labels, float]]


class Figure(NamedTuple):
    """A family, and how its numbers are found in what one client says; there may be none."""

    family: Family
    find: Callable[[Stats], Found]


def _counter(name: str, text: str, find: Callable[[Stats], Found]) -> Figure:
    return Figure(family("counter", name, text), find)


def _gauge(name: str, text: str, find: Callable[[Stats], Found]) -> Figure:
    return Figure(family("gauge", name, text), find)


# ---------------------------------------------------------------------------- where numbers are


def _look(stats: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        stats = stats.get(key) if isinstance(stats, Mapping) else None
    return stats


def _at(*path: str) -> Callable[[Stats], Found]:
    """The number at one place."""

    def find(stats: Stats) -> Found:
        value = _look(stats, path)
        if value is not None:
            yield NONE, value

    return find


def _each(label: str, *path: str) -> Callable[[Stats], Found]:
    """The numbers below one place, whose names are few."""

    def find(stats: Stats) -> Found:
        found = _look(stats, path)
        for name, value in found.items() if isinstance(found, Mapping) else ():
            yield Labels(**{label: str(name)}), value

    return find


# Where the kinds of clients say what their tiers hold.
TIERS = (
    (Labels(tier="memory"), ("tiers", "memory")),
    (Labels(tier="disk"), ("tiers", "disk")),
    (Labels(tier="memory"), ("stored", "memory")),
    (Labels(tier="disk"), ("stored", "disk")),
    (Labels(tier="memory"), ("stored",)),
    (Labels(tier="memory"), ("predictions",)),
)


def _tiers(what: str) -> Callable[[Stats], Found]:
    """A number of each tier."""

    def find(stats: Stats) -> Found:
        for tier, path in TIERS:
            value = _look(stats, (*path, what))
            if value is not None:
                yield tier, value

    return find


def _answers(stats: Stats) -> Found:
    """By the first digit: a server may make up as many statuses as it likes."""
    classes = Counter[str]()
    for status, count in (stats.get("statuses") or {}).items():
        classes[f"{status[0]}xx"] += count
    for of, count in classes.items():
        yield Labels(code=of), count


SOURCES = ("model", "cache", "stale", "lightweight", "default")


def _predictions(stats: Stats) -> Found:
    """By what has answered; also what has not yet, so that its first time is seen to come."""
    if "answers" in stats:
        for source in SOURCES:
            yield Labels(source=source), stats["answers"].get(source, 0)


def _phases(stats: Stats) -> Found:
    for phase, took in (stats.get("times") or {}).items():
        yield Labels(phase=phase), took["seconds"]


def _topics(what: str, of_all: Callable[[list[float]], float]) -> Callable[[Stats], Found]:
    """A number of all topics of the outbox together."""

    def find(stats: Stats) -> Found:
        topics = _look(stats, ("outbox", "topics"))
        if topics is not None:
            yield NONE, of_all([topic[what] or 0 for topic in topics.values()])

    return find


def _oldest(ages: list[float]) -> float:
    return max(ages, default=0)


# ---------------------------------------------------------------------------- what is exported

OF_ALL = (
    _counter("cache_hits", "Fresh values that a tier has served.", _tiers("hits")),
    _counter("cache_stale_hits", "Old values that a tier has served.", _tiers("stale")),
    _counter("cache_misses", "Values that a tier did not have.", _tiers("misses")),
    _counter("cache_evictions", "Values that had to make room.", _tiers("evictions")),
    _gauge("cache_items", "Values that a tier holds.", _tiers("items")),
    _gauge("cache_bytes", "What they take.", _tiers("bytes")),
    _gauge("cache_tier_works", "0 while a tier on disk fails.", _tiers("works")),
    _gauge("outbox_waiting", "What waits on this host to be delivered.", _topics("waiting", sum)),
    _gauge("outbox_parked", "What waits there for an operator.", _topics("parked", sum)),
    _gauge("outbox_oldest_age_seconds", "Age of what waits longest.", _topics("oldest", _oldest)),
    _gauge("outbox_works", "0 while it can't be read or written.", _at("outbox", "works")),
)
# By the kind of client.
FIGURES: dict[str, tuple[Figure, ...]] = {
    "http": (
        _counter("http_attempts", "Requests that were sent, retries too.", _at("attempts")),
        _counter("http_retries", "Those that were no first ones.", _at("retries")),
        _counter(
            "http_retries_over_budget",
            "Retries that were not made, to spare the service.",
            _at("retries_over_budget"),
        ),
        _counter("http_responses", "Answers, by the class of their status.", _answers),
        _counter("http_phase_seconds", "Time spent in each phase of requests.", _phases),
        _gauge("http_hosts_open", "Hosts whose own circuits are open.", _at("hosts", "open")),
    ),
    "database": (
        _gauge("database_pool_size", "Connections that the pool keeps.", _at("pool", "size")),
        _gauge("database_pool_checked_out", "Connections in use.", _at("pool", "checked_out")),
        _gauge("database_pool_overflow", "Those beyond the size.", _at("pool", "overflow")),
        _counter("database_failures", "Calls that failed.", _each("kind", "failures")),
        _counter("database_slow_queries", "Slow queries.", _at("slow_queries", "count")),
    ),
    "ml": (
        _counter("ml_predictions", "Predictions, by what has answered.", _predictions),
        _gauge("ml_model_ready", "Whether the model answers.", _at("model", "ready")),
        _gauge("ml_waiting", "Calls that wait for it.", _at("model", "waiting")),
        _counter("ml_refused", "Calls it had no room or time for.", _at("model", "rejected")),
        _counter("ml_timeouts", "Calls it did not answer in time.", _at("model", "timeouts")),
        _counter("ml_runs", "Runs of the model.", _at("model", "runs")),
        _counter("ml_inputs", "Inputs of all runs.", _at("model", "inputs")),
        _gauge("ml_batch_size", "Inputs that may go into a run.", _at("model", "batch_size")),
    ),
}


def of_clients(figures: Figures) -> Iterator[Table]:
    """What the clients of this process count and hold."""
    here = Labels(fleet=figures.namespace, process=figures.process)
    clients = [
        (name.split(".")[1], Labels(client=name) + here, stats)
        for name, stats in sorted(figures.clients.items())
    ]
    for kind, wanted in ("", OF_ALL), *FIGURES.items():
        chosen = [(labels, stats) for its, labels, stats in clients if kind in ("", its)]
        for of, find in wanted:
            # The sign makes numbers of what is true or false.
            yield of, [(own + more, (+n,)) for own, stats in chosen for more, n in find(stats)]
