"""How fast something grows, told by samples of which some may be far off: Theil and Sen's slope. Pure."""

import math
import random
import statistics
from collections.abc import Sequence

PAIRS_MAX = 200_000  # more of them are drawn at random: the median hardly moves
Z = 1.96  # 95 %
SEED = 1


def theil_sen(points: Sequence[tuple[float, float]]) -> float:
    """Return the median slope of all pairs of points (x, y). ValueError for fewer than two different x."""
    slopes = _slopes(points)
    if not slopes:
        raise ValueError("a slope needs two points apart")
    return statistics.median(slopes)


def interval(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the bounds between which the slope lies with 95 %, after Sen (1968)."""
    slopes, count = _slopes(points), len(points)
    if not slopes:
        raise ValueError("a slope needs two points apart")
    pairs = count * (count - 1) / 2
    spread = Z * math.sqrt(count * (count - 1) * (2 * count + 5) / 18) / pairs * len(slopes)
    low = max(0, round((len(slopes) - spread) / 2))
    high = min(len(slopes) - 1, round((len(slopes) + spread) / 2))
    return slopes[low], slopes[high]


def percent_per_hour(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return slope and its bounds of (seconds, bytes) in percent of the median per hour."""
    middle = statistics.median(y for _, y in points) or 1.0
    return tuple(100.0 * 3600.0 * found / middle for found in (theil_sen(points), *interval(points)))  # type: ignore[return-value]


def _slopes(points: Sequence[tuple[float, float]]) -> list[float]:
    count = len(points)
    if count * (count - 1) / 2 > PAIRS_MAX:
        dice = random.Random(SEED)
        pairs = [(dice.randrange(count), dice.randrange(count)) for _ in range(PAIRS_MAX)]
    else:
        pairs = [(one, other) for one in range(count) for other in range(one)]
    return sorted(
        (points[one][1] - points[other][1]) / (points[one][0] - points[other][0])
        for one, other in pairs
        if points[one][0] != points[other][0]
    )
