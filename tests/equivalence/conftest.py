"""The model and the script are one machine: here they are kept equal.

=====================  ==========================================================================
``twins.py``           one step in both twins, and what must be equal afterwards
``small.py``           the small policies of which all states are gone through,
``alphabet.py``        everything that can be done to a circuit in one state,
``exploration.py``     and the way through all states
``walks.py``           long random lives, for hypothesis or a seed to choose
``extremes.py``        cases by hand that none of them comes to,
``steady.py``          and those on both sides of the shortcut's bounds
``corpus.py``          a few cases of all that, for what has to be gone through often
``invariants.py``      the rules S1 to S15 as an oracle that can be used elsewhere too,
``trip_rule.py``       with the trip rule written a second time, in the plainest way
``planted.py``         errors to plant into the twins, which the tests must find
=====================  ==========================================================================

When a planted error is not found any more, give ``walks.py`` or ``alphabet.py`` a case that
finds it.  When its text is not found any more, mend the edit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import redis

from scripts.servers import Server
from tests.equivalence.twins import Script


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    """A client that waits long enough for a pipeline of hundreds of steps on a busy machine."""
    with contextlib.closing(server.client(decode_responses=True, socket_timeout=60.0)) as it:
        yield it


@pytest.fixture
def script(client: redis.Redis, namespace: str) -> Iterator[Script]:
    """The shipped script, under keys that no other test uses."""
    with contextlib.closing(Script(client, namespace)) as it:
        yield it
