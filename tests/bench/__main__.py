"""The benchmark: ckptd and its peers, side by side on the same state, in one run.

    python -m tests.bench [--quick] [--sizes 64,1024] [--peers ckptd,torch-save] [--out docs/benchmarks.md]

Every (peer, size, shape) runs in a process of its own; peers take turns, so that a slow minute of
the machine hits all of them; rounds go on until the time is used up.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench import plot, report
from tests.bench.peers import BY_NAME, ENTRIES
from tests.bench.runner import Bench, Job, adopt_orphans, run
from tests.bench.venv import REPOSITORY, set_up
from tests.bench_load import asking
from tests.bench_load.scale import Scale


@dataclass(frozen=True)
class Group:
    """One state that all peers save."""

    size_mb: int
    shape: str
    warm_saves: int
    rounds_max: int


FULL = [
    Group(64, "large", 3, 3),
    Group(64, "small", 2, 1),
    Group(1024, "large", 2, 3),
    Group(1024, "small", 2, 2),
    Group(4096, "large", 1, 1),
]
QUICK = [Group(64, "large", 3, 1), Group(64, "small", 1, 1)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="64 MB only, one round: less than five minutes")
    parser.add_argument("--sizes", help="sizes in MB, comma-separated; default 64,1024,4096")
    parser.add_argument("--shapes", default="large,small", help="large (24 tensors), small (5,000 tensors)")
    parser.add_argument("--peers", help=f"comma-separated; default all of {', '.join(BY_NAME)}")
    parser.add_argument("--budget-min", type=float, default=25.0, help="no new round begins that would end after it")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / ".bench", help="scratch, peers and results")
    parser.add_argument("--out", type=Path, help="also write the report here, and its plot beside it (.svg)")
    parser.add_argument("--report", type=Path, help="no run: report on this result file")
    return parser.parse_args()


def _groups(options: argparse.Namespace) -> list[Group]:
    groups = QUICK if options.quick else FULL
    if options.sizes:
        sizes = [int(size) for size in options.sizes.split(",")]
        known = {(group.size_mb, group.shape): group for group in groups}
        shapes = ("large", "small")
        groups = [known.get((size, shape), Group(size, shape, 2, 1)) for size in sizes for shape in shapes]
    return [group for group in groups if group.shape in options.shapes.split(",")]


def _jobs(group: Group, names: list[str], number: int) -> list[Job]:
    """One round of a group; each round starts with another peer."""
    entries = [BY_NAME[name] for name in names]
    fit = [entry.name for entry in entries if group.size_mb <= max(entry.sizes_mb) and group.shape in entry.shapes]
    turn = number % max(len(fit), 1)
    return [Job(name, group.size_mb, group.shape, number, group.warm_saves) for name in fit[turn:] + fit[:turn]]


def _run_round(jobs: list[Job], bench: Bench, begun: float) -> float:
    """Run the jobs one after the other; returns the seconds they took."""
    started = time.monotonic()
    for job in jobs:
        outcome = run(job, bench)
        if outcome.startswith("ended"):  # some peers lose a race at their start; the first failure stays in the report
            print(f"           {job.label:40} {outcome}; once more", flush=True)
            outcome = run(job, bench)
        minutes = (time.monotonic() - begun) / 60
        print(f"{minutes:5.1f} min  {job.label:40} {outcome}", flush=True)
    return time.monotonic() - started


def _measure(options: argparse.Namespace, bench: Bench, names: list[str]) -> None:
    """First one round of every group, then more rounds, the shortest first, while there is time."""
    groups = _groups(options)
    begun = time.monotonic()
    cost_s: dict[Group, float] = {}
    for group in groups:
        cost_s[group] = _run_round(_jobs(group, names, 0), bench, begun)
    for number in range(1, max(group.rounds_max for group in groups)):
        for group in sorted(groups, key=lambda group: cost_s[group]):
            left_s = options.budget_min * 60 - (time.monotonic() - begun)
            if number < group.rounds_max and cost_s[group] < left_s:
                _run_round(_jobs(group, names, number), bench, begun)


def main() -> None:
    """Set up, measure, report."""
    options = _options()
    results = options.report
    missing: dict[str, str] = {}
    if results is None:
        adopt_orphans()
        options.folder.mkdir(exist_ok=True)
        python, missing = set_up(options.folder / "venv")
        names = options.peers.split(",") if options.peers else [entry.name for entry in ENTRIES]
        names = [name for name in names if BY_NAME[name].needs not in missing]
        results = options.folder / "results" / time.strftime("%Y%m%d-%H%M%S.jsonl")
        results.parent.mkdir(exist_ok=True)
        _measure(options, Bench(python, options.folder, results), names)
        with results.open("a") as file:
            file.writelines(json.dumps({"kind": "hook", **asdict(row)}) + "\n" for row in asking.measure(Scale()))
    rows = report.read(results)
    text = report.render(rows, {entry.name: entry.title for entry in ENTRIES}, missing)
    print(text)
    print(f"measurements: {results}")
    if options.out:
        options.out.write_text(text)
        peers = [row for row in rows if row["kind"] != "hook"]
        options.out.with_suffix(".svg").write_text(plot.render(peers, {entry.name: entry.title for entry in ENTRIES}))


if __name__ == "__main__":
    main()
