"""Which checkpoint is best."""

import math
from datetime import UTC, datetime
from typing import Any

import pytest

from ckptd.best import best, best_by_rule
from ckptd.config import BestRule
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


def test_several_rules_are_decided_each_on_its_own() -> None:
    acc = BestRule(metric="acc", mode="max")
    saves = [a_save(1, 1.0, metrics={"loss": 1.0, "acc": 0.1}), a_save(2, metrics={"acc": 0.2})]
    found = best_by_rule(saves, [LOSS, acc])
    assert {rule.metric: steps(winners) for rule, winners in found.items()} == {"loss": [1], "acc": [2]}
