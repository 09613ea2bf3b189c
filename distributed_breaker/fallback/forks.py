"""Forks: no lock of what lies here is held by another thread, and nothing half changed, meanwhile.

SQLite has locks of its own, one for each allocation among them.  A fork while another thread is
inside SQLite could leave one of them taken in the child for ever, so a fork waits for such a
thread, which is bounded as all transactions are.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Any, ClassVar, Protocol

WAIT = 5.0  # s that a fork waits for all locks together, a hanging disk's included


class Forks(Protocol):
    """Something with locks (``process.OwnLock``), which are taken in the order of their ranks.

    It may have a method ``before_fork`` as well: what it does when they are all taken.
    """

    fork_locks: ClassVar[tuple[tuple[int, str], ...]]
    """Rank and name of each.  A thread that holds one may only wait for higher ranks."""

    def forked(self, clean: bool) -> None:
        """In the child.  Not ``clean``: another thread may have been at work inside."""


_owners: weakref.WeakSet[Any] = weakref.WeakSet()
_adding = threading.Lock()
# By thread: two may fork at once.
_taken: dict[int, list[threading.Lock]] = {}
_missed: dict[int, set[int]] = {}


def follow_forks(owner: Forks) -> None:
    """See to ``owner`` at each fork, as long as it lives."""
    with _adding:
        _owners.add(owner)


def _all() -> list[Any]:
    with _adding:
        return list(_owners)


def _before() -> None:
    deadline = time.monotonic() + WAIT
    taken = _taken[threading.get_ident()] = []
    missed = _missed[threading.get_ident()] = set()
    ranked = [(rank, id(owner), owner, name) for owner in _all() for rank, name in owner.fork_locks]
    for _, _, owner, name in sorted(ranked, key=lambda each: each[:2]):
        lock: threading.Lock = getattr(owner, name)
        if lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            taken.append(lock)
        else:
            missed.add(id(owner))
    for owner in {id(owner): owner for _, _, owner, _ in ranked}.values():
        if id(owner) not in missed and hasattr(owner, "before_fork"):
            owner.before_fork()


def _after_in_parent() -> None:
    _missed.pop(threading.get_ident(), None)
    for lock in reversed(_taken.pop(threading.get_ident(), [])):
        lock.release()


def _after_in_child() -> None:
    global _adding
    _adding = threading.Lock()
    missed = _missed.get(threading.get_ident(), set())
    _taken.clear()
    _missed.clear()
    for owner in _all():
        for _, name in owner.fork_locks:
            vars(owner).pop(name, None)  # made anew when wanted; see OwnLock
        owner.forked(id(owner) not in missed)


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
