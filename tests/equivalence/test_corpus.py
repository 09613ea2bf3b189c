"""The twins are equal on the corpus.

``make mutants`` judges most mutants by these cases, without running this test each time.
"""

from __future__ import annotations

import pytest

from tests.equivalence.corpus import corpus
from tests.equivalence.twins import Script, differences

pytestmark = [pytest.mark.servers("valkey"), pytest.mark.slow, pytest.mark.timeout(600)]


def test_model_and_script_are_equal_on_the_corpus(script: Script) -> None:
    """Reply, hash, log, expiry and push of every case are equal."""
    assert len(corpus()) > 10_000
    for difference in differences(script, corpus()):
        pytest.fail(str(difference))
