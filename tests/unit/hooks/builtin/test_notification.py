"""Notices for people: rules, severities, a bounded rate of which nothing is lost, quiet hours. M202"""

from datetime import UTC, datetime, time, timedelta
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.hooks.builtin import BUILTINS
from ckptd.hooks.builtin.notices import Notify
from ckptd.hooks.builtin.notification import (
    STANDARD,
    Bucket,
    Notices,
    QuietHours,
    Rule,
    describe,
    quiet_from,
    rule_from,
)
from ckptd.hooks.context import Context
from ckptd.hooks.result import Level

NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
NIGHT = NOON.replace(hour=23)
STALLED = Rule("stalled", ("experiment.stalled", "experiment.lost"), burst=2, per_s=60.0)


KEYS = count()


def event(event_name: str, /, key: str = "", **data: object) -> Context:
    return Context(event_name, key or f"key {next(KEYS)}", NOON, "", "", data)


@pytest.mark.parametrize(
    ("name", "rule", "severity"),
    [
        ("experiment.stalled", "stalled", Level.ERROR),
        ("experiment.lost", "stalled", Level.ERROR),
        ("experiment.failed", "stalled", Level.ERROR),
        ("disk.low", "disk", Level.ERROR),
        ("disk.relief", "relief", Level.WARNING),
        ("checkpoint.corrupt", "corrupt", Level.ERROR),
        ("job.parked", "backlog", Level.WARNING),
    ],
)
def test_what_a_person_should_hear_of_is_told_without_any_configuration(name, rule, severity):
    (notice,) = Notices(STANDARD).see(event(name), NOON, 0.0)
    assert (notice.rule, notice.severity, notice.held_back) == (rule, severity, 0)


def test_the_hook_listens_to_every_event_of_the_standard_rules():
    named = {name for rule in STANDARD for name in rule.events}
    assert named == {str(name) for name in BUILTINS["notify"].events}


def test_a_backlog_is_told_when_the_daemon_finds_one():
    (notice,) = Notices(STANDARD).see(event("alert.raised", alert="backlog", why="2000 jobs wait"), NOON, 0.0)
    assert (notice.rule, notice.text) == ("backlog", "alert.raised: 2000 jobs wait")
    assert Notices(STANDARD).see(event("alert.raised", alert="corrupt"), NOON, 0.0) == []  # told by its own event


def test_an_event_that_no_rule_names_is_no_notice():
    assert Notices(STANDARD).see(event("checkpoint.verified"), NOON, 0.0) == []


def test_a_condition_narrows_a_rule():
    notices = Notices([Rule("big", ("disk.low",), when="data.free_bytes < 100")])
    assert notices.see(event("disk.low", free_bytes=200), NOON, 0.0) == []
    assert len(notices.see(event("disk.low", free_bytes=50), NOON, 0.0)) == 1


def test_an_error_that_a_hook_found_is_a_notice_and_a_note_is_none():
    notices = Notices(STANDARD)
    found = notices.see(event("hook.finding", hook="numeric-health", level="error", text="3 nan"), NOON, 0.0)
    assert [notice.severity for notice in found] == [Level.ERROR]
    assert found[0].text == "hook.finding numeric-health: 3 nan"
    assert notices.see(event("hook.finding", hook="numeric-health", level="info", text="fine"), NOON, 0.0) == []


def test_beyond_its_rate_a_rule_holds_back_and_says_later_how_many():
    notices = Notices([STALLED])
    told = [len(notices.see(event("experiment.lost"), NOON, float(second))) for second in range(7)]
    assert told == [1, 1, 0, 0, 0, 0, 0]
    (notice,) = notices.see(event("experiment.lost"), NOON, 61.0)
    assert notice.held_back == 5
    assert notice.text.endswith("(5 more were held back)")
    assert notices.see(event("checkpoint.verified"), NOON, 500.0) == []  # nothing is owed any more


def test_what_was_held_back_is_said_with_any_later_event():
    notices = Notices([STALLED])
    for _ in range(4):
        notices.see(event("experiment.lost"), NOON, 0.0)
    (notice,) = notices.see(event("disk.low"), NOON, 61.0)
    assert (notice.rule, notice.held_back) == ("stalled", 2)
    assert notice.text == "2 notices of this rule were held back"


def test_one_rule_does_not_use_up_anothers_rate():
    notices = Notices([STALLED, Rule("disk", ("disk.low",))])
    for _ in range(10):
        notices.see(event("experiment.lost"), NOON, 0.0)
    assert [notice.rule for notice in notices.see(event("disk.low"), NOON, 0.0)] == ["disk"]


def test_a_second_delivery_of_the_same_fact_is_told_once():
    notices = Notices([STALLED])
    assert len(notices.see(event("experiment.lost", key="same"), NOON, 0.0)) == 1
    assert notices.see(event("experiment.lost", key="same"), NOON, 1000.0) == []


def test_quiet_hours_hold_back_warnings_until_morning():
    notices = Notices([STALLED, Rule("disk", ("disk.low",), severity=Level.ERROR)], quiet_from("22:00-07:00"))
    assert notices.see(event("experiment.lost"), NIGHT, 0.0) == []
    assert len(notices.see(event("disk.low"), NIGHT, 1.0)) == 1  # an error waits for nobody's sleep
    assert notices.see(event("worker.lost"), NIGHT + timedelta(hours=7), 2.0) == []
    (notice,) = notices.see(event("worker.lost"), NIGHT + timedelta(hours=9), 3.0)
    assert (notice.rule, notice.held_back) == ("stalled", 1)


@given(st.times(), st.times(), st.times())
def test_quiet_hours_are_a_part_of_the_day_and_its_rest_is_not(begin, end, now):
    at = datetime.combine(NOON.date(), now)
    within, without = (QuietHours(*pair).cover(at, Level.INFO) for pair in ((begin, end), (end, begin)))
    assert within != without or begin == end
    assert not QuietHours(begin, end).cover(at, Level.ERROR)


@given(st.integers(1, 5), st.floats(0.5, 100), st.lists(st.floats(-5, 50), max_size=60))
def test_no_window_of_time_holds_more_than_its_rate(burst, per_s, gaps):
    """Also with a clock that goes back."""
    bucket = Bucket(burst, per_s, float(burst), 0.0)
    now_s = highest_s = 0.0
    taken: list[float] = []
    for gap in gaps:
        now_s += gap
        highest_s = max(highest_s, now_s)
        if bucket.ready(now_s):
            bucket.take()
            taken.append(highest_s)
    for first, since in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + (taken[last] - since) / per_s + 1e-6


@given(
    st.lists(st.tuples(st.sampled_from(["experiment.lost", "experiment.stalled", "x"]), st.floats(0, 30)), max_size=60)
)
def test_every_notice_is_told_or_counted(events):
    notices = Notices([STALLED])
    now_s, told, held = 0.0, 0, 0
    for name, gap in events:
        now_s += gap
        for notice in notices.see(event(name), NOON, now_s):
            told += notice.text.startswith("experiment.")
            held += notice.held_back
    for notice in notices.see(event("x"), NOON, now_s + 1e6):
        held += notice.held_back
    assert told + held == sum(name != "x" for name, _ in events)


def test_a_notice_says_what_happened_where_and_how_to_go_on():
    data = {"project": "imagenet", "name": "resnet50", "step": 300, "recovery": {"command": "cd /x && python t.py"}}
    said = describe(event("experiment.lost", **data))
    assert said == "experiment.lost imagenet/resnet50 at step 300; resume with: cd /x && python t.py"
    failed = describe(event("checkpoint.failed", project="p", name="n", error={"code": "no_space", "message": "full"}))
    assert failed == "checkpoint.failed p/n: full"
    found = Context("hook.finding", "k", NOON, "e" * 32, "c" * 32, {"hook": "numeric-health", "text": "1 nan"})
    assert describe(found) == f"hook.finding numeric-health checkpoint {'c' * 32}: 1 nan"


def test_a_rule_of_the_configuration_changes_only_what_it_names():
    rule = rule_from("disk", {"per": "2h", "severity": "warning"})
    assert (rule.events, rule.per_s, rule.severity, rule.burst) == (("disk.low",), 7200.0, Level.WARNING, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rules": {"mine": {}}}, "events must not be empty"),
        ({"rules": {"mine": {"events": ["disk.low"], "color": 1}}}, "unknown"),
        ({"rules": {"mine": {"events": ["disk.low"], "when": "__import__('os')"}}}, "__import__|call"),
        ({"rules": {"disk": {"severity": "fatal"}}}, "fatal"),
        ({"rules": {"disk": {"per": "soon"}}}, "duration"),
        ({"rules": {"disk": {"burst": 0}}}, "at least 1"),
        ({"only": ["nothing"]}, "no such rules"),
        ({"quiet": "at night"}, "22:00-07:00"),
    ],
)
def test_a_wrong_rule_is_refused_with_the_reason(options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        Notify(**options)


def test_the_hook_returns_notices_as_findings_and_never_answers_itself():
    hook = Notify(only=["corrupt", "findings"])
    (found,) = hook.execute(event("checkpoint.corrupt", project="p", name="n", step=7))
    assert found.level is Level.ERROR
    assert found.facts == {
        "notice": "corrupt",
        "held_back": 0,
        "event": "checkpoint.corrupt",
        "project": "p",
        "name": "n",
        "step": 7,
    }
    assert hook.execute(event("hook.finding", level="error", facts=dict(found.facts), text=found.text)) == []


def test_quiet_hours_may_cover_errors():
    hours = quiet_from("00:00-23:59", errors=True)
    assert hours.cover(NOON, Level.ERROR)
    assert QuietHours(time(0), time(23)).cover(NOON, Level.WARNING)
