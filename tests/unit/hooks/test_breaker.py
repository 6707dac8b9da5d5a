"""The circuit of a hook, and its statistics."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.hooks.breaker import Breaker, State
from ckptd.hooks.result import Outcome, Run
from ckptd.hooks.tally import SAMPLE_MAX, Tally

AT = datetime(2026, 1, 2, tzinfo=UTC)


def run(outcome=Outcome.OK, duration_s=0.0, error=""):
    return Run("h", "e", "k", AT, outcome, duration_s, error)


def test_a_hook_rests_after_failures_in_a_row_and_one_run_decides():
    """M054."""
    breaker = Breaker(3, 10.0, 25.0)
    assert [breaker.record(0.0, good=False) for _ in range(3)] == [False, False, True]
    assert (breaker.allows(9.9), breaker.state) == (False, State.OPEN)
    assert breaker.allows(10.0)
    assert not breaker.allows(10.0), "only one run decides"
    assert breaker.record(10.0, good=False)
    assert not breaker.allows(29.9)
    assert breaker.allows(30.0), "the rest has doubled"
    assert breaker.record(30.0, good=False)
    assert not breaker.allows(54.9)
    assert breaker.allows(55.0), "and stays below its limit"
    assert not breaker.record(55.0, good=True)
    assert (breaker.state, breaker.failures) == (State.CLOSED, 0)


def test_a_success_between_failures_keeps_the_circuit_closed():
    breaker = Breaker(2, 10.0, 10.0)
    for _ in range(10):
        assert not breaker.record(0.0, good=False)
        breaker.record(0.0, good=True)
    assert breaker.allows(0.0)


def test_a_trial_that_did_not_happen_is_left_to_the_next():
    breaker = Breaker(1, 10.0, 10.0)
    breaker.record(0.0, good=False)
    assert breaker.allows(10.0)
    breaker.release()
    assert breaker.allows(10.0)


def test_statistics_count_each_outcome_and_calls_are_what_really_ran():
    """M058."""
    tally = Tally()
    for outcome in (*Outcome, Outcome.OK):
        tally.record(run(outcome, 0.1, "broke" if outcome is Outcome.FAILED else "late"))
    wire = tally.to_wire()
    assert wire["calls"] == 5
    assert {str(outcome): wire[outcome] for outcome in Outcome} == {**dict.fromkeys(map(str, Outcome), 1), "ok": 2}
    assert (wire["last_at"], wire["last_error"]) == (AT.isoformat(), "late")


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200), st.sampled_from([0.5, 0.95]))
def test_a_percentile_is_a_duration_that_happened_and_has_its_share_below(durations, share):
    tally = Tally()
    for duration_s in durations:
        tally.record(run(duration_s=duration_s))
    found = tally.percentile_s(share)
    assert found in durations
    assert sum(1 for each in durations if each <= found) >= share * len(durations)
    assert sum(1 for each in durations if each < found) < share * len(durations)


def test_the_sample_is_bounded_and_of_the_newest():
    tally = Tally()
    for number in range(SAMPLE_MAX * 3):
        tally.record(run(duration_s=float(number)))
    assert len(tally.durations_s) == SAMPLE_MAX
    assert tally.percentile_s(0.5) == pytest.approx(SAMPLE_MAX * 2.5, abs=1)
    assert Tally().to_wire()["p50_s"] is None
