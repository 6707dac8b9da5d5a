"""What stays and what goes."""

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ckptd import retention
from ckptd.config import BestRule, Rules
from ckptd.errors import Bug
from ckptd.model import Checkpoint, Level, State
from ckptd.retention import Plan, plan
from tests.unit.test_best import a_save

NOW = datetime(2030, 1, 1, tzinfo=UTC)
LAST_2 = Rules(keep_last=2)


def planned(saves: list[Checkpoint], rules: Rules, holds: dict[str, list[str]] | None = None) -> Plan:
    return plan(saves, rules, NOW, holds or {})


def dropped(saves: list[Checkpoint], rules: Rules, holds: dict[str, list[str]] | None = None) -> list[int | None]:
    return [one.checkpoint.step for one in planned(saves, rules, holds).drop]


def why(saves: list[Checkpoint], rules: Rules, step: int) -> tuple[str, ...]:
    return next(one.why for one in planned(saves, rules).keep if one.checkpoint.step == step)


def test_without_rules_nothing_is_ever_deleted() -> None:
    saves = [a_save(step) for step in range(20)]
    assert dropped(saves, Rules()) == []
    assert why(saves, Rules(), 3) == ("no rule is set",)


def test_the_newest_n_stay_by_number_not_by_text_or_clock() -> None:
    """Row 25: 1,000,000 is newer than 999,999, whatever the clock said."""
    saves = [a_save(step, created_at=NOW - timedelta(days=step % 7)) for step in (999_999, 5, 1_000_000, 40, 999_998)]
    assert dropped(saves, LAST_2) == [999_998, 40, 5]


def test_a_later_execution_is_newer_whatever_its_steps() -> None:
    """A resume from step 50 goes on at 60: what the first execution saved after 50 is the older branch."""
    saves = [a_save(50), a_save(90), a_save(100), a_save(60, segment=2), a_save(70, segment=2)]
    assert dropped(saves, LAST_2) == [100, 90, 50]


def test_rules_are_a_union_of_keeps() -> None:
    """Row 8, M093."""
    saves = [a_save(step, loss=abs(step - 7)) for step in range(1, 13)]
    rules = Rules(keep_last=2, keep_every=5, keep_best=(BestRule(metric="loss", mode="min", k=2),))
    assert dropped(saves, rules) == [9, 8, 4, 3, 2, 1]
    assert why(saves, rules, 7) == ("best:loss #1",)
    assert why(saves, rules, 12) == ("newest verified", "last 2")
    assert why(saves, rules, 10) == ("every 5",)


def test_the_newest_verified_stays_even_when_only_other_rules_are_set() -> None:
    """Promise 3: never without one."""
    assert dropped([a_save(3), a_save(7)], Rules(keep_every=100)) == [3]


def test_unverified_ones_stay_and_never_use_up_a_count() -> None:
    saves = [
        a_save(1),
        a_save(2),
        a_save(3),
        a_save(4, level=Level.DURABLE),
        a_save(5, state=State.CORRUPT),
        a_save(6, state=State.PENDING, level=Level.STAGED),
        a_save(7, state=State.MISSING),
    ]
    assert dropped(saves, LAST_2) == [1]
    assert why(saves, LAST_2, 4) == ("not verified yet",)


def test_holds_from_outside_beat_every_rule() -> None:
    """M094: pinned, leased, a branch's parent, the decided best."""
    saves = [a_save(step) for step in range(6)]
    holds = {saves[1].id: ["pin of uid 1000"], saves[2].id: ["lease of pid 7", "parent of x"], "unknown": ["pin"]}
    found = planned(saves, LAST_2, holds)
    assert [one.checkpoint.step for one in found.drop] == [3, 0]
    assert {one.checkpoint.step: one.why for one in found.keep}[2] == ("lease of pid 7", "parent of x")


def test_the_best_stays_for_ever() -> None:
    """Row 1 of the list: round after round, while training gets worse."""
    rules = Rules(keep_last=1, keep_best=(BestRule(metric="loss", mode="min"),))
    kept: list[Checkpoint] = []
    for step in range(1, 30):
        kept = [one.checkpoint for one in planned([*kept, a_save(step, loss=float(step))], rules).keep]
        assert 1 in [one.step for one in kept]
        assert len(kept) <= 2


def test_nan_protects_nothing() -> None:
    rules = Rules(keep_best=(BestRule(metric="loss", mode="min"),))
    assert dropped([a_save(1, math.nan), a_save(2, 1.0), a_save(3, -math.inf)], rules) == [1]


def test_every_revision_of_a_milestone_stays_and_a_save_without_step_is_none() -> None:
    saves = [a_save(10), a_save(10, revision=2), a_save(None), a_save(11)]
    assert dropped(saves, Rules(keep_every=10)) == [None]


def test_each_input_is_answered_once_newest_first() -> None:
    saves = [a_save(step) for step in (3, 1, 2)]
    found = planned(saves, LAST_2)
    assert [one.checkpoint.step for one in found.keep] == [3, 2]
    assert [(one.checkpoint.step, one.why) for one in found.drop] == [(1, "no rule keeps step 1")]


def test_a_naive_time_is_refused() -> None:
    with pytest.raises(ValueError, match="aware"):
        plan([], Rules(), datetime(2030, 1, 1), {})  # noqa: DTZ001


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        ("_vote", "R1"),
        ("_newest", "R1"),
    ],
)
def test_a_plan_that_breaks_a_promise_is_never_returned(
    monkeypatch: pytest.MonkeyPatch, broken: str, name: str
) -> None:
    """The check is not the decision written twice: break the decision and it says so."""
    saves = [a_save(step, loss=float(step)) for step in range(5)]
    rules = Rules(keep_last=1, keep_best=(BestRule(metric="loss", mode="min"),))
    whole = getattr(retention, broken)
    calls: list[Any] = []

    def wrong(*arguments: Any) -> Any:
        calls.append(arguments)
        if broken == "_newest":
            return whole(*arguments) if len(calls) > 1 else min(*arguments, key=retention.newness)
        return None

    monkeypatch.setattr(retention, broken, wrong)
    if broken == "_newest":
        rules = Rules(keep_every=100)
    with pytest.raises(Bug, match=name):
        planned(saves, rules)


def test_a_plan_that_drops_what_is_held_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    saves = [a_save(step) for step in range(5)]
    monkeypatch.setattr(retention, "_decide", lambda *_: Plan((), tuple(map(drop, saves))))
    with pytest.raises(Bug, match="R1, R2"):
        planned(saves, LAST_2, {saves[0].id: ["pin"]})


def drop(checkpoint: Checkpoint) -> retention.Dropped:
    return retention.Dropped(checkpoint, "")
