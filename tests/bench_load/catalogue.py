"""A catalog of a million checkpoints: how fast it starts, answers and commits."""

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio

from ckptd import config
from ckptd.catalog import Catalog, checkpoints, experiments, open_catalog
from ckptd.catalog.checkpoints import NewCheckpoint
from ckptd.clock import SystemClock
from ckptd.model import Origin, new_id
from tests.bench_load.filler import COMMON, PROJECTS, RARE, Filled, fill, noise
from tests.bench_load.outcome import Limit, Outcome, bounded, milliseconds, percentile, told
from tests.bench_load.plant import Gauge, Plant, planted
from tests.bench_load.scale import Scale
from tests.bench_load.swarm import Talker

PAGES = 20  # followed by cursor, to show that a late page costs what the first does
SLOW_MS = 20.0
Question = Callable[[random.Random], dict[str, Any]]


def measure(scale: Scale) -> Iterator[Outcome]:
    """Return the rows of this file."""
    with planted(scale.folder) as plant:
        filled = fill(plant.state / "catalog.sqlite", scale.checkpoints, scale.files_each, os.getuid())
        what = f"{filled.checkpoints:,} checkpoints, {filled.files:,} files"
        yield told(
            f"catalog of {what}", f"{filled.size_bytes / (1 << 30):.2f} GiB", 1, f"filled in {filled.took_s:.0f} s"
        )
        yield from _commits(filled, scale)
        yield _start(plant, what)
        with Gauge(plant) as gauge:
            yield from _questions(plant, filled, scale)
        yield bounded(
            "memory of daemon and workers meanwhile",
            [(Limit("RSS", 250, "MiB"), gauge.rss_bytes / (1 << 20))],
            gauge.samples,
        )


def _start(plant: Plant, what: str) -> Outcome:
    begun_s = time.monotonic()
    plant.start()
    took_s = time.monotonic() - begun_s
    note = "from starting the supervisor to the first answered question, the check of the whole file included"
    return bounded(f"start with {what}", [(Limit("ready", 3.0, "s"), took_s)], 1, note)


# -- questions -------------------------------------------------------------------------------


def _kinds(filled: Filled) -> dict[str, Question]:
    """Every way to list and search, with names drawn at random."""

    def experiment(dice: random.Random) -> str:
        return f"run-{dice.randint(1, filled.experiments)}"

    return {
        "list newest": lambda _: {"op": "list"},
        "list by step": lambda _: {"op": "list", "sort": "step"},
        "list of a project": lambda dice: {"op": "list", "project": f"project-{dice.randrange(PROJECTS)}"},
        "list of a project by step": lambda dice: {
            "op": "list", "project": f"project-{dice.randrange(PROJECTS)}", "sort": "step",
        },
        "list of an experiment": lambda dice: {"op": "list", "name": experiment(dice)},
        "list by state": lambda _: {"op": "list", "state": "dropped"},
        "list by a state that nothing has": lambda _: {"op": "list", "state": "corrupt"},
        "list by a common tag": lambda _: {"op": "list", "tag": COMMON},
        "list by a rare tag": lambda _: {"op": "list", "tag": RARE},
        "experiments": lambda _: {"op": "experiments", "limit": 20},
        "show by id": lambda dice: {"op": "show", "selector": noise(-dice.randint(1, filled.checkpoints))},
        "newest of an experiment": lambda dice: {
            "op": "resolve", "selector": "latest", "project": _project_of(name := experiment(dice)), "name": name,
        },
    }  # fmt: skip


def _project_of(experiment: str) -> str:
    return f"project-{int(experiment.removeprefix('run-')) % PROJECTS}"


def _questions(plant: Plant, filled: Filled, scale: Scale) -> Iterator[Outcome]:
    talker = Talker(plant.socket, plant.runs, 0)
    dice = random.Random(1)
    took: dict[str, list[float]] = defaultdict(list)
    kinds = _kinds(filled)
    for number in range(scale.looks + 1):
        for kind, question in kinds.items():
            asked = question(dice)
            took_s = _asked(talker, asked)
            if number:  # the first of each kind compiles its statement and reads its pages
                took[kind].append(took_s)
    took["page after page"] = _pages(talker, scale)
    every = [took_s for times in took.values() for took_s in times]
    slowest = sorted(((percentile(times, 0.99) * 1e3, kind) for kind, times in took.items()), reverse=True)[:4]
    named = "; ".join(f"{kind} {p99_ms:.1f}" for p99_ms, kind in slowest)
    yield bounded(
        "list or search", milliseconds(every, None, SLOW_MS), len(every), f"p99 of the slowest kinds, ms: {named}"
    )
    for p99_ms, kind in slowest:
        if p99_ms > SLOW_MS:
            times = took[kind]
            yield bounded(f"of these: {kind}", milliseconds(times, None, SLOW_MS), len(times))
    for op in ("status", "summary"):
        once = [_asked(talker, {"op": op}) for _ in range(3)]
        yield told(f"`{op}`, which counts everything", f"median {percentile(once, 0.5) * 1e3:,.0f} ms", len(once))
    talker.close()


def _asked(talker: Talker, question: dict[str, Any]) -> float:
    begun_s = time.perf_counter()
    talker.ask(**question)
    return time.perf_counter() - begun_s


def _pages(talker: Talker, scale: Scale) -> list[float]:
    """Follow the cursor of one long list."""
    took, after = [], None
    for _ in range(max(2, min(PAGES, scale.looks))):
        begun_s = time.perf_counter()
        after = talker.ask("list", after=after, limit=50)["next"]
        took.append(time.perf_counter() - begun_s)
    return took


# -- commits ---------------------------------------------------------------------------------


def _commits(filled: Filled, scale: Scale) -> Iterator[Outcome]:
    """Stage checkpoints one by one, each its own commit, through the daemon's catalog in this process."""
    took: list[float] = []
    opened = anyio.run(_commit_each, filled.path, scale.looks * 5, took)
    yield bounded("opening the catalog", [(Limit("with its check", 3.0, "s"), opened)], 1)
    yield bounded(
        "commit (synchronous=FULL)", milliseconds(took, None, 15.0), len(took), "one checkpoint staged in each"
    )


async def _commit_each(path: Path, count: int, took: list[float]) -> float:
    begun_s = time.perf_counter()
    async with open_catalog(path, config.Catalog(ballast_bytes=0), SystemClock(), lambda _: None) as catalog:
        opened_s = time.perf_counter() - begun_s
        experiment = await _experiment(catalog)
        for step in range(count):
            new = NewCheckpoint(
                id=new_id(),
                experiment_id=experiment,
                origin=Origin.MEMORY,
                root_id=1,
                step=1_000_000 + step,
                format="opaque",
            )
            begun_s = time.perf_counter()
            staged = await catalog.write(lambda tx, new=new: checkpoints.stage(tx, new))
            took.append(time.perf_counter() - begun_s)
            await catalog.write(lambda tx, of=staged.checkpoint.id: checkpoints.mark_failed(tx, of, {"code": "load"}))
    return opened_s


async def _experiment(catalog: Catalog) -> str:
    found = await catalog.read(lambda conn: experiments.find(conn, os.getuid(), "project-1", "run-1"))
    assert found is not None
    return found.id
