"""From measurements to ratios: pure functions over the rows that cases wrote."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GroupKey = tuple[int, str]  # size in bytes, shape
GB = 1 << 30


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """Return median and extremes; None for no value at all."""
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1], len(found)) if found else None


def read(path: Path) -> list[Row]:
    """Return all rows of a result file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def raw_limit_s(row: Row) -> float:
    """What bounds the way to the disk: the slower of raw write+fsync and SHA-256."""
    return max(float(row["write_s"]), float(row["sha256_s"]))


def loop_ratio(row: Row) -> float:
    """Wall time of a loop with one save over the same steps undisturbed."""
    return float(row["wall_s"]) / (int(row["steps"]) * float(row["step_s"]))


@dataclass(frozen=True)
class Figure:
    """One column: which rows it is made of, and what each of them contributes."""

    name: str
    title: str
    kind: str
    value: Callable[[Row], float | None]


def _second_ratio(row: Row) -> float | None:
    """A stall counts only when both saves could be loaded back: losing one of them is no feat."""
    return float(row["stall_s"]) / row["memcpy_s"] if set(row["outcomes"]) == {"exact"} else None


def _saved(row: Row, *, first: bool) -> bool:
    return (int(row["index"]) == 0) == first


FIGURES = [
    Figure("first", "first save", "save", lambda r: r["stall_s"] / r["memcpy_s"] if _saved(r, first=True) else None),
    Figure("warm", "warm save", "save", lambda r: r["stall_s"] / r["memcpy_s"] if _saved(r, first=False) else None),
    Figure("second", "second save at once", "second", _second_ratio),
    Figure(
        "durable_first",
        "durable, first",
        "save",
        lambda r: r["durable_s"] / raw_limit_s(r) if _saved(r, first=True) else None,
    ),
    Figure(
        "durable",
        "durable, warm",
        "save",
        lambda r: r["durable_s"] / raw_limit_s(r) if _saved(r, first=False) else None,
    ),
    Figure("cpu", "CPU", "save", lambda r: r["cpu_s"] / r["limit_cpu_s"] if _saved(r, first=False) else None),
    Figure(
        "cpu_verified",
        "CPU until verified",
        "save",
        lambda r: r["verified_cpu_s"] / r["limit_cpu_s"] if "verified_s" in r and r["index"] else None,
    ),
    Figure(
        "step",
        "step while persisting",
        "loop",
        lambda r: statistics.median(r["disturbed_s"]) / r["step_s"] if r["disturbed_s"] else None,
    ),
    Figure("loop", "loop with a save", "loop", loop_ratio),
    Figure("cold", "cold load", "load", lambda r: r["cold_s"] / max(r["read_s"], r["sha256_s"])),
    Figure("hot", "hot load, times faster than torch.load", "load", lambda r: r["torch_load_s"] / r["hot_s"]),
    Figure("memory", "peak memory", "memory", lambda r: r["peak_bytes"] / r["size_bytes"]),
]
CPU_S_PER_GB = Figure(
    "cpu_s", "CPU s/GB", "save", lambda r: r["cpu_s"] / (r["size_bytes"] / GB) if r["index"] else None
)


def summarise(rows: list[Row], figures: list[Figure]) -> dict[GroupKey, dict[str, dict[str, Spread | None]]]:
    """Return group -> peer -> figure name -> spread, groups and peers in the order of first mention."""
    sorted_rows: dict[GroupKey, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        sorted_rows[row["size_bytes"], row["shape"]][row["peer"]].append(row)
    return {
        group: {
            peer: {figure.name: spread(_values(found, figure)) for figure in figures} for peer, found in peers.items()
        }
        for group, peers in sorted_rows.items()
    }


def _values(rows: list[Row], figure: Figure) -> list[float]:
    values = (figure.value(row) for row in rows if row["kind"] == figure.kind)
    return [value for value in values if value is not None]


def failures(rows: list[Row]) -> dict[str, list[str]]:
    """Return, for each peer, everything that was not exact, each sentence once."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for what, outcome in _outcomes(row):
            sentence = f"{what}: {outcome}"
            if outcome not in {"exact", "ok"} and sentence not in found[row["peer"]]:
                found[row["peer"]].append(sentence)
    return {peer: sentences for peer, sentences in found.items() if sentences}


def _outcomes(row: Row) -> list[tuple[str, str]]:
    if row["kind"] == "second":
        return list(
            zip(("two saves at once, the first", "two saves at once, the second"), row["outcomes"], strict=True)
        )
    if row["kind"] == "load":
        return list(zip(("cold load", "hot load"), row["outcomes"], strict=True))
    if row["kind"] == "loop":
        return [("a save in a training loop", outcome) for outcome in [*row["problems"], row["outcome"]]]
    if row["kind"] == "save":
        return [("a save on its own", row["outcome"])]
    return [("the whole case", row["outcome"])] if row["kind"] == "outcome" else []


def counted_exact(rows: list[Row], peer: str) -> tuple[int, int]:
    """Return how many of a peer's saves and loads were exact, and how many were tried."""
    outcomes = [
        outcome for row in rows if row["peer"] == peer and row["kind"] != "outcome" for _, outcome in _outcomes(row)
    ]
    return sum(outcome == "exact" for outcome in outcomes), len(outcomes)
