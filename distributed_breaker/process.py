"""What the life of a process means for a link: exits, forks, and places where no thread can run.

No signal handler is installed: an application's own stay as they are.
"""

from __future__ import annotations

import atexit

# A thread imports this when it looks up its first host.  A fork in the midst of that import would
# leave its lock taken in the child for ever, and no thread there could look up a host again.
import encodings.idna  # noqa: F401
import importlib
import itertools
import os
import sys
import threading
import weakref
from typing import Any, Protocol


class Follower(Protocol):
    """Something that must be closed when its process ends, and told of a fork in the child."""

    def close(self) -> None: ...
    def forked(self) -> None: ...


class OwnLock:
    """A lock of this process's own, made when it is first wanted; a fork's child forgets it.

    It must not be made anew right at the fork.  gunicorn's gevent workers replace threads by
    greenlets only afterwards, and a greenlet that waits for a lock from before stops all others,
    also the one that holds it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> threading.Lock:
        # It is atomic, so two threads that come first at once get the same lock; and what lies in
        # the object's own dictionary is found without asking here again.
        lock: threading.Lock = vars(instance).setdefault(self._name, threading.Lock())
        return lock


_followers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def follow_process(follower: Follower) -> None:
    """Close ``follower`` at exit, before those that it may stand on, which have come earlier; and
    tell it in a forked child."""
    _followers[next(_numbers)] = follower


def close_with_process(follower: Follower) -> None:
    """Children of multiprocessing and Celery's workers skip atexit: use their own hooks."""
    alive = weakref.ref(follower)

    def close(**_: Any) -> None:
        still = alive()
        if still is not None:
            still.close()

    util = sys.modules.get("multiprocessing.util")
    if util is not None:

        def at_end(still: Follower) -> None:
            util.Finalize(still, close, exitpriority=10)

        at_end(follower)
        # A child of a fork server imports the program's modules, and so may start its link, before
        # its life begins by forgetting all that is to be done at its end.  Then it calls these.
        util.register_after_fork(follower, at_end)
    if "celery.signals" in sys.modules:
        sys.modules["celery.signals"].worker_process_shutdown.connect(close, weak=False)


def uwsgi_without_threads() -> bool:
    """Whether this is uWSGI without --enable-threads, where threads start and never run."""
    uwsgi = sys.modules.get("uwsgi")
    return uwsgi is not None and not {"enable-threads", "threads"} & _options(uwsgi)


def _options(uwsgi: Any) -> set[str]:
    options = getattr(uwsgi, "opt", None) or {}
    return {name.decode() if isinstance(name, bytes) else str(name) for name in options}


def before_uwsgi_forks() -> bool:
    """Whether this is uWSGI's master, which will fork its workers when the application is loaded.

    A thread must not be started here: uWSGI forks without asking Python, so the child would begin
    with whatever lock a thread of the master's held, the interpreter's own included.
    """
    uwsgi = sys.modules.get("uwsgi")
    return uwsgi is not None and "master" in _options(uwsgi) and uwsgi.worker_id() == 0


def _follow_uwsgi() -> None:
    """uWSGI forks without asking Python, and calls this in its workers."""
    uwsgi: Any = sys.modules["uwsgi"]
    try:
        # There is only one hook; this module of uWSGI's shares it among all who want it.
        importlib.import_module("uwsgidecorators").postfork(_forked)
    except Exception:
        before = getattr(uwsgi, "post_fork_hook", None)

        def hook() -> None:
            _forked()
            if before is not None:
                before()

        uwsgi.post_fork_hook = hook


def _close_all() -> None:
    for follower in reversed(list(_followers.values())):
        follower.close()


def _forked() -> None:
    for follower in list(_followers.values()):
        follower.forked()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forked)
if "uwsgi" in sys.modules:
    _follow_uwsgi()
