"""The points: all facts, the seeds' names, and where a veto counts."""

from ckptd import hooks
from ckptd.events import EVENTS, MISSED
from ckptd.hooks.points import POINTS, HookEvent, may_veto


def test_every_event_is_a_point_and_every_point_an_event_or_a_question():
    """M047, M049: a fact that hooks can't name would be fired for nothing, a name that is no fact never."""
    asked = {str(point.event) for point in POINTS.values() if point.may_veto}
    assert {str(event) for event in HookEvent} - asked == EVENTS.keys() - {MISSED}
    assert asked & EVENTS.keys() == set()
    assert POINTS.keys() == set(HookEvent)


def test_the_six_named_events_have_their_points():
    """M048: before and after save, load and integrity check, by the names people know."""
    named = {
        "BEFORE_CHECKPOINT_SAVE": "checkpoint.before_save",
        "AFTER_CHECKPOINT_SAVE": "checkpoint.published",
        "BEFORE_CHECKPOINT_LOAD": "checkpoint.before_load",
        "AFTER_CHECKPOINT_LOAD": "checkpoint.loaded",
        "BEFORE_INTEGRITY_CHECK": "checkpoint.before_verify",
        "AFTER_INTEGRITY_CHECK": "checkpoint.verified",
    }
    assert {name: str(HookEvent[name]) for name in named} == named


def test_there_are_more_than_fifteen_points():
    """M047."""
    assert len(POINTS) > 15


def test_a_veto_counts_before_an_act_and_never_after_the_fact():
    """M057, rows 18 and 19: only a before_* point may be vetoed, and each says what a veto does there."""
    for event, point in POINTS.items():
        assert point.may_veto == ("before_" in event) == may_veto(event) == bool(point.effect)
        assert point.meaning


def test_what_hooks_are_written_with_is_importable_from_one_place():
    assert {"BaseHook", "Context", "Finding", "HookEvent", "Priority", "Veto", "hook", "register"} <= set(hooks.__all__)
    assert [name for name in hooks.__all__ if not hasattr(hooks, name)] == []
