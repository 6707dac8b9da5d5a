"""Which copies stay in memory after their saves are durable, and which are given up. Pure: it looks at nothing.

The order, dearest first: a copy that somebody reads (never given up); then the kinds of
`arenas.hot_policy` in the order in which the configuration names them; then the others. Within one
kind the one that was read or written last is dearer. A copy is kept while it fits into the budget
beside every dearer one that is kept.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["newest", "best", "pinned"]


@dataclass(frozen=True, slots=True)
class HotCopy:
    """One copy as the decision sees it.

    key     whose it is, for the caller
    kinds   what it is: the newest of its experiment, a best one, a pinned one
    used_s  when it was read or written last, monotonic
    """

    key: bytes
    size_bytes: int
    used_s: float
    kinds: frozenset[Kind] = frozenset()
    is_read: bool = False


def given_up(copies: Collection[HotCopy], policy: Sequence[Kind], bytes_max: int) -> list[bytes]:
    """Name the copies that have to go so that the others fit into `bytes_max`, the least dear first.

    What is being read stays, even where it alone is over the budget: then nothing else does.
    """
    left_bytes = bytes_max
    gone = []
    for copy in sorted(copies, key=lambda copy: _dearness(copy, policy)):
        if copy.is_read or copy.size_bytes <= left_bytes:
            left_bytes -= copy.size_bytes
        else:
            gone.append(copy.key)
    return gone[::-1]


def outlived(copies: Collection[HotCopy], before_s: float) -> list[bytes]:
    """Name the copies that nobody has read since `before_s`, and that nobody reads."""
    return [copy.key for copy in copies if not copy.is_read and copy.used_s < before_s]


def _dearness(copy: HotCopy, policy: Sequence[Kind]) -> tuple[bool, int, float]:
    rank = next((at for at, kind in enumerate(policy) if kind in copy.kinds), len(policy))
    return not copy.is_read, rank, -copy.used_s
