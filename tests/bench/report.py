"""The report: what was measured, as a page that a person reads from the top."""

import os
import platform
from pathlib import Path

from tests.bench.figures import (
    CPU_S_PER_GB,
    FIGURES,
    GB,
    Figure,
    GroupKey,
    Row,
    Spread,
    counted_exact,
    failures,
    read,
    spread,
    summarise,
)

__all__ = ["read", "render"]

OURS = ("ckptd", "ckptd-unprepared")
NOT_COMPARABLE = {"orbax"}

# What docs promise for ckptd: the figure, at most (or at least) how much, and for which states.
PROMISES = [
    ("warm save, over memcpy", "ckptd", "warm", 1.10, "large"),
    ("first save after prepare(), over memcpy", "ckptd", "first", 1.5, "large"),
    ("first save without prepare(), over memcpy", "ckptd-unprepared", "first", 8.0, "large"),
    ("second save while the first is in flight, over memcpy", "ckptd", "second", 1.10, "large"),
    ("warm save of 5,000 tensors, over one memcpy", "ckptd", "warm", 1.3, "small"),
    ("time to durable, over the slower of raw write+fsync and SHA-256", "ckptd", "durable", 1.2, "large"),
    ("CPU of all processes until durable, over copy+write+SHA-256", "ckptd", "cpu", 1.15, "large"),
    ("training step while a save is persisted, over an undisturbed one", "ckptd", "step", 1.25, "large"),
    ("cold verified load, over the slower of disk read and SHA-256", "ckptd", "cold", 1.2, "large"),
    ("hot load, times faster than torch.load", "ckptd", "hot", -50.0, "large"),
]

Summary = dict[str, dict[str, Spread | None]]

INTRODUCTION = """# Benchmarks

Made by `make bench` (`tests/bench/`); every number is from one run on one machine. All figures are
**ratios against what the machine could do at that moment**, measured in the same process: absolute
times of a virtual machine say little about yours. Each cell is a median, with the lowest and highest
value behind it where there were several.

![The same figures as bars](benchmarks.svg)

How to read the columns, smaller being better unless said otherwise:

- **first save, warm save**: how long `save()` keeps the training loop from changing its tensors, over
  one single-threaded memcpy of the same bytes into a warm buffer. 1.0 is the floor of one thread.
- **second save at once**: the same for a save that comes while the one before it is still in flight;
  no figure where one of the two was lost, torn or failed (see the end of the page).
- **durable**: from the call of `save()` until the bytes are fsynced, over the slower of a raw O_DIRECT
  write with fsync and SHA-256 of the same bytes. Only ckptd hashes what it writes. For peers that
  never fsync, the benchmark fsyncs their files and counts it (marked °).
- **CPU**: CPU seconds of the whole process tree (ckptd: trainer, daemon and workers) from the call of a
  warm save until durable, over those of one copy, one raw write and one SHA-256.
- **CPU until verified**: the same until ckptd has read everything back and compared.
- **step while persisting**: a training step that computes on all cores and changes the whole state,
  while a save is on its way to the disk, over an undisturbed one.
- **loop with a save**: wall time of a loop of such steps with one save at its start, over the same
  number of undisturbed steps. It includes the stall.
- **cold load**: load from the disk with an empty page cache, over the slower of a raw disk read and
  SHA-256. Only ckptd checks content while loading.
- **hot load**: `torch.load` of the same state, warm, over this load, warm: *larger is better*. Mappings
  count as loaded when they are made.
- **peak memory**: growth of anonymous and shared memory of the machine, over the size of the state.

Fair play: first saves count; every element of every tensor changes between saves; what was written is
loaded back and compared bit by bit with what the state was at that step; peers take turns.
"""


def cell(found: Spread | None) -> str:
    """Show one spread.

    >>> cell(Spread(1.04, 1.01, 1.2, 3))
    '1.04 (1.01 to 1.20)'
    """
    if found is None:
        return "-"
    digits = 2 if found.high < 100 else 0
    middle = f"{found.median:.{digits}f}"
    return middle if found.count == 1 else f"{middle} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def group_name(group: GroupKey) -> str:
    """Name a state for people."""
    size_bytes, shape = group
    amount = f"{size_bytes / GB:g} GB" if size_bytes >= GB else f"{size_bytes >> 20} MB"
    return f"{amount} in {'5,000 small' if shape == 'small' else 'a few large'} tensors"


def table(header: list[str], lines: list[list[str]]) -> str:
    """Render a Markdown table whose columns line up as plain text too."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    rows = [header, ["-" * width for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def yardsticks(rows: list[Row], group: GroupKey) -> str:
    """One sentence: what the machine itself needed."""
    saves = [row for row in rows if row["kind"] == "save" and (row["size_bytes"], row["shape"]) == group]
    parts = []
    for name, key in (
        ("memcpy", "memcpy_s"),
        ("raw write+fsync", "write_s"),
        ("SHA-256", "sha256_s"),
        ("read", "read_s"),
    ):
        found = spread(row[key] / (row["size_bytes"] / GB) * 1000 for row in saves)
        if found:
            parts.append(f"{name} {found.median:.0f} ({found.low:.0f} to {found.high:.0f})")
    return "The machine, in ms/GB: " + ", ".join(parts) + "."


def _group_table(summary: Summary, titles: dict[str, str], figures: list[Figure]) -> str:
    shown = [figure for figure in figures if any(found[figure.name] for found in summary.values())]
    lines = []
    for peer, title in titles.items():
        if peer in summary:
            mark = "" if peer in FSYNCING or peer in OURS else " °"
            lines.append([title + mark, *(cell(summary[peer][figure.name]) for figure in shown)])
    return table(["", *(figure.title for figure in shown)], lines)


FSYNCING = {"torch-save", "safetensors", "dcp-sync", "dcp-thread", "dcp-cached", "dcp-process", "dcp-shared"}


def best_of_peers(summary: Summary, figure: str) -> tuple[str, float] | None:
    """Which peer has the lowest median of a figure."""
    found = [
        (value.median, peer)
        for peer, spreads in summary.items()
        if peer not in OURS and peer not in NOT_COMPARABLE and (value := spreads[figure]) is not None
    ]
    return (min(found)[1], min(found)[0]) if found else None


def _promises(summaries: dict[GroupKey, Summary], titles: dict[str, str]) -> str:
    lines = []
    for text, peer, figure, bound, shape in PROMISES:
        for group, summary in summaries.items():
            found = summary.get(peer, {}).get(figure)
            if group[1] != shape or found is None:
                continue
            wanted = f"≥ {-bound:g}" if bound < 0 else f"≤ {bound:g}"
            kept = found.median >= -bound if bound < 0 else found.median <= bound
            best = best_of_peers(summary, figure)
            rival = f"{best[1]:.2f} {titles[best[0]]}" if best and bound > 0 else "-"
            lines.append([text, group_name(group), wanted, cell(found), "yes" if kept else "**no**", rival])
    return table(["what", "state", "promised", "measured", "kept", "best peer"], lines) if lines else ""


def _hooks(rows: list[Row]) -> str:
    """What the one who asks hooks waits for, from the question to the verdict."""
    lines = [
        [
            row["what"],
            row["target"],
            row["measured"],
            "yes" if row["met"] else "**no**",
            f"{row['runs']:,}; {row['note']}",
        ]
        for row in rows
    ]
    return table(["what", "promised", "measured", "kept", "runs"], lines)


def _machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    return f"{os.cpu_count()} cores ({model}), {memory_gb:.0f} GB of memory, Linux {platform.release()}"


def render(rows: list[Row], titles: dict[str, str], missing: dict[str, str]) -> str:
    """Return the whole page.

    titles   peer -> what people call it, in the order of the tables
    missing  requirement -> why it could not be installed
    """
    hooks = [row for row in rows if row["kind"] == "hook"]
    rows = [row for row in rows if row["kind"] != "hook"]
    summaries = summarise(rows, [*FIGURES, CPU_S_PER_GB])
    parts = [INTRODUCTION, f"Machine of this run: {_machine()}.\n"]
    promises = _promises(summaries, titles)
    if promises:
        parts += ["## What ckptd promises, and what this run found\n", promises + "\n"]
    for group, summary in summaries.items():
        parts += [
            f"## {group_name(group)}\n",
            yardsticks(rows, group) + "\n",
            _group_table(summary, titles, FIGURES) + "\n",
        ]
    if hooks:
        parts += ["## What hooks cost\n", _hooks(hooks) + "\n"]
    parts.append("## What was loaded back\n")
    found = failures(rows)
    for peer, title in titles.items():
        exact, tried = counted_exact(rows, peer)
        if tried or peer in found:
            parts.append(
                f"- **{title}**: {exact} of {tried} exact." + "".join(f"\n  - {said}" for said in found.get(peer, []))
            )
    for requirement, why in missing.items():
        parts.append(f"- {requirement} is missing from this run: {why}")
    # Errors of peers name files in the scratch folder; where that lies is nobody's business.
    return ("\n".join(parts) + "\n").replace(f"{Path(__file__).resolve().parents[2]}/", "")
