"""The end of a soak in words, as a file, and as an exit status."""

import json
import statistics
from dataclasses import asdict
from pathlib import Path

from tests.soak.slope import percent_per_hour
from tests.soak.soak import Outcome

JUDGED_S = 20 * 60.0  # a shorter run's slope is told, not judged
SLOPE_MAX = 1.0  # percent per hour
DESCRIPTORS_MORE = 2
POINTS_MIN = 4
COURSE = 6
SHOWN_MAX = 50  # violations; the file has them all


def slope(outcome: Outcome) -> tuple[float, float, float] | None:
    """Return percent per hour of the lasting memory at rest, and its bounds; None for too few samples."""
    steady = [one for one in outcome.at_rest if one.at_s >= outcome.steady_from_s]
    points = [(one.at_s, float(one.lasting_bytes)) for one in steady]
    return percent_per_hour(points) if len(points) >= POINTS_MIN else None


def leaked(outcome: Outcome) -> int:
    """How many descriptors more than at the base there are at the end."""
    return 0 if outcome.base is None or outcome.end is None else outcome.end.descriptors - outcome.base.descriptors


def verdict(outcome: Outcome) -> list[str]:
    """Return why the run failed; [] when it did not."""
    why = [f"{len(outcome.violations)} violations"] if outcome.violations else []
    found = slope(outcome)
    if found is not None and outcome.plan.seconds >= JUDGED_S and found[0] > SLOPE_MAX:
        why.append(f"memory grows by {found[0]:.2f} % per hour")
    if leaked(outcome) > DESCRIPTORS_MORE:
        why.append(f"{leaked(outcome)} descriptors more than at the base")
    return why


def render(outcome: Outcome) -> str:
    """Say it all."""
    found = slope(outcome)
    grown = (
        "too few samples at rest"
        if found is None
        else f"{found[0]:+.2f} %/h (95 %: {found[1]:+.2f} to {found[2]:+.2f})"
    )
    judged = "" if outcome.plan.seconds >= JUDGED_S else ", not judged in so short a run"
    rows = [
        ("seed", str(outcome.plan.seed)),
        ("time", f"{outcome.took_s / 60:.1f} min, {outcome.phases} phases"),
        (
            "saves",
            f"{outcome.saves} ({outcome.refused} refused, {outcome.of_unknown_fate} of unknown fate with their trainer)",
        ),
        ("legacy files written", str(outcome.files)),
        ("restores compared", str(outcome.restores)),
        *((f"fault: {name}", str(count)) for name, count in sorted(outcome.faults.items())),
        ("violations", str(len(outcome.violations))),
        ("memory slope (anonymous, at rest)", grown + judged),
        *(("", each) for each in _course(outcome)),
        ("of it in use by the daemon", _in_use(outcome, "in_use_bytes")),
        ("of that SQLite's", _in_use(outcome, "sqlite_bytes")),
        ("descriptors", _pair(outcome, "descriptors")),
        *(("", _pair(outcome, "descriptors_by_role")) for _ in range(leaked(outcome) > 0)),
        ("threads", _pair(outcome, "threads")),
        ("memory", _mib(outcome)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, *(f"violation: {each}" for each in outcome.violations[:SHOWN_MAX])])


def _pair(outcome: Outcome, name: str) -> str:
    if outcome.base is None or outcome.end is None:
        return "not measured"
    return f"{getattr(outcome.base, name)} at the base, {getattr(outcome.end, name)} at the end"


def _in_use(outcome: Outcome, name: str) -> str:
    """Tell a leak from gaps in memory that nothing fits into, and from caches that fill: these figures say which it is."""
    points = [(one.at_s, float(getattr(one, name))) for one in outcome.at_rest if one.at_s >= outcome.steady_from_s]
    if len(points) < POINTS_MIN or not all(size for _, size in points):
        return "not measured"
    per_hour, low, high = percent_per_hour(points)
    middle = statistics.median(size for _, size in points) / 2**20
    return f"{per_hour:+.2f} %/h of {middle:,.1f} MiB (95 %: {low:+.2f} to {high:+.2f})"


def _course(outcome: Outcome) -> list[str]:
    """Say what it was in each sixth of the time that is judged: a slope alone does not tell a leak from a cache that fills."""
    steady = [one for one in outcome.at_rest if one.at_s >= outcome.steady_from_s]
    if len(steady) < COURSE:
        return []
    parts = [steady[len(steady) * n // COURSE : len(steady) * (n + 1) // COURSE] for n in range(COURSE)]
    middles = [statistics.median(one.lasting_bytes for one in part) / 2**20 for part in parts]
    return ["medians, one after the other: " + ", ".join(f"{each:.1f}" for each in middles) + " MiB"]


def _mib(outcome: Outcome) -> str:
    every = [*outcome.samples, *outcome.at_rest]
    if not every:
        return "not measured"
    peak, arenas = max(one.rss_bytes for one in every), max(one.arenas_bytes for one in every)
    return f"RSS at most {peak >> 20} MiB, arenas at most {arenas >> 20} MiB"


def keep(outcome: Outcome, path: Path) -> None:
    """Write it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = slope(outcome)
    whole = {**asdict(outcome), "slope_percent_per_hour": found, "verdict": verdict(outcome)}
    path.write_text(json.dumps(whole, indent=1) + "\n")
