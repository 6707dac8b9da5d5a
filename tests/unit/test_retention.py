"""What stays and what goes."""

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ckptd.bestrule import BestRule
from ckptd.errors import Bug
from ckptd.model import Checkpoint, Level, State
from ckptd.retention import Dropped, Given, Plan, decide, digest, plan
from ckptd.rules import Rules
from tests.support.saved import a_save

NOW = datetime(2030, 1, 1, tzinfo=UTC)
LAST_2 = Rules(keep_last=2)


def planned(saves: list[Checkpoint], rules: Rules, holds: dict[str, list[str]] | None = None) -> Plan:
    return plan(saves, rules, Given(now=NOW, holds=holds or {}))


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
    assert why(saves, rules, 7) == ("best:loss",)
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
        plan([], Rules(), Given(now=datetime(2030, 1, 1)))  # noqa: DTZ001


def at(hours: float, step: int, **more: Any) -> Checkpoint:
    """A save so many hours before NOW."""
    return a_save(step, created_at=NOW - timedelta(hours=hours), **more)


def test_milestones_of_steps_epochs_and_time_are_a_union() -> None:
    """M095: keep_every = {steps} / {epochs} / {time_s}."""
    saves = [at(10 - step, step, epoch=step / 4) for step in range(10)]
    assert dropped(saves, Rules(keep_every={"steps": 6})) == [8, 7, 5, 4, 3, 2, 1]
    assert dropped(saves, Rules(keep_every={"epochs": 1})) == [7, 6, 5, 3, 2, 1]
    assert dropped(saves, Rules(keep_every={"time_s": "4h"})) == [7, 6, 5, 3, 2, 1]
    assert dropped(saves, Rules(keep_every={"steps": 6, "epochs": 2})) == [7, 5, 4, 3, 2, 1]


def test_an_epoch_that_a_trainer_counted_in_floats_is_a_whole_one() -> None:
    assert dropped([a_save(1, epoch=0.9999999), a_save(2, epoch=1.4), a_save(3)], Rules(keep_every={"epochs": 1})) == [
        2
    ]


def test_within_is_measured_from_the_newest_save_not_from_now() -> None:
    """A training that was paused for a week loses nothing by it."""
    saves = [at(24 * 7 + hours, 100 - hours) for hours in range(6)]
    assert dropped(saves, Rules(keep_within="3h")) == [96, 95]


def test_calendar_buckets_begin_where_the_time_zone_says() -> None:
    """23:30 and 0:30 UTC are two days in London's winter and one in Tokyo."""
    saves = [
        a_save(1, created_at=datetime(2029, 1, 1, 23, 30, tzinfo=UTC)),
        a_save(2, created_at=datetime(2029, 1, 2, 0, 30, tzinfo=UTC)),
        a_save(3, created_at=datetime(2029, 1, 9, 0, 30, tzinfo=UTC)),
    ]
    assert dropped(saves, Rules(keep_daily=2, time_zone="UTC")) == [1]
    assert dropped(saves, Rules(keep_daily=3, time_zone="UTC")) == []
    tokyo = Rules(keep_daily=2, time_zone="Asia/Tokyo")
    assert dropped([*saves, a_save(0, created_at=datetime(2028, 1, 1, tzinfo=UTC))], tokyo) == [1, 0]
    assert why(saves, Rules(keep_weekly=2), 2) == ("weekly: newest of 2029-W01",)


def test_an_hour_that_the_clock_shows_twice_is_two_hours() -> None:
    """Summer time ends in Berlin at 1:00 UTC of 28 October 2029: 2:30 comes twice."""
    saves = [a_save(n, created_at=datetime(2029, 10, 28, n, 30, tzinfo=UTC)) for n in (0, 1, 2)]
    assert dropped(saves, Rules(keep_hourly=3, time_zone="Europe/Berlin")) == []
    assert dropped(saves, Rules(keep_hourly=2, time_zone="Europe/Berlin")) == [0]


def test_the_oldest_stays_when_the_history_is_shorter_than_asked_for() -> None:
    saves = [at(hours, 100 - hours) for hours in range(50)]
    kept = [one.checkpoint.step for one in planned(saves, Rules(keep_daily=30)).keep]
    assert kept == [100, 99, 75, 51], "NOW is midnight: each day's newest, and the oldest of all"


def test_what_was_saved_in_the_future_stays_and_uses_up_no_bucket() -> None:
    """A clock that jumps must never make anything go."""
    saves = [at(-48, 9), at(1, 8), at(2, 7), at(26, 6)]
    assert dropped(saves, Rules(keep_daily=1)) == [7, 6]
    assert why(saves, Rules(keep_daily=1), 9) == ("saved in the future: a clock is wrong", "newest verified")


def test_tags_of_a_checkpoint_and_of_its_experiment_keep_it() -> None:
    """M094: tagged."""
    saves = [a_save(1, tags=("paper",)), a_save(2), a_save(3)]
    rules = Rules(keep_last=1, keep_tags=("paper", "release"))
    assert dropped(saves, rules) == [2]
    assert plan(saves, rules, Given(now=NOW, tags=frozenset({"release"}))).drop == ()


def test_the_newest_configurations_stay_and_older_ones_go() -> None:
    """M098: keep the last two; one that was returned to counts as new."""
    runs = {1: "a", 2: "b", 3: "a", 4: "c"}
    saves = [a_save(10 * run + n, segment=run) for run in runs for n in range(2)]
    given = Given(now=NOW, configurations=runs)
    gone = [one.checkpoint.step for one in plan(saves, Rules(keep_hashes=2), given).drop]
    assert gone == [21, 20]
    assert [one.checkpoint.segment for one in plan(saves, Rules(keep_hashes=1), given).keep] == [4, 4]
    said = [*saves, a_save(99, segment=4, meta={"experiment_hash": "f00d"})]
    assert [one.checkpoint.step for one in plan(said, Rules(keep_hashes=1), given).keep] == [99]


@pytest.mark.parametrize(("best", "last"), [(True, True), (True, False), (False, True), (False, False)])
def test_with_either_switch_off_the_others_file_survives(best: bool, last: bool) -> None:  # noqa: FBT001 - a table
    """M009: the four combinations of save_best and save_last."""
    saves = [a_save(step, loss=abs(step - 3)) for step in range(1, 10)]
    rule = {"metric": "loss", "mode": "min"}
    kept = [
        one.checkpoint.step
        for one in planned(saves, Rules(keep_last=2, keep_best=rule, save_best=best, save_last=last)).keep
    ]
    expected = {
        (True, True): [9, 8, 3],
        (True, False): [9, 3],
        (False, True): [9, 8],
        (False, False): list(range(9, 0, -1)),
    }
    assert kept == expected[best, last]


def test_best_and_last_together_are_n() -> None:
    """What save_total_limit with load_best_model_at_end means: the best is one of the N."""
    rules = Rules(keep_best={"metric": "loss", "mode": "min"}, keep_total=3)
    worse = [a_save(step, loss=float(step)) for step in range(1, 8)]
    assert [one.checkpoint.step for one in planned(worse, rules).keep] == [7, 6, 1]
    better = [a_save(step, loss=-float(step)) for step in range(1, 8)]
    assert [one.checkpoint.step for one in planned(better, rules).keep] == [7, 6, 5]


def test_what_is_not_measured_yet_waits_for_its_metric() -> None:
    rules = Rules(keep_best={"metric": "loss", "mode": "min"}, keep_unmeasured=True)
    saves = [a_save(1, loss=1.0), a_save(2, loss=2.0), a_save(3), a_save(4, loss=math.nan), a_save(5)]
    assert dropped(saves, rules) == [4, 2]
    assert why(saves, rules, 3) == ("no loss yet",)


def test_a_budget_takes_the_oldest_that_nothing_holds_and_no_more_than_it_must() -> None:
    """M101: caps only drop what no rule and no promise holds."""
    saves = [a_save(step, size_bytes=10) for step in range(1, 9)]
    holds = {saves[0].id: ["pin of uid 1000"]}
    rules = Rules(keep_every=4, drop="on_pressure", bytes_max=55)
    assert dropped(saves, rules, holds) == [5, 3, 2]
    assert planned(saves, rules, holds).keep[1].spare
    assert dropped(saves, Rules(bytes_max=55), holds) == [4, 3, 2], "a budget alone is a rule"
    assert dropped(saves, Rules(keep_every=1, bytes_max=1)) == [], "what a rule keeps stays, however large"


def test_what_no_rule_keeps_stays_on_pressure_only_until_something_needs_its_room() -> None:
    saves = [a_save(step) for step in range(1, 5)]
    rules = Rules(keep_last=2, drop="on_pressure")
    assert dropped(saves, rules) == []
    assert why(saves, rules, 1) == ("nothing needs its room",)


def test_optimizer_states_are_stripped_of_all_but_the_newest_and_never_of_what_is_held() -> None:
    rules = Rules(strip_after=2, keep_best={"metric": "loss", "mode": "min"}, drop="on_pressure")
    saves = [a_save(step, loss=float(step)) for step in range(1, 8)]
    given = Given(
        now=NOW, holds={saves[2].id: ["pin of uid 1"]}, strippable={one.id for one in saves if one is not saves[3]}
    )
    assert [one.step for one in plan(saves, rules, given).strip] == [5, 2]


def test_a_plans_digest_names_what_it_does_whatever_the_order() -> None:
    """M100: what a person saw can be named when it is to be done."""
    saves = [a_save(step) for step in range(5)]
    seen = digest([planned(saves, LAST_2)])
    assert seen == digest([planned(saves[::-1], LAST_2)])
    assert seen != digest([planned(saves, Rules(keep_last=3))])
    given = Given(now=NOW, strippable={one.id for one in saves})
    assert seen != digest([plan(saves, Rules(keep_last=2, strip_after=1), given)])


@pytest.mark.parametrize("name", ["votes", "newest_reason"])
def test_a_plan_that_breaks_a_promise_is_never_returned(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The check is not the decision written twice: break the decision and it says so."""
    saves = [a_save(step, loss=float(step)) for step in range(5)]
    rules = Rules(keep_every=3) if name == "newest_reason" else Rules(keep_best={"metric": "loss", "mode": "min"})
    monkeypatch.setattr(decide, name, lambda *_: {})
    with pytest.raises(Bug, match="R1"):
        planned(saves, rules)


def test_a_plan_that_drops_what_is_held_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    saves = [a_save(step) for step in range(5)]
    monkeypatch.setattr(decide, "_decide", lambda *_: Plan((), tuple(Dropped(one, "") for one in saves)))
    with pytest.raises(Bug, match="R1, R2"):
        planned(saves, LAST_2, {saves[0].id: ["pin"]})


def test_a_plan_that_strips_what_is_held_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    saves = [a_save(step) for step in range(5)]
    monkeypatch.setattr(decide, "_to_strip", lambda *_: tuple(saves))
    with pytest.raises(Bug, match="R1, R2"):
        planned(saves, LAST_2, {saves[0].id: ["pin"]})
