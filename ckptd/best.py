"""Which checkpoints are the best of an experiment. Pure: no clock, no disk, no catalog."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptd.config import BestRule
from ckptd.model import Checkpoint


@dataclass(frozen=True, slots=True)
class Winner:
    """A checkpoint and the value it won with."""

    checkpoint: Checkpoint
    value: float


def best(checkpoints: Iterable[Checkpoint], rule: BestRule) -> tuple[Winner, ...]:
    """Return the K best checkpoints by one metric, best first.

    Only what is live and verified, was saved with update_best, and has a finite value takes part:
    a missing metric is not comparable, and NaN or an infinity is never the best. Of equal values
    the earlier (step, revision, sequence) wins, so a later save must be better to take the place.
    """
    sign = 1.0 if rule.mode == "min" else -1.0
    found = [Winner(one, one.metrics[rule.metric]) for one in checkpoints if _takes_part(one, rule.metric)]
    found.sort(key=lambda winner: (sign * winner.value, _seniority(winner.checkpoint)))
    return tuple(found[: rule.k])


def best_by_rule(checkpoints: Sequence[Checkpoint], rules: Iterable[BestRule]) -> dict[BestRule, tuple[Winner, ...]]:
    """Apply several rules, each on its own."""
    return {rule: best(checkpoints, rule) for rule in rules}


def _seniority(checkpoint: Checkpoint) -> tuple[int, int, int]:
    return -1 if checkpoint.step is None else checkpoint.step, checkpoint.revision, checkpoint.sequence


def _takes_part(checkpoint: Checkpoint, metric: str) -> bool:
    value = checkpoint.metrics.get(metric)
    return value is not None and math.isfinite(value) and checkpoint.is_good and checkpoint.update_best
