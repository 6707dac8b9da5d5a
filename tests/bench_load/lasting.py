"""A hundred thousand saves by one daemon that is never restarted: what lasts of them is rows, not memory or descriptors.

Sixteen trainers save as fast as they are let, each keeps its newest few. Every tenth of the way all of them rest until
the node is idle; then its memory and descriptors are looked at, after what is free was given back.
"""

import sqlite3
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench_load.outcome import Limit, Outcome, bounded, told
from tests.bench_load.plant import Plant, descriptors, planted, rss_bytes
from tests.bench_load.scale import Scale
from tests.bench_load.swarm import Pace, Swarm
from tests.soak.meter import memory_by_role
from tests.soak.slope import theil_sen
from tests.support.node import eventually

TRAINERS = 16
ROUND_S = 5.0
LOOKS = 10
WARM_LOOKS = 3  # of them, the first: caches fill
REST_S = 65.0  # once a minute what is free goes back to the kernel (ckptd/intake/trimming.py)
PATIENCE_S = 900.0
GROWTH_MAX = 1.0  # percent of memory, over as many saves as a day has; flat
DESCRIPTORS_MORE = 2
KEEP_FEW = '[[experiments]]\nproject = "load"\nkeep_last = 3\ntrash_grace_s = 0\nbrake_share = 1\n'


@dataclass(frozen=True)
class Look:
    """A node at rest."""

    saves: int
    rss_bytes: int
    descriptors: int
    by_role: dict[str, int]


def measure(scale: Scale) -> Iterator[Outcome]:
    """Return the rows of this file."""
    with planted(scale.folder, more=KEEP_FEW) as plant:
        plant.start()
        begun_s = time.monotonic()
        looks: list[Look] = []
        with Swarm(plant.socket, plant.runs, TRAINERS) as swarm:
            saves = 0
            while saves < scale.saves:
                saves += len(swarm.run(Pace(0.0, min(scale.seconds, ROUND_S), saves=True))["commit"])
                if saves >= scale.saves * (len(looks) + 1) / LOOKS:
                    looks.append(_look(plant, saves, scale))
            took_s = time.monotonic() - begun_s
            yield from _judged(looks, saves)
            yield _accounted(plant, saves)
            yield told("saves a minute, rests included", f"{60 * saves / took_s:,.0f}", saves)


def _look(plant: Plant, saves: int, scale: Scale) -> Look:
    eventually(lambda: _is_idle(plant), "every save to be verified and its rules to be carried out", PATIENCE_S)
    time.sleep(min(REST_S, REST_S * scale.seconds / Scale.seconds))
    pids = plant.carriers()
    look = Look(saves, rss_bytes(pids), descriptors(pids), memory_by_role(pids))
    # More than an hour goes by until the rows are printed: a run that somebody ends has shown this much.
    print(
        f"{saves:,} saves: {look.rss_bytes / 2**20:.1f} MiB ({_told(look.by_role)}), {look.descriptors} descriptors",
        file=sys.stderr,
        flush=True,
    )
    return look


def _told(by_role: dict[str, int]) -> str:
    return ", ".join(f"{role} {size / 2**20:.1f}" for role, size in sorted(by_role.items()))


def _is_idle(plant: Plant) -> bool:
    jobs = plant.status()["jobs"]
    return int(jobs["queued"] + jobs["running"] + jobs["parked"]) == 0


def _judged(looks: list[Look], saves: int) -> Iterator[Outcome]:
    warm = looks[WARM_LOOKS:]
    growth = theil_sen([(look.saves, look.rss_bytes) for look in warm]) * saves / warm[0].rss_bytes * 100
    note = "at rest, by saves: " + ", ".join(f"{look.saves:,}: {look.rss_bytes / 2**20:.1f} MiB" for look in looks)
    limit = Limit(f"growth over {saves:,} saves", GROWTH_MAX, "%")
    yield bounded("memory of daemon and workers", [(limit, growth)], len(warm), note)
    more = max(look.descriptors for look in warm) - looks[0].descriptors
    limit = Limit("more than at the first look", DESCRIPTORS_MORE, "")
    yield bounded("descriptors of daemon and workers", [(limit, float(more))], len(looks))


def _accounted(plant: Plant, saves: int) -> Outcome:
    """Every save that was acknowledged has its row, and none has failed."""
    with sqlite3.connect(f"file:{plant.state}/catalog.sqlite?mode=ro", uri=True) as db:
        states = dict(db.execute("SELECT state, count(*) FROM checkpoint GROUP BY state"))
    db.close()
    missing = saves - sum(states.values())
    others = sum(count for state, count in states.items() if state not in {"live", "trashed", "dropped"})
    pairs = [(Limit("without a row", 0.0, ""), float(missing)), (Limit("failed", 0.0, ""), float(others))]
    note = ", ".join(f"{count:,} {state}" for state, count in sorted(states.items()))
    return bounded("saves that were acknowledged", pairs, saves, note)
