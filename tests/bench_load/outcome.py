"""One target beside what was measured, and the arithmetic behind it. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORDS = {True: "yes", False: "NO", None: "-"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row of the report. `met` is None where there is no target, or where nothing could be measured."""

    what: str
    target: str
    measured: str
    met: bool | None
    runs: int
    note: str = ""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of all values do not exceed.

    >>> percentile([3.0, 1.0, 2.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True)
class Limit:
    """An upper bound: of which figure, how much, in which unit."""

    name: str
    most: float
    unit: str

    def spell(self, value: float) -> str:
        """Write a value of this figure."""
        return f"{self.name} {value:,.3g} {self.unit}" if abs(value) < 1000 else f"{self.name} {value:,.0f} {self.unit}"


def bounded(what: str, found: Iterable[tuple[Limit, float]], runs: int, note: str = "") -> Outcome:
    """Compare figures with their upper bounds; the row is met when all of them are."""
    pairs = list(found)
    return Outcome(
        what=what,
        target=", ".join(f"{limit.name} ≤ {limit.most:,.4g} {limit.unit}" for limit, _ in pairs),
        measured=", ".join(limit.spell(value) for limit, value in pairs),
        met=all(value <= limit.most for limit, value in pairs),
        runs=runs,
        note=note,
    )


def told(what: str, measured: str, runs: int, note: str = "") -> Outcome:
    """Say a figure that has no target of its own."""
    return Outcome(what=what, target="-", measured=measured, met=None, runs=runs, note=note)


def impossible(what: str, target: str, why: str) -> Outcome:
    """Say why a row could not be measured."""
    return Outcome(what=what, target=target, measured="not measured", met=None, runs=0, note=why)


def milliseconds(took_s: Sequence[float], p50_ms: float | None, p99_ms: float) -> list[tuple[Limit, float]]:
    """Return the pairs that `bounded` takes for answer times; without a bound for the median it is left out."""
    found = [(Limit("p99", p99_ms, "ms"), percentile(took_s, 0.99) * 1e3)]
    if p50_ms is not None:
        found.insert(0, (Limit("p50", p50_ms, "ms"), percentile(took_s, 0.5) * 1e3))
    return found
