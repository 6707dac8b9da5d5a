"""Which checkpoint is best."""

import math
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from ckptd.best import best
from ckptd.bestrule import BestRule, Term
from ckptd.model import Checkpoint, Level, Origin, State

LOSS = BestRule(metric="loss", mode="min", k=2)


def a_save(step: int | None, loss: float | None = None, **more: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "id": f"{step}-{more.get('revision', 1)}",
        "experiment_id": "e",
        "project": "p",
        "experiment": "e",
        "state": State.LIVE,
        "level": Level.VERIFIED,
        "origin": Origin.MEMORY,
        "root": "/r",
        "path": f"/r/{step}",
        "step": step,
        "epoch": None,
        "revision": 1,
        "size_bytes": 1,
        "format": "safetensors",
        "created_at": datetime(2030, 1, 1, tzinfo=UTC),
        "metrics": {} if loss is None else {"loss": loss},
        "sequence": 0 if step is None else step,
    }
    return Checkpoint(**{**values, **more})


def steps(found: Any) -> list[int | None]:
    return [winner.checkpoint.step for winner in found]


def test_the_direction_is_the_rules() -> None:
    """Row 3 of the list: a metric called "loss" may well be one to maximise."""
    saves = [a_save(1, 3.0), a_save(2, 1.0), a_save(3, 2.0)]
    assert steps(best(saves, LOSS)) == [2, 3]
    assert steps(best(saves, BestRule(metric="loss", mode="max"))) == [1]


def test_nan_infinity_and_missing_are_never_best() -> None:
    """Rows 4 and 5: a missing metric is not 0, and -inf is not a good loss."""
    saves = [a_save(1, math.nan), a_save(2, -math.inf), a_save(3, math.inf), a_save(4), a_save(5, 9.0)]
    assert steps(best(saves, LOSS)) == [5]
    assert steps(best(saves, BestRule(metric="loss", mode="max", k=9))) == [5]
    assert best(saves[:4], LOSS) == ()


def test_of_equal_values_the_earlier_step_wins() -> None:
    saves = [a_save(30, 1.0), a_save(4, 1.0, revision=2), a_save(4, 1.0), a_save(None, 1.0), a_save(5, 1.0)]
    found = best(saves, BestRule(metric="loss", mode="min", k=9))
    assert [winner.checkpoint.id for winner in found] == ["None-1", "4-1", "4-2", "5-1", "30-1"]


@pytest.mark.parametrize(
    "worse",
    [
        {"update_best": False},
        {"level": Level.DURABLE},
        {"state": State.CORRUPT},
        {"state": State.MISSING},
        {"state": State.TRASHED},
        {"state": State.PENDING, "level": Level.STAGED},
    ],
)
def test_only_what_is_live_and_verified_and_meant_to_counts(worse: dict[str, Any]) -> None:
    assert steps(best([a_save(1, 0.0, **worse), a_save(2, 5.0)], LOSS)) == [2]


def test_a_tiered_checkpoint_counts_as_verified() -> None:
    assert steps(best([a_save(1, 0.0, level=Level.TIERED)], LOSS)) == [1]


def test_a_later_one_takes_the_place_only_by_more_than_min_delta() -> None:
    """M102: 0.95 is better than 1.0, but not by more than 0.1; 0.8 is."""
    rule = BestRule(metric="loss", mode="min", min_delta=0.1, k=3)
    saves = [a_save(1, 1.0), a_save(2, 0.95), a_save(3, 0.8), a_save(4, 0.75)]
    assert steps(best(saves[:2], rule)) == [1, 2]
    assert steps(best(saves, rule)) == [3, 4, 2]  # the places after the first go by value


def test_what_was_retired_is_still_the_bar_for_what_comes_later() -> None:
    """M102: 0.95 does not win the place back because the 1.0 that it never passed was dropped."""
    rule = BestRule(metric="loss", mode="min", min_delta=0.1)
    gone = a_save(1, 1.0, state=State.DROPPED, verified_at=datetime(2030, 1, 1, tzinfo=UTC))
    assert steps(best([gone, a_save(2, 0.95), a_save(3, 0.88)], rule)) == [3]
    assert steps(best([a_save(2, 0.95), a_save(3, 0.88)], rule)) == [2]


def test_when_the_holder_is_gone_the_best_value_stands_in_until_another_passes() -> None:
    rule = BestRule(metric="loss", mode="min", min_delta=0.1)
    gone = a_save(3, 0.5, state=State.DROPPED, verified_at=datetime(2030, 1, 1, tzinfo=UTC))
    left = [a_save(1, 1.0), a_save(2, 0.95)]
    assert steps(best([*left, gone], rule)) == [2]
    assert steps(best([*left, gone, a_save(4, 0.45)], rule)) == [4]  # the best value there is
    assert steps(best([*left, gone, a_save(4, 0.45), a_save(5, 0.39)], rule)) == [5]


def weighted(*terms: tuple[str, str, float, float], **more: Any) -> BestRule:
    made = tuple(Term(metric=m, mode=mode, weight=w, scale=s) for m, mode, w, s in terms)  # type: ignore[arg-type]
    return BestRule(name="both", by="weighted", terms=made, **more)


def test_a_weighted_rule_counts_in_units_of_its_own_scales() -> None:
    """M103: 0.01 of accuracy is worth 0.1 of loss, whatever the other checkpoints are."""
    rule = weighted(("loss", "min", 1.0, 0.1), ("acc", "max", 1.0, 0.01))
    saves = [
        a_save(1, metrics={"loss": 1.0, "acc": 0.90}),
        a_save(2, metrics={"loss": 1.1, "acc": 0.92}),
        a_save(3, metrics={"loss": 0.2}),
    ]
    (winner,) = best(saves, rule)
    assert winner.checkpoint.step == 2
    assert winner.value == pytest.approx(11.0 - 92.0)
    assert steps(best(saves, weighted(("loss", "min", 3.0, 0.1), ("acc", "max", 1.0, 0.01)))) == [1]


def test_a_sum_that_overflows_can_not_be_compared() -> None:
    rule = weighted(("loss", "min", 1e300, 1.0), ("acc", "max", 1.0, 1.0))
    assert best([a_save(1, metrics={"loss": 1e300, "acc": 0.0})], rule) == ()


def test_a_lexicographic_rule_asks_the_second_metric_only_in_a_tie() -> None:
    """M103: accuracies in the same hundredth are a tie, and then the smaller model wins."""
    terms = (Term(metric="acc", mode="max", tolerance=0.01), Term(metric="size", mode="min"))
    rule = BestRule(name="small", by="lexicographic", terms=terms)
    big, small = {"acc": 0.958, "size": 9.0}, {"acc": 0.951, "size": 3.0}
    assert steps(best([a_save(1, metrics=big), a_save(2, metrics=small)], rule)) == [2]
    assert steps(best([a_save(1, metrics=big), a_save(2, metrics=small | {"acc": 0.949})], rule)) == [1]


def pareto(k: int | None = None) -> BestRule:
    terms = (Term(metric="loss", mode="min"), Term(metric="acc", mode="max"))
    return BestRule(name="front", by="pareto", terms=terms, k=k)


def at(step: int, loss: float, acc: float, **more: Any) -> Checkpoint:
    return a_save(step, metrics={"loss": loss, "acc": acc}, **more)


def test_a_pareto_set_holds_all_that_nothing_else_beats() -> None:
    """M103: 3 is worse than 2 in both; 5 equals 4 and came later."""
    saves = [at(1, 1.0, 0.5), at(2, 2.0, 0.7), at(3, 2.5, 0.6), at(4, 3.0, 0.9), at(5, 3.0, 0.9)]
    assert steps(best(saves, pareto())) == [1, 2, 4]


def test_of_a_pareto_set_k_far_from_one_another_are_kept() -> None:
    """M103: the best loss first, then always the one with most room around it."""
    saves = [at(1, 0.0, 0.0), at(2, 0.1, 0.1), at(3, 5.0, 5.0), at(4, 9.0, 9.0), at(5, 9.1, 9.1)]
    assert steps(best(saves, pareto(k=3))) == [1, 5, 3]
    assert steps(best(saves, pareto(k=9))) == [1, 5, 3, 2, 4]


def test_a_pareto_set_of_k_is_not_reopened_by_dropping_what_it_left_out() -> None:
    gone = at(2, 0.1, 0.2, state=State.DROPPED, verified_at=datetime(2030, 1, 1, tzinfo=UTC))
    beaten = at(6, 0.2, 0.1)
    assert steps(best([at(1, 0.0, 0.0), gone, beaten, at(4, 9.0, 9.0)], pareto(k=3))) == [1, 4]
    assert steps(best([gone, beaten], pareto(k=3))) == [6]  # nothing of the set is there: what is there counts


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({}, "names its `metric`"),
        ({"metric": "loss"}, "mode of 'loss' is missing"),
        ({"metric": "loss", "mode": "down"}, "'min' or 'max'"),
        ({"by": "weighted", "terms": [{"metric": "a", "mode": "min"}] * 2}, "needs a `name`"),
        ({"name": "r", "by": "weighted", "terms": [{"metric": "a", "mode": "min"}]}, "two `terms` or more"),
        ({"name": "r", "by": "pareto", "terms": [{"metric": "a", "mode": "min"}] * 2}, "name a twice"),
        ({"name": "r", "by": "pareto", "metric": "a", "mode": "min"}, "takes its metrics"),
        ({"metric": "a", "mode": "min", "terms": [{"metric": "b", "mode": "min"}]}, "`terms` needs by"),
        (
            {"name": "r", "by": "pareto", "terms": [{"metric": "a", "mode": "min", "weight": 2}]},
            "two `terms` or more",
        ),
        (
            {
                "name": "r",
                "by": "pareto",
                "terms": [{"metric": "a", "mode": "min", "weight": 2}, {"metric": "b", "mode": "min"}],
            },
            "weight of 'a' means nothing",
        ),
        (
            {
                "name": "r",
                "by": "pareto",
                "min_delta": 1,
                "terms": [{"metric": "a", "mode": "min"}, {"metric": "b", "mode": "min"}],
            },
            "min_delta means nothing",
        ),
        ({"metric": "loss", "mode": "min", "min_delta": float("nan")}, "finite"),
        ({"metric": "loss", "mode": "min", "k": 0}, "greater than or equal to 1"),
    ],
)
def test_a_rule_that_means_nothing_is_an_error_that_says_why(written: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        BestRule.model_validate(written)


def test_a_rule_is_called_by_its_metric_unless_it_has_a_name() -> None:
    assert LOSS.name == "loss"
    assert BestRule(metric="loss", mode="min", name="steady").name == "steady"
    assert str(pareto()) == "best all by front (pareto: loss min, acc max)"
    assert str(BestRule(metric="l", mode="min", min_delta=0.5, scope="project", k=2)) == (
        "best 2 by l (min, by more than 0.5) of the project"
    )
