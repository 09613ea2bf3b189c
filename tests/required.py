"""What a test does when something that it needs is missing."""

from __future__ import annotations

import os

import pytest


def need(reason: str) -> None:
    """Skip the test when there is a reason why it can't run.

    Where CI is set, that is a failure: what must run and was skipped has not been shown to work.
    """
    if reason and os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"must run in CI and can't: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)
