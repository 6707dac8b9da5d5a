"""The load targets, each beside what this machine did.

    python -m tests.bench_load [--only roundtrip,catalogue] [--small] [--out PAGE]

Nothing is hard-coded: a row that can't be measured says why. A quiet machine with some 10 GB of free disk, please;
the whole takes about an hour and a half.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench_load import (
    asking,
    catalogue,
    lasting,
    queue,
    report,
    retiring,
    roundtrip,
    statements,
    verifying,
    watching,
)
from tests.bench_load.outcome import Outcome, impossible
from tests.bench_load.scale import SMALL, Scale

PARTS = {
    "roundtrip": ("Round trips", roundtrip.measure),
    "asking": ("Hooks", asking.measure),
    "statements": ("Statements", statements.measure),
    "queue": ("The queue", queue.measure),
    "catalogue": ("A large catalog", catalogue.measure),
    "retiring": ("Retiring", retiring.measure),
    "watching": ("Watching", watching.measure),
    "verifying": ("Reading back", verifying.measure),
    "lasting": ("A hundred thousand saves", lasting.measure),
}


def main() -> int:
    """Measure, print, write."""
    options = _options()
    scale = SMALL if options.small else Scale()
    given = {"seconds": options.seconds, "checkpoints": options.checkpoints, "files_each": options.files_each}
    scale = dataclasses.replace(scale, **{name: value for name, value in given.items() if value is not None})
    parts: dict[str, list[Outcome]] = {}
    for name in options.only.split(","):
        title, _ = PARTS[name]
        parts[title] = []
        for row in _rows(name, scale):
            parts[title].append(row)
            print(report.line(row), flush=True)
    if options.out:
        whole = options.only.split(",") == list(PARTS)
        command = "make bench-load" if whole else f"python -m tests.bench_load --only {options.only}"
        options.out.write_text(report.render(parts, command))
    return 0


def _rows(name: str, scale: Scale) -> Iterator[Outcome]:
    """Return the rows of one part; what stops it is a row as well."""
    try:
        yield from PARTS[name][1](scale)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        yield impossible(f"the rest of {name}", "-", f"{type(error).__name__}: {error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_load", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"parts, comma-separated; default all: {', '.join(PARTS)}"
    )
    parser.add_argument("--small", action="store_true", help="a hundredth of the load, to see that all of it runs")
    parser.add_argument("--seconds", type=float, help="of each load that goes on for a while")
    parser.add_argument("--checkpoints", type=int, help="in the large catalog")
    parser.add_argument("--files-each", type=int, help="files of each of these checkpoints")
    parser.add_argument("--out", type=Path, help="write the page here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
