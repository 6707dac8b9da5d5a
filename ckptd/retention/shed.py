"""Which checkpoints a budget or a full disk takes: spare ones only, the oldest arrival first, no more than needed.

Order of arrival, not age: clocks differ between nodes and jump, the catalog's sequence does not.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ckptd.model import Checkpoint, State


@dataclass(frozen=True, slots=True)
class Spare:
    """A checkpoint that no rule and no promise holds.

    is_running  its experiment's process lives
    is_braked   the rules drop it, and the brake holds the plan: a person may yet say that the rule was wrong
    """

    checkpoint: Checkpoint
    is_running: bool = False
    is_braked: bool = False


def shed(spare: Iterable[Spare], excess_bytes: int) -> tuple[Spare, ...]:
    """Return what must go so that `excess_bytes` come free, as far as there is any.

    Of experiments that still run late: what they save now is what somebody is waiting for. What the brake holds last.
    """
    taken = []
    for one in sorted(spare, key=_order):
        if excess_bytes <= 0:
            break
        taken.append(one)
        excess_bytes -= on_disk(one.checkpoint)
    return tuple(taken)


def _order(one: Spare) -> tuple[bool, bool, int, str]:
    return one.is_braked, one.is_running, one.checkpoint.sequence, one.checkpoint.id


def on_disk(checkpoint: Checkpoint) -> int:
    """Return the bytes that it takes up; none where no file of it has its final name."""
    return checkpoint.size_bytes if checkpoint.state in {State.LIVE, State.CORRUPT} else 0
