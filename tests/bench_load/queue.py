"""A long queue: how soon a killed daemon is back before ten thousand jobs, and what a hundred thousand askers too many get."""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator

from ckptd.intake.waiting import WAITERS_PER_UID_MAX
from ckptd_client import wire
from tests.bench_load.outcome import Limit, Outcome, bounded
from tests.bench_load.plant import Gauge, Plant, planted, rss_bytes
from tests.bench_load.scale import Scale
from tests.bench_load.swarm import ARENA_BYTES, Swarm, Talker
from tests.bench_load.tree import grow
from tests.support.node import eventually

RESTARTS = 3
FOUND_S = 120.0
TRAINERS = 64
WAITING_EACH = 64  # what one connection may have waiting (intake/service.py)
CHUNK = 250  # requests sent before their answers are read: less than a socket's buffer
GROWTH_MIB = 20.0
REFUSALS = {"busy", "no_arena"}  # too many of one connection, too many of one user
FULL = """
[watching]
reconcile_s = 5
"""


def measure(scale: Scale) -> Iterator[Outcome]:
    """Return the rows of this file."""
    with planted(scale.folder, more=FULL) as plant:
        yield _restarts(plant, scale)
    with planted(scale.folder) as plant:
        # Room for one arena: whoever comes after its holder has to wait.
        yield from _refusals(dataclasses.replace(plant, arena_bytes=2 * ARENA_BYTES - 1), scale)


def _restarts(plant: Plant, scale: Scale) -> Outcome:
    root = plant.dir / "w"
    grow(root, scale.jobs)
    plant.start()
    added = plant.ask("root.add", path=str(root), kind="watched", project="queued")
    assert added["ok"], added
    took_s, waiting = [], []
    eventually(lambda: _jobs(plant) and _rows(plant) >= scale.jobs, "every file to be queued", FOUND_S)
    for _ in range(RESTARTS):
        waiting.append(_jobs(plant))
        plant.kill_daemon()
        begun_s = time.monotonic()
        plant.status()
        took_s.append(time.monotonic() - begun_s)
    note = f"from SIGKILL to the first answer; {', '.join(f'{count:,}' for count in waiting)} jobs waited"
    what = f"restart with {scale.jobs:,} jobs queued"
    return bounded(what, [(Limit("slowest", 2.0, "s"), max(took_s))], len(took_s), note)


def _jobs(plant: Plant) -> int:
    jobs = plant.status()["jobs"]
    return int(jobs["queued"] + jobs["running"])


def _rows(plant: Plant) -> int:
    return sum(plant.ask("summary", project="queued").get("by_state", {}).values())


def _refusals(plant: Plant, scale: Scale) -> Iterator[Outcome]:
    plant.start()
    with Swarm(plant.socket, plant.runs, TRAINERS) as swarm:
        first, *others = swarm.talkers
        first.ask("lease", experiment=first.experiment, size_bytes=ARENA_BYTES, wait_s=1)
        for talker in others:
            # Taken before anything that comes later on the same connection.
            talker.sock.sendall(_requests(talker, WAITING_EACH))
        eventually(lambda: _waiting(plant) == WAITERS_PER_UID_MAX, "the queue to be full")
        with Gauge(plant) as gauge:
            before = rss_bytes(plant.carriers())
            begun_s = time.monotonic()
            answers = _pour(others, scale.refused)
            took_s = time.monotonic() - begun_s
        codes = Counter(code for code, _ in answers)
        polite = sum(1 for code, after_s in answers if code in REFUSALS and after_s)
        grown_mib = (gauge.rss_bytes - before) / (1 << 20)
        pairs = [
            (Limit("not refused with a time to come back", 0, ""), float(scale.refused - polite)),
            (Limit("memory grows by", GROWTH_MIB, "MiB"), grown_mib),
        ]
        note = f"answered in {took_s:.1f} s: {dict(codes)}; what is accepted is a row of the catalog, not memory"
        yield bounded(f"{scale.refused:,} requests beyond a full queue", pairs, len(answers), note)
        alive_s = time.monotonic()
        plant.status()
        alive_s = time.monotonic() - alive_s
        yield bounded("an answer to somebody else after it", [(Limit("took", 1.0, "s"), alive_s)], 1)


def _waiting(plant: Plant) -> int:
    return int(plant.ask("stats")["arenas"]["waiting"])


def _requests(talker: Talker, count: int) -> bytes:
    frames = []
    for _ in range(count):
        talker.next_id += 1
        lease = {"experiment": talker.experiment, "size_bytes": ARENA_BYTES, "wait_s": 60}
        frames.append(wire.encode({"v": 1, "id": talker.next_id, "op": "lease", **lease}))
    return b"".join(frames)


def _pour(talkers: list[Talker], total: int) -> list[tuple[str, float]]:
    """Send `total` requests, a chunk of each trainer in turn; return the code and the time to come back of each answer."""
    answers: list[tuple[str, float]] = []
    left = total
    while left:
        sent: list[tuple[Talker, int]] = []
        for talker in talkers:
            count = min(CHUNK, left)
            if count:
                talker.sock.sendall(_requests(talker, count))
                sent.append((talker, count))
                left -= count
        for talker, count in sent:
            answers += _read(talker, count)
    return answers


def _read(talker: Talker, count: int) -> list[tuple[str, float]]:
    """Read until every one of the last `count` requests has its answer; earlier ones still wait."""
    oldest, found = talker.next_id - count, []
    while len(found) < count:
        for answer in talker.receive():
            if answer["id"] > oldest:
                error = answer.get("error", {})
                found.append((error.get("code", "granted"), error.get("retry_after_s") or 0.0))
    return found
