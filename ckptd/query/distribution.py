"""Durations of any number in a few hundred bytes: counts on a logarithmic scale, and percentiles read off them."""

import math
from array import array
from collections.abc import Sequence

STEPS_PER_DOUBLING = 4
LOWEST_S = 1e-4
BUCKETS = 96  # up to LOWEST_S * 2 ** 24: 28 minutes; what takes longer is counted in the last one
# A percentile is the middle of its bucket: off by this factor at most, between LOWEST_S and the top.
ERROR = 2 ** (1 / (2 * STEPS_PER_DOUBLING))


class Distribution:
    """How long something took, each time. Count, sum and the two ends are exact."""

    __slots__ = ("counts", "max_s", "min_s", "sum_s")

    def __init__(self) -> None:
        """Nothing was seen."""
        self.counts = array("I", bytes(BUCKETS * array("I").itemsize))
        self.sum_s = 0.0
        self.min_s, self.max_s = math.inf, 0.0

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def add(self, took_s: float) -> None:
        """Count one. Negative times (a clock that was set) count as none at all."""
        took_s = max(took_s, 0.0)
        at = 0 if took_s < LOWEST_S else int(math.log2(took_s / LOWEST_S) * STEPS_PER_DOUBLING)
        self.counts[min(at, BUCKETS - 1)] += 1
        self.sum_s += took_s
        self.min_s, self.max_s = min(self.min_s, took_s), max(self.max_s, took_s)

    def merge(self, other: "Distribution") -> None:
        """Add what another one has seen."""
        for at, count in enumerate(other.counts):
            self.counts[at] += count
        self.sum_s += other.sum_s
        self.min_s, self.max_s = min(self.min_s, other.min_s), max(self.max_s, other.max_s)

    def percentile(self, share: float) -> float | None:
        """Return the duration that `share` (0 to 1) of them did not exceed, within a factor of ERROR; None when empty."""
        wanted = math.ceil(share * self.count) or 1
        seen = 0
        for at, count in enumerate(self.counts):
            seen += count
            if seen >= wanted:
                middle = LOWEST_S * 2 ** ((at + 0.5) / STEPS_PER_DOUBLING)
                return min(max(middle, self.min_s), self.max_s)
        return None

    def at_most(self, limits_s: Sequence[float]) -> list[int]:
        """Return how many took no longer than each of these; exact where a limit is LOWEST_S times a power of two."""
        found = []
        for limit_s in limits_s:
            end = round(math.log2(limit_s / LOWEST_S) * STEPS_PER_DOUBLING)
            found.append(sum(self.counts[: max(end, 0)]))
        return found

    def to_wire(self) -> dict[str, float | int | None]:
        """Return count, sum and the percentiles that people ask for, in seconds."""
        ends = {"min_s": None, "max_s": None} if not self.count else {"min_s": self.min_s, "max_s": self.max_s}
        percentiles = {f"p{share}_s": self.percentile(share / 100) for share in (50, 95, 99)}
        return {"count": self.count, "sum_s": self.sum_s, **ends, **percentiles}
