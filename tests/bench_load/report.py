"""The rows as a table, on the terminal and as a page."""

import os
import platform
import sqlite3
import time
from collections.abc import Sequence

from tests.bench_load.outcome import WORDS, Outcome

HEAD = ("what", "target", "measured", "met", "runs")


def line(row: Outcome) -> str:
    """Say one row on a terminal, as soon as it is there."""
    note = f"\n        {row.note}" if row.note else ""
    return f"{WORDS[row.met]:>4}  {row.what}: {row.measured}  (target {row.target}; {row.runs:,} runs){note}"


def render(parts: dict[str, Sequence[Outcome]], command: str) -> str:
    """Return the page."""
    rows = [row for found in parts.values() for row in found]
    judged = [row for row in rows if row.met is not None]
    lines = [
        "# Load",
        "",
        "What one node carries: each target beside what was measured in one run of `" + command + "`, on",
        (
            f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
            f"{time.strftime('%Y-%m-%d')}. {sum(bool(row.met) for row in judged)} of {len(judged)} targets are met."
        ),
    ]
    for part, found in parts.items():
        lines += ["", f"## {part}", "", f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
        lines += [_row(row) for row in found]
        lines += ["", *(f"* {row.what}: {row.note}." for row in found if row.note)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _row(row: Outcome) -> str:
    met = f"**{WORDS[row.met]}**" if row.met is False else WORDS[row.met]
    return f"| {row.what} | {row.target} | {row.measured} | {met} | {row.runs:,} |"
