"""A hundred thousand known files: the first look, every later one, a burst beside them, and what standing by costs."""

import itertools
import os
import sqlite3
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from tests.bench_load.outcome import Limit, Outcome, bounded, percentile
from tests.bench_load.plant import Plant, planted, rss_bytes, spent
from tests.bench_load.scale import Scale
from tests.bench_load.tree import grow, know
from tests.support.node import eventually

QUICK_S = 3.0  # between two looks, while looks are timed
SCANS = 5
REST_S_MAX = 2.0  # intake/reconcile.py: a root rests as long as its scan took, so long at most
FOUND_S = 120.0
IDLE_CPU, WAKEUPS = 0.5, 10.0
RSS_IDLE_MIB = 120.0


def measure(scale: Scale) -> Iterator[Outcome]:
    """Return the rows of this file."""
    with planted(scale.folder) as plant:
        yield from _nothing_to_do(plant, scale)
    with planted(scale.folder, more=f"[watching]\nreconcile_s = {QUICK_S}\nreconcile_max_s = {QUICK_S}\n") as plant:
        root = plant.dir / "w"
        begun_s = time.monotonic()
        grow(root, scale.known)
        assert know(plant.state / "catalog.sqlite", root, os.getuid()) == scale.known
        made_s = time.monotonic() - begun_s
        yield from _looks(plant, scale, made_s)
        plant.configure("")  # as often as in production, from the next look on
        plant.ask("reload")
        yield _standing_by(plant, scale)
        yield _burst(plant, root, scale)


def _nothing_to_do(plant: Plant, scale: Scale) -> Iterator[Outcome]:
    (plant.dir / "w").mkdir()
    plant.start()
    plant.watch(plant.dir / "w", "idle")
    time.sleep(min(5.0, scale.seconds))  # what starts slowly has started
    used = spent(plant.carriers(), scale.seconds * 2)
    pairs = [
        (Limit("RSS", RSS_IDLE_MIB, "MiB"), rss_bytes(plant.carriers()) / (1 << 20)),
        (Limit("CPU", IDLE_CPU, "% of a core"), 100 * used.cpu_s / used.wall_s),
        (Limit("wake-ups", WAKEUPS, "/s"), used.wakeups / used.wall_s),
    ]
    yield bounded("idle: daemon and one worker, an empty watched root", pairs, 1, f"over {used.wall_s:.0f} s")


def _looks(plant: Plant, scale: Scale, made_s: float) -> Iterator[Outcome]:
    begun_s = time.monotonic()
    plant.start()
    answered_s = time.monotonic() - begun_s
    eventually(lambda: _done(plant), "the first look", FOUND_S)
    looked_s = time.monotonic() - begun_s
    first = _done(plant)[0]
    assert (first["found"], first["added"], first["missing"]) == (scale.known, 0, 0), first
    note = f"until every file was compared; the first question was answered after {answered_s:.2f} s; tree made in {made_s:.0f} s"
    yield bounded(f"start over {scale.known:,} known files", [(Limit("done", 5.0, "s"), looked_s)], 1, note)
    eventually(lambda: len(_done(plant)) > SCANS, "more looks", FOUND_S)
    took_s = _durations([datetime.fromisoformat(entry["timestamp"]) for entry in _done(plant)])
    pairs = [(Limit("median", 2.0, "s"), percentile(took_s, 0.5))]
    note = f"from the times between ends of looks, of which the pauses are known; slowest {max(took_s):.2f} s"
    yield bounded(f"full reconcile of {scale.known:,} files, warm", pairs, len(took_s), note)


def _done(plant: Plant) -> list[dict[str, object]]:
    return [entry for entry in plant.news("reconcile.done") if entry["root"] == str(plant.dir / "w")]


def _durations(ends: list[datetime]) -> list[float]:
    """How long each look but the first took. Between two ends lie a rest as long as the look before, and the interval."""
    found = []
    for before, after in itertools.pairwise(ends):
        both_s = (after - before).total_seconds() - QUICK_S
        found.append(both_s / 2 if both_s < 2 * REST_S_MAX else both_s - REST_S_MAX)
    return found


def _standing_by(plant: Plant, scale: Scale) -> Outcome:
    """From the end of one scan that finds what events missed to the end of the next."""
    looks = len(_done(plant))
    # The first look after the reload may have ended already: then it is the next one, after its whole rest.
    eventually(lambda: len(_done(plant)) > looks, "a look after which it rests", max(FOUND_S, scale.interval_s))
    looks = len(_done(plant))
    used = spent(plant.carriers(), scale.interval_s, lambda: len(_done(plant)) > looks)
    pairs = [
        (Limit("CPU", IDLE_CPU, "% of a core"), 100 * used.cpu_s / used.wall_s),
        (Limit("wake-ups", WAKEUPS, "/s"), used.wakeups / used.wall_s),
    ]
    scans = len(_done(plant)) - looks
    note = f"over {used.wall_s:.0f} s, {scans} scan that finds what events missed included"
    return bounded(f"idle beside {scale.known:,} known files", pairs, 1, note)


def _burst(plant: Plant, root: Path, scale: Scale) -> Outcome:
    before = _rows(plant, root / "burst")
    assert before == (0, 0)
    begun_s = time.monotonic()
    grow(root / "burst", scale.burst)
    made_s = time.monotonic() - begun_s
    try:
        eventually(lambda: _rows(plant, root / "burst")[0] >= scale.burst, "the burst to be found", FOUND_S)
    except AssertionError:
        print(plant.tail())
    caught_s = time.monotonic() - begun_s
    rows, paths = _rows(plant, root / "burst")
    pairs = [(Limit("missed", 0, ""), float(scale.burst - paths)), (Limit("twice", 0, ""), float(rows - paths))]
    note = f"written in {made_s:.1f} s, all in the catalog {caught_s:.1f} s after the first"
    return bounded(f"burst of {scale.burst:,} files beside them", pairs, scale.burst, note)


def _rows(plant: Plant, under: Path) -> tuple[int, int]:
    """Rows, and different paths, below a directory: read past the daemon, which is not to be asked meanwhile."""
    with sqlite3.connect(f"file:{plant.state / 'catalog.sqlite'}?mode=ro", uri=True) as db:
        rows, paths = db.execute(
            "SELECT count(*), count(DISTINCT path) FROM checkpoint WHERE path >= ? AND path < ?",
            (f"{under}/", f"{under}0"),
        ).fetchone()
    db.close()
    return int(rows), int(paths)
