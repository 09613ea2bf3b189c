"""The bugs that other circuit breakers have, and the tests that pin them here.

Each line is one bug, in the words of whoever reported it, with the projects in which it is or was
found.  The tests named below it fail if this library gets it too; each says so in its docstring.
Documentation may cite this list: that the tests exist, and are about this, is itself tested.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Bug(NamedTuple):
    """A bug, whose it is, and what pins it: ``file::test`` below ``tests/``, the first being the
    one that names the bug."""

    what: str
    whose: tuple[str, ...]
    tests: tuple[str, ...]


BUGS = (
    Bug(
        "half-open admits every process",
        ("pybreaker #24", "purgatory", "opossum"),
        (
            "fleet/test_probes.py::"
            "test_when_the_interval_ends_no_more_probes_run_than_there_are_permits",
            "fleet/test_probes.py::test_many_tasks_of_one_loop_are_no_more_probes_than_permits",
            "fleet/test_probes.py::test_probes_that_hang_hold_back_everybody_else",
        ),
    ),
    Bug(
        "a prober that is killed wedges the fleet",
        ("resilience4j #903", "#935", "interlock", "nopanic"),
        (
            "fleet/test_probes.py::test_a_dead_prober_costs_at_most_one_lease",
            "fleet/test_probes.py::test_three_successes_with_expired_leases_between_close_it",
        ),
    ),
    Bug(
        "a late result from before the trip closes or reopens the circuit",
        ("resilience4j #1090", "circuitbreaker"),
        (
            "fleet/test_late_results.py::test_while_open",
            "fleet/test_late_results.py::test_while_half_open",
            "fleet/test_late_results.py::test_after_it_has_closed_again",
            "fleet/test_late_results.py::test_of_a_probe_after_another_one_has_failed",
        ),
    ),
    Bug(
        "a late failure pushes the time of opening forward",
        ("pybreaker",),
        (
            "fleet/test_late_results.py::test_while_open",
            "fleet/test_late_results.py::"
            "test_bad_calls_that_end_together_with_the_trip_do_not_extend_it",
        ),
    ),
    Bug(
        "a new process closes or overwrites an open circuit",
        ("pybreaker #26", "purgatory"),
        (
            "fleet/test_newcomers.py::test_its_first_call_is_rejected",
            "fleet/test_newcomers.py::test_forced_open_holds_for_it_too",
            "fleet/test_loss.py::test_flushall_again_and_again_among_newcomers",
        ),
    ),
    Bug(
        "a fresh process calls through an open circuit until its first poll",
        ("interlock",),
        (
            "fleet/test_newcomers.py::test_its_first_call_is_rejected",
            "fleet/test_newcomers.py::test_a_cold_start_of_many_at_once",
            "faults/test_fork.py::test_a_child_of_an_open_circuit_never_calls_through",
        ),
    ),
    Bug(
        "Redis dies and an open circuit closes",
        ("pybreaker", "interlock"),
        (
            "faults/test_outage.py::test_killed_while_open_stays_open_until_its_time",
            "faults/test_outage.py::test_restarted_while_open",
            "faults/test_outage.py::test_stopped_while_open_makes_no_call_wait",
            "faults/test_memory.py::test_evictions_under_load_are_harmless",
        ),
    ),
    Bug(
        "FLUSHALL closes it",
        ("pybreaker", "nopanic"),
        (
            "fleet/test_loss.py::test_flushall",
            "fleet/test_loss.py::test_flushall_without_any_traffic",
            "faults/test_keys.py::test_while_open",
        ),
    ),
    Bug(
        "clock skew between hosts opens the gate early",
        ("nopanic", "baldur"),
        (
            "fleet/test_clocks.py::test_processes_clocks_do_not_matter",
            "fleet/test_clocks.py::test_the_stores_clock_while_open",
        ),
    ),
    Bug(
        "an outage of Redis costs seconds per call, or is raised to the caller",
        ("redis-py's defaults", "purgatory", "gobreaker"),
        (
            "faults/test_outage.py::test_killed_while_closed",
            "faults/test_outage.py::test_stopped_while_closed_makes_no_call_wait",
            "faults/test_outage.py::test_a_probe_waits_a_bounded_time_for_a_stopped_store",
            "faults/test_network.py::test_a_black_hole_for_everything",
        ),
    ),
    Bug(
        "failures that are spread over processes never trip it",
        ("interlock",),
        ("fleet/test_trip.py::test_failures_spread_over_processes_trip_for_all",),
    ),
    Bug(
        "one bad node poisons all",
        ("Polly #287",),
        ("fleet/test_trip.py::test_one_sick_process_is_quarantined_and_trips_nobody_else",),
    ),
    Bug(
        "a lock is held during the call",
        ("pybreaker #3",),
        ("fleet/test_trip.py::test_calls_run_side_by_side",),
    ),
    Bug(
        "excluded errors are counted as successes",
        ("pybreaker",),
        (
            "fleet/test_trip.py::test_excluded_errors_are_neither_successes_nor_failures",
            "fleet/test_probes.py::test_an_ignored_probe_neither_closes_nor_opens",
        ),
    ),
    Bug(
        "a listener that raises breaks the call",
        ("pybreaker",),
        ("fleet/test_trip.py::test_a_listener_that_raises_is_nobody_elses_problem",),
    ),
    Bug(
        "old outcomes trip it again right after recovery",
        ("The original",),
        (
            "faults/test_evidence.py::test_old_failures_do_not",
            "faults/test_evidence.py::test_failures_before_the_present_state_do_not",
        ),
    ),
    Bug(
        "fallbacks run under a lock",
        ("The original",),
        ("fleet/test_trip.py::test_a_fallback_runs_under_no_lock",),
    ),
    Bug(
        "a cancelled task leaks its permit",
        ("cancelled task leaks",),
        (
            "fleet/test_probes.py::test_a_cancelled_probe_gives_its_permit_back_at_once",
            "unit/test_shared_permits.py::test_an_interrupted_wait_leaks_no_permit",
        ),
    ),
    Bug(
        "a traceback per rejected call pins a core",
        ("litellm #40620",),
        ("fleet/test_trip.py::test_a_rejection_logs_nothing",),
    ),
    Bug(
        "NOSCRIPT loops",
        ("Stoplight #777",),
        (
            "faults/test_errors.py::test_a_script_that_the_server_cannot_keep",
            "faults/test_slow_server.py::test_scripts_that_are_flushed_all_the_time",
            "fleet/test_loss.py::test_script_flush",
        ),
    ),
    Bug(
        "an unread reply answers the next command",
        ("redis-py #2624",),
        (
            "faults/test_errors.py::test_an_answer_to_something_else_is_never_taken",
            "faults/test_network.py::test_answers_that_come_just_in_time_or_just_too_late",
        ),
    ),
    Bug(
        "the same name in two namespaces shares its state",
        ("pybreaker #88",),
        ("fleet/test_trip.py::test_the_same_name_in_two_namespaces_is_two_circuits",),
    ),
)


@cache
def docstrings_of(path: str) -> dict[str, str]:
    """The docstrings of all functions of a file below ``tests/``, by their names."""
    file = ROOT / "tests" / path
    if not file.exists():
        return {}
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, functions)]
    # A docstring may break its line within a name.
    return {node.name: " ".join((ast.get_docstring(node) or "").split()) for node in nodes}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_each_bug_that_others_have_is_pinned(bug: Bug) -> None:
    docstrings = []
    for pinned in bug.tests:
        path, _, name = pinned.partition("::")
        assert name in docstrings_of(path), f"{pinned} is not there any more: {bug.what}"
        docstrings.append(docstrings_of(path)[name])
    missing = [name for name in bug.whose if not any(name in said for said in docstrings)]
    assert not missing, f"no docstring names {missing}: {bug.what}"


def test_none_is_listed_twice() -> None:
    assert len({bug.what for bug in BUGS}) == len(BUGS) == 22
