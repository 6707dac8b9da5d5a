"""Which of two checkpoints is newer: by training time for counts, by the wall clock for calendars alone."""

from collections.abc import Sequence
from datetime import datetime

from ckptd.model import Checkpoint


def newness(checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    """Return the sort key of training time: numbers, never text, never a clock.

    A later execution (segment) is newer whatever its steps: it went on from an earlier step because
    what came after that was abandoned. `latest` sorts the same way. No step comes before all steps.
    """
    step = -1 if checkpoint.step is None else checkpoint.step
    return checkpoint.segment, step, checkpoint.revision, checkpoint.sequence


def newest(good: Sequence[Checkpoint]) -> Checkpoint:
    """Return the newest; ValueError of none."""
    return max(good, key=newness)


def by_clock(good: Sequence[Checkpoint], now: datetime) -> list[Checkpoint]:
    """Return those that were not saved in the future, newest first by the time of their saving."""
    past = [one for one in good if not is_future(one, now)]
    return sorted(past, key=lambda one: (one.created_at, newness(one)), reverse=True)


def is_future(checkpoint: Checkpoint, now: datetime) -> bool:
    """Whether it was saved after `now`: then a clock is, or was, wrong, and no rule about time says anything of it."""
    return checkpoint.created_at > now
