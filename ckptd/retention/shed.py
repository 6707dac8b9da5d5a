"""Which checkpoints a budget or a full disk takes: spare ones only, the oldest arrival first, no more than needed.

Order of arrival, not age: clocks differ between nodes and jump, the catalog's sequence does not.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ckptd.model import Checkpoint, State


@dataclass(frozen=True, slots=True)
class Spare:
    """A checkpoint that no rule and no promise holds. `is_running`: its experiment's process lives."""

    checkpoint: Checkpoint
    is_running: bool = False


def shed(spare: Iterable[Spare], excess_bytes: int) -> tuple[Spare, ...]:
    """Return what must go so that `excess_bytes` come free, as far as there is any.

    Of experiments that still run last: what they save now is what somebody is waiting for.
    """
    taken = []
    for one in sorted(spare, key=lambda each: (each.is_running, each.checkpoint.sequence, each.checkpoint.id)):
        if excess_bytes <= 0:
            break
        taken.append(one)
        excess_bytes -= on_disk(one.checkpoint)
    return tuple(taken)


def on_disk(checkpoint: Checkpoint) -> int:
    """Return the bytes that it takes up; none where no file of it has its final name."""
    return checkpoint.size_bytes if checkpoint.state in {State.LIVE, State.CORRUPT} else 0
