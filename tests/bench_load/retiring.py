"""Retiring ten thousand checkpoints while sixteen trainers save: does a save notice?"""

import threading
import time
from collections.abc import Iterator

from tests.bench_load.outcome import Limit, Outcome, bounded, percentile, told
from tests.bench_load.plant import Plant, planted
from tests.bench_load.scale import Scale
from tests.bench_load.swarm import Pace, Swarm
from tests.support.node import eventually

TRAINERS = 16
PERIOD_S = 1.0  # between two saves of one trainer; four times as many are more than a node carries, and all would queue
PATIENCE_S = 600.0
RATIO_MAX = 1.5
LATER_MS_MAX = 50.0  # M097: no save is later by more than this
KEEP_ALL = '[[experiments]]\nproject = "*"\n'
KEEP_ONE = '[[experiments]]\nproject = "load"\nkeep_last = 1\nbrake_share = 1\n'


def measure(scale: Scale) -> Iterator[Outcome]:
    """Return the rows of this file."""
    with planted(scale.folder, more=KEEP_ALL) as plant:
        plant.start()
        with Swarm(plant.socket, plant.runs, TRAINERS) as swarm:
            while _live(plant) < scale.jobs:
                swarm.run(Pace(0.0, min(scale.seconds, 5.0), saves=True))
            eventually(lambda: _idle(plant), "every save to be verified", PATIENCE_S)
            before = swarm.run(Pace(PERIOD_S, scale.seconds, saves=True, seed=1))
            eventually(lambda: _idle(plant), "those as well", PATIENCE_S)
            count = _live(plant)
            plant.configure(KEEP_ONE)
            reloaded = plant.ask("reload")
            assert reloaded["ok"], reloaded
            yield from _compared(plant, swarm, scale, (before, count))


def _compared(plant: Plant, swarm: Swarm, scale: Scale, known: tuple[dict[str, list[float]], int]) -> Iterator[Outcome]:
    before, count = known
    begun_s = time.monotonic()
    retiring = threading.Thread(target=lambda: plant.ask("retention", project="load", apply=True))
    retiring.start()
    during = swarm.run(Pace(PERIOD_S, scale.seconds, saves=True, seed=1))
    retiring.join()
    planned_s = time.monotonic() - begun_s
    eventually(lambda: _live(plant) <= TRAINERS, "all but the newest to be retired", PATIENCE_S)
    for op in ("lease", "commit"):
        ratio = percentile(during[op], 0.5) / percentile(before[op], 0.5)
        later_ms = (percentile(during[op], 0.99) - percentile(before[op], 0.99)) * 1e3
        pairs = [(Limit("p99 later by", LATER_MS_MAX, "ms"), later_ms)]
        if op == "lease":  # what save() waits for; a commit is answered while training goes on
            pairs.append((Limit("ratio of p50", RATIO_MAX, ""), ratio))
        note = f"before: {_spread(before[op])}; while {count:,} were retired: {_spread(during[op])}"
        yield bounded(f"{op} of a save while {count:,} are retired", pairs, len(during[op]), note)
    yield told(f"{count:,} tombstones written", f"{planned_s:.1f} s", count)
    yield told("all of them out of the way", f"{time.monotonic() - begun_s:.1f} s", count)


def _spread(seconds: list[float]) -> str:
    p50_ms, p99_ms = percentile(seconds, 0.5) * 1e3, percentile(seconds, 0.99) * 1e3
    return f"p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms of {len(seconds)}"


def _live(plant: Plant) -> int:
    return int(plant.ask("summary", project="load").get("by_state", {}).get("live", 0))


def _idle(plant: Plant) -> bool:
    jobs = plant.status()["jobs"]
    return int(jobs["queued"] + jobs["running"]) == 0
