"""Hand-off control round trips: 64 trainers, and 64 among a thousand who say nothing."""

import contextlib
from collections.abc import Iterator

from tests.bench_load.outcome import Limit, Outcome, bounded, milliseconds, percentile, told
from tests.bench_load.plant import Gauge, Plant, cpu_s, descriptors, planted
from tests.bench_load.scale import Scale
from tests.bench_load.swarm import Pace, Swarm
from tests.support.node import eventually

TRAINERS = 64
ASK_PERIOD_S = 0.25  # a lease and its return, four times a second each: far more than anybody saves
SAVE_PERIOD_S = 4.0  # 960 saves a minute together, each published and verified meanwhile
SETTLE_S = 60.0
DESCRIPTORS_MORE = 2
RSS_LOADED_MIB, WAL_MIB = 250.0, 64.0


def measure(scale: Scale) -> Iterator[Outcome]:
    """Return the rows of this file."""
    with planted(scale.folder) as plant:
        plant.start()
        _all_at_once(plant, 1.0)  # what is imported, made and cached once is no leak
        plant.wait_idle()
        before = descriptors(plant.carriers())
        with Gauge(plant) as gauge:
            yield from _sixty_four(plant, scale)
            yield from _a_thousand(plant, scale)
        plant.wait_idle()
        yield _descriptors_back(plant, before)
        yield bounded(
            "memory of daemon and workers at these loads",
            [_mib("RSS", RSS_LOADED_MIB, gauge.rss_bytes)],
            gauge.samples,
            "the most of any sample; pages that two processes share are counted twice",
        )
        yield bounded("write-ahead log at these loads", [_mib("WAL", WAL_MIB, gauge.wal_bytes)], gauge.samples)


def _mib(name: str, most: float, size_bytes: int) -> tuple[Limit, float]:
    return Limit(name, most, "MiB"), size_bytes / (1 << 20)


def _sixty_four(plant: Plant, scale: Scale) -> Iterator[Outcome]:
    with Swarm(plant.socket, plant.runs, TRAINERS) as swarm:
        swarm.run(Pace(ASK_PERIOD_S, 1.0))  # arenas are made here
        took = swarm.run(Pace(ASK_PERIOD_S, scale.seconds))
        asked = [*took["lease"], *took["abandon"]]
        yield bounded(
            f"hand-off control round trip, {TRAINERS} trainers",
            milliseconds(asked, 2.0, 10.0),
            len(asked),
            f"lease and return of an arena, every {ASK_PERIOD_S:g} s each",
        )
        pid = plant.carriers()[0]
        used_s = cpu_s(pid)
        took = swarm.run(Pace(SAVE_PERIOD_S, scale.seconds, saves=True, seed=1))
        yield bounded(
            f"a lease while they save every {SAVE_PERIOD_S:g} s",
            milliseconds(took["lease"], None, 10.0),
            len(took["lease"]),
            "what save() may wait for, while earlier saves are recorded, published and verified",
        )
        commits = took["commit"]
        figures = f"p50 {percentile(commits, 0.5) * 1e3:.1f} ms, p99 {percentile(commits, 0.99) * 1e3:.1f} ms"
        note = "answered after its fsync in the catalog; no training waits for it, and its save is safe before"
        yield told("a commit meanwhile", figures, len(commits), note)
        plant.wait_idle()
        each_ms = (cpu_s(pid) - used_s) * 1e3 / len(commits)
        note = "from its lease until it is published, verified and linked, and the rules were looked at"
        yield told("the daemon's processor time for one small save", f"{each_ms:.1f} ms", len(commits), note)
        yield _as_fast_as_it_goes(swarm, scale)


def _as_fast_as_it_goes(swarm: Swarm, scale: Scale) -> Outcome:
    took = swarm.run(Pace(0.0, scale.seconds / 3))
    asked = [*took["lease"], *took["abandon"]]
    rate = len(asked) / (scale.seconds / 3)
    figures = f"p50 {percentile(asked, 0.5) * 1e3:.1f} ms, p99 {percentile(asked, 0.99) * 1e3:.1f} ms"
    note = "64 requests wait at any moment, so the median is 64 over the rate"
    return told(f"{TRAINERS} trainers without a pause", f"{rate:,.0f} requests/s, {figures}", len(asked), note)


def _a_thousand(plant: Plant, scale: Scale) -> Iterator[Outcome]:
    with Swarm(plant.socket, plant.runs, TRAINERS, idle=scale.idle) as swarm:
        swarm.run(Pace(ASK_PERIOD_S, 1.0))
        took = swarm.run(Pace(ASK_PERIOD_S, scale.seconds, seed=2))
        asked = [*took["lease"], *took["abandon"]]
        yield bounded(f"the same beside {scale.idle:,} idle connections", milliseconds(asked, None, 25.0), len(asked))


def _all_at_once(plant: Plant, seconds: float) -> None:
    with Swarm(plant.socket, plant.runs, TRAINERS) as swarm:
        swarm.run(Pace(0.5, seconds, saves=True))


def _descriptors_back(plant: Plant, before: int) -> Outcome:
    def back() -> bool:
        return plant.status()["daemon"]["connections"] <= 1 and descriptors(plant.carriers()) <= before

    with contextlib.suppress(AssertionError):  # how many are left is the row
        eventually(back, "descriptors to come back", 10.0)
    more = descriptors(plant.carriers()) - before
    return bounded("descriptors after it", [(Limit("more than before", DESCRIPTORS_MORE, ""), float(more))], 1)
