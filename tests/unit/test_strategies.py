"""Strategies by name: each is what it says, and none ever asks for the end of the best or the newest. M063"""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ckptd.best import best
from ckptd.bestrule import BestRule
from ckptd.config import Settings
from ckptd.model import Checkpoint, Level, State
from ckptd.retention import Given, newness, plan
from ckptd.rules import Rules
from ckptd.strategies import STRATEGIES, rules_of
from tests.support.saved import a_save

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SMALL = st.integers(1, 6)
METRIC = {"metric": st.just("loss"), "mode": st.sampled_from(["min", "max"])}
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "performance": {**METRIC, "keep": SMALL},
    "top_k": {**METRIC, "k": SMALL},
    "time": {"within": st.sampled_from(["1h", "2d"]), "daily": SMALL},
    "epoch": {"every": SMALL, "last": SMALL},
    "hybrid": {**METRIC, "k": SMALL, "last": SMALL, "every": SMALL},
    "size_cap": {**METRIC, "k": SMALL, "bytes_max": st.sampled_from(["1K", "1M", 1])},
}


@st.composite
def histories(draw: st.DrawFn) -> list[Checkpoint]:
    """What an experiment may have on disk: resumed, repeated, damaged, unmeasured, saved under a clock that was set."""
    values = st.sampled_from([0.1, 0.2, 0.5, float("nan"), float("inf")])
    found = [
        a_save(
            draw(st.none() | st.integers(0, 30)),
            id=f"{sequence:032x}",
            sequence=sequence,
            segment=draw(st.integers(1, 2)),
            epoch=draw(st.none() | st.integers(0, 12).map(float)),
            size_bytes=draw(st.sampled_from([1, 700, 1 << 20])),
            created_at=NOW - timedelta(hours=draw(st.integers(-30, 400))),
            state=draw(st.sampled_from([State.LIVE] * 6 + list(State))),
            level=draw(st.sampled_from([Level.VERIFIED] * 6 + list(Level))),
            metrics={"loss": draw(values)} if draw(st.booleans()) else {},
        )
        for sequence in range(draw(st.integers(0, 12)))
    ]
    return draw(st.permutations(found))


def test_every_strategy_is_searched():
    assert OPTIONS.keys() == STRATEGIES.keys()


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_strategy_drops_the_best_or_the_newest(name: str, data: st.DataObject):
    """Whatever the history, and whatever the strategy is told."""
    options = data.draw(st.fixed_dictionaries(OPTIONS[name]))
    rules = Rules.model_validate({"strategy": {"name": name, **options}})
    saves = data.draw(histories())
    gone = {one.checkpoint.id for one in plan(saves, rules, Given(now=NOW)).drop}
    good = [one for one in saves if one.is_good]
    assert gone <= {one.id for one in good}
    if good:
        assert max(good, key=newness).id not in gone
    if "metric" in options:
        rule = BestRule(metric="loss", mode=options["mode"], k=options.get("k", 1))
        assert not gone & {winner.checkpoint.id for winner in best(good, rule)}


def dropped(strategy: Any, saves: list[Checkpoint]) -> list[int | None]:
    rules = Rules.model_validate({"strategy": strategy})
    return sorted(one.checkpoint.step for one in plan(saves, rules, Given(now=NOW)).drop)


def test_performance_keeps_the_best_half_and_the_newest_half():
    saves = [a_save(step, loss=abs(step - 3.1)) for step in range(1, 11)]
    strategy = {"name": "performance", "metric": "loss", "mode": "min", "keep": 4}
    assert dropped(strategy, saves) == [1, 2, 5, 6, 7, 8]


def test_top_k_keeps_the_best_and_the_one_to_go_on_from():
    saves = [a_save(step, loss=abs(step - 3.1)) for step in range(1, 9)]
    assert dropped({"name": "top_k", "metric": "loss", "mode": "min", "k": 2}, saves) == [1, 2, 5, 6, 7]


def test_epoch_keeps_milestones_and_the_newest():
    saves = [a_save(step, epoch=float(step)) for step in range(1, 13)]
    assert dropped({"name": "epoch", "every": 5, "last": 1}, saves) == [1, 2, 3, 4, 6, 7, 8, 9, 11]


def test_time_keeps_the_last_day_and_one_of_each_before():
    saves = [a_save(step, created_at=NOW - timedelta(hours=200 - step)) for step in range(0, 200, 6)]
    left = {one.step for one in saves} - set(dropped({"name": "time", "within": "1d", "daily": 3}, saves))
    assert {step for step in left if step > 174} == {one.step for one in saves if one.step > 174}
    assert len([step for step in left if step <= 174]) <= 3


def test_hybrid_is_all_of_them():
    saves = [a_save(step, epoch=float(step), loss=abs(step - 3.1)) for step in range(1, 13)]
    strategy = {"name": "hybrid", "metric": "loss", "mode": "min", "every": 5, "last": 2}
    assert dropped(strategy, saves) == [1, 2, 4, 6, 7, 8, 9]


def test_a_strategy_by_its_name_alone_needs_no_table():
    assert Rules.model_validate({"strategy": "epoch"}) == Rules.model_validate(
        {"keep_every": {"epochs": 25}, "keep_last": 3}
    )


def test_a_strategy_may_stand_in_any_table_of_rules():
    settings_ = Settings.model_validate(
        {
            "retention": {"strategy": {"name": "top_k", "metric": "acc", "mode": "max"}, "trash_grace_s": "2h"},
            "experiments": [{"name": "sweep*", "strategy": "time"}],
        }
    )
    assert settings_.retention.keep_best[0].metric == "acc"
    assert settings_.rules_for("p", "sweep7").keep_daily == 7


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("greedy", "performance, top_k"),
        ({"name": "top_k"}, "missing.*metric"),
        ({"name": "top_k", "metric": "acc", "mode": "best"}, "never guessed"),
        ({"name": "epoch", "every": 0}, "at least 1"),
        ({"name": "epoch", "color": 1}, "color"),
        ({"metric": "acc"}, "no strategy None"),
    ],
)
def test_a_wrong_strategy_is_refused_with_what_there_is(strategy: Any, said: str):
    with pytest.raises(ValueError, match=said):
        rules_of(strategy)
    with pytest.raises(ValidationError, match=said):
        Rules.model_validate({"strategy": strategy})


def test_a_strategy_and_a_rule_that_contradict_one_another_are_refused():
    with pytest.raises(ValidationError, match="contradict"):
        Rules.model_validate({"strategy": "epoch", "keep_last": 7})
