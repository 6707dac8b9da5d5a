"""What a hook is told and what it may say."""

import dataclasses
import json
import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.hooks import Finding, Level, Veto
from ckptd.hooks.context import Context, with_metrics
from ckptd.hooks.result import ALLOWED, FINDINGS_MAX, TEXT_CHARS_MAX, Answer, Outcome, Run, Verdict, understand

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_a_context_comes_back_from_the_wire_as_it_was(data):
    context = Context("checkpoint.published", "k", AT, "e", "c", data)
    assert Context.from_wire(json.loads(json.dumps(context.to_wire()))) == context


def test_outside_the_daemon_a_context_is_strict_json():
    """M057, row 19: plain data. NaN is no JSON, so it goes out by its name."""
    context = Context(
        "metric.crossed", "k", AT, data={"metrics": {"loss": math.nan}, "values": [math.inf, -math.inf, 1.5]}
    )
    sent = json.loads(context.to_json(hook="h"), parse_constant=pytest.fail)
    assert sent["hook"] == "h"
    assert sent["data"] == {"metrics": {"loss": "NaN"}, "values": ["Infinity", "-Infinity", 1.5]}


def test_a_context_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Context("a", "k", AT).event = "b"


def test_metrics_stand_beside_the_keys_of_the_point_and_never_in_their_place():
    """M057: `context.data.get("loss")` finds the metric; a metric called "step" does not hide the step."""
    data = with_metrics({"step": 7}, {"loss": 0.5, "step": 1e9})
    assert data == {"step": 7, "loss": 0.5, "metrics": {"loss": 0.5, "step": 1e9}}


@pytest.mark.parametrize("returned", [None, True, [], [True, None], ()])
def test_nothing_and_true_mean_fine(returned):
    assert understand(returned) == Answer()


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        (False, "returned False"),
        (Veto("no"), "no"),
        ([True, Veto("a"), Veto("b")], "a"),
        ([False, Veto("b")], "returned False"),
    ],
)
def test_a_veto_is_an_explicit_result(returned, why):
    """M057, row 18."""
    assert understand(returned).veto == Veto(why)


def test_findings_are_kept_in_order_and_cut_to_size():
    found = [Finding(Level.ERROR, "x" * 5000, {"a": 1}), Finding("info", "second")]
    answer = understand(found)
    assert [len(finding.text) for finding in answer.findings] == [TEXT_CHARS_MAX, 6]
    assert Answer.from_wire(json.loads(json.dumps(answer.to_wire()))) == answer


@pytest.mark.parametrize("returned", [0, 1, "no", {"continue": False}, object(), [1], 2.5])
def test_what_means_nothing_is_an_error_and_no_veto(returned):
    with pytest.raises(TypeError, match="a hook returns None, True, False, Veto, Finding"):
        understand(returned)


def test_too_many_findings_are_an_error():
    with pytest.raises(ValueError, match=f"{FINDINGS_MAX} are the most"):
        understand([Finding(Level.INFO, "x")] * (FINDINGS_MAX + 1))


def test_a_verdict_names_the_hook_that_vetoed_and_why():
    fine = Run("a", "e", "k", AT, Outcome.FAILED, error="broke")
    no = Run("b", "e", "k", AT, Outcome.VETOED, error="too big")
    assert Verdict((fine,)).allowed
    assert ALLOWED.allowed
    assert (Verdict((fine, no)).allowed, Verdict((fine, no)).why) == (False, "hook 'b': too big")
