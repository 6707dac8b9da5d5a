"""Retiring ten thousand checkpoints, and unlinking them, while sixteen trainers save: does a save notice?"""

import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from tests.bench_load.outcome import Limit, Outcome, bounded, percentile, told
from tests.bench_load.plant import Plant, planted
from tests.bench_load.scale import Scale
from tests.bench_load.stalls import Stalls, stalls
from tests.bench_load.swarm import Pace, Swarm, Talker
from tests.support.node import eventually

TRAINERS, REAL = 16, 4  # of these many, sockets that speak the protocol and processes that train
PERIOD_S = 1.0  # between two saves of one trainer; four times as many are more than a node carries, and all would queue
ROUND_S = 4.0
BEFORE_ROUNDS = 3  # times scale.seconds: about as long as the retiring takes
PATIENCE_S = 600.0
RATIO_MAX = 1.5
LATER_MS_MAX = 50.0  # M097: no save is later by more than this
# The real ones keep few all along: else they would fill a disk, 64 MiB a second.
KEEP_ALL = '[[experiments]]\nproject = "stalls"\nkeep_last = 2\ntrash_grace_s = 0\nbrake_share = 1\n'
KEEP_ONE = f'{KEEP_ALL}\n[[experiments]]\nproject = "load"\nkeep_last = 1\nbrake_share = 1\n'
NO_GRACE = f"{KEEP_ONE}trash_grace_s = 0\n"


@dataclass
class Seen:
    """Seconds, by operation, of what trainers waited for; `save` is the stall itself."""

    took_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    spooled: int = 0


@dataclass
class Crowd:
    """Everybody who saves."""

    swarm: Swarm
    stalls: Stalls
    rounds: int = 0

    def save_while(self, some_more: Iterator[bool]) -> Seen:
        """Let all of them save, round after round, as long as `some_more` says so."""
        seen = Seen()
        self.stalls.begin()
        while next(some_more, False):
            self.rounds += 1
            for op, took_s in self.swarm.run(Pace(PERIOD_S, ROUND_S, saves=True, seed=self.rounds)).items():
                seen.took_s[op] += took_s
        seen.took_s["save"], seen.spooled = self.stalls.end()
        return seen


def measure(scale: Scale) -> Iterator[Outcome]:
    """Return the rows of this file."""
    with planted(scale.folder, more=KEEP_ALL) as plant:
        plant.start()
        with Swarm(plant.socket, plant.runs, TRAINERS) as swarm, stalls(plant, REAL) as real:
            while _live(plant) < scale.jobs:
                swarm.run(Pace(0.0, min(scale.seconds, 5.0), saves=True))
            eventually(lambda: _idle(plant), "every save to be verified", PATIENCE_S)
            crowd = Crowd(swarm, real)
            rounds = max(1, round(BEFORE_ROUNDS * scale.seconds / ROUND_S))
            before = crowd.save_while(iter([True] * rounds))
            eventually(lambda: _idle(plant), "those as well", PATIENCE_S)
            count = _live(plant)
            _reload(plant, KEEP_ONE)
            begun_s = time.monotonic()
            retiring = threading.Thread(target=_apply, args=(plant,))
            retiring.start()
            during = crowd.save_while(_until(lambda: _live(plant) <= 2 * TRAINERS, begun_s))
            retiring.join()
            yield from _compared(before, during, f"{count:,} are retired")
            yield told("all of them out of the way", f"{time.monotonic() - begun_s:.0f} s", count)
            _reload(plant, NO_GRACE)
            begun_s = time.monotonic()
            during = crowd.save_while(_until(lambda: _dropped(plant) >= count, begun_s))
            yield from _compared(before, during, f"{count:,} are unlinked")
            yield told("all of them unlinked", f"{time.monotonic() - begun_s:.0f} s", count)


def _compared(before: Seen, during: Seen, what: str) -> Iterator[Outcome]:
    for op, words in (("save", "stall of save()"), ("lease", "lease of a save"), ("commit", "commit of a save")):
        one, other = before.took_s[op], during.took_s[op]
        later_ms = (percentile(other, 0.99) - percentile(one, 0.99)) * 1e3
        pairs = [(Limit("p99 later by", LATER_MS_MAX, "ms"), later_ms)]
        if op != "commit":  # what save() waits for; a commit is answered while training goes on
            pairs.append((Limit("ratio of p50", RATIO_MAX, ""), percentile(other, 0.5) / percentile(one, 0.5)))
        if op == "save":
            pairs.append((Limit("longest later by", LATER_MS_MAX, "ms"), (max(other) - max(one)) * 1e3))
        note = f"before: {_spread(one)}; meanwhile: {_spread(other)}"
        yield bounded(f"{words} while {what}", pairs, len(other), note)
    yield told(
        f"saves that found no arena while {what}",
        f"{during.spooled}, before {before.spooled}",
        len(during.took_s["save"]),
    )


def _apply(plant: Plant) -> None:
    """Ask for it as a person does who waits for the answer, however long it takes."""
    person = Talker(plant.socket, plant.runs, -1)
    person.sock.settimeout(PATIENCE_S)
    person.ask("retention", project="load", apply=True)
    person.close()


def _reload(plant: Plant, rules: str) -> None:
    plant.configure(rules)
    reloaded = plant.ask("reload")
    assert reloaded["ok"], reloaded


def _until(is_done: Callable[[], bool], begun_s: float) -> Iterator[bool]:
    """They go on saving meanwhile: somebody's last one may be on its way out."""
    yield True
    while not is_done():
        assert time.monotonic() < begun_s + PATIENCE_S, "all but the newest should be gone by now"
        yield True


def _spread(seconds: list[float]) -> str:
    p50_ms, p99_ms, most_ms = (percentile(seconds, share) * 1e3 for share in (0.5, 0.99, 1.0))
    return f"p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms, longest {most_ms:.1f} ms of {len(seconds)}"


def _live(plant: Plant) -> int:
    return int(plant.ask("summary", project="load").get("by_state", {}).get("live", 0))


def _dropped(plant: Plant) -> int:
    """Nobody is told of these: what is gone for good is no longer in a summary."""
    with closing(sqlite3.connect(f"file:{plant.state}/catalog.sqlite?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM checkpoint WHERE state = 'dropped'").fetchone()[0])


def _idle(plant: Plant) -> bool:
    jobs = plant.status()["jobs"]
    return int(jobs["queued"] + jobs["running"]) == 0
