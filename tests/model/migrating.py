"""The migration of a catalog: first a snapshot of it, then the steps, which are one transaction."""

import sqlite3
from contextlib import closing
from pathlib import Path

import anyio

from ckptd.catalog import sqlite
from tests.model.explore import Says, Tree
from tests.model.recorder import Recorder
from tests.model.scenario import Edge, Scenario

LIVE, SNAPSHOT = "catalog.sqlite", "catalog.sqlite.before"
ROWS = 20
EDGES = (Edge("fsync sqlite.copy", "Move"), Edge("fsync sqlite.copy", "says migrated"), Edge("Move", "says migrated"))


def snapshot_taken() -> Scenario:
    """What `ckptd` does before it migrates; the catalog itself is one unit with a journal of its own."""

    def prepare(root: Path) -> None:
        with closing(sqlite3.connect(root / LIVE)) as made:
            made.execute("CREATE TABLE t (a)")
            made.executemany("INSERT INTO t VALUES (?)", [("row" * 100,)] * ROWS)
            made.commit()

    def run(recorder: Recorder) -> None:
        anyio.run(sqlite.snapshot, recorder.root / LIVE, recorder.root / SNAPSHOT)
        recorder.say("migrated", (recorder.root / SNAPSHOT).read_bytes())

    return Scenario("snapshot before a migration", run, check, prepare=prepare, edges=EDGES)


def check(tree: Tree, says: Says) -> str:
    """F20: the snapshot is whole or not there, and there once the catalog is migrated."""
    found = tree.get(SNAPSHOT)
    if says and found != says[-1].fact:
        return "F20: the catalog is migrated and its snapshot is not whole"
    return "" if found is None or _rows(found) == ROWS else "F20: a snapshot that is not whole"


_counted: dict[bytes, int] = {}


def _rows(image: object) -> int:
    if not isinstance(image, bytes) or not image:
        return -1
    if image not in _counted:
        try:
            with closing(sqlite3.connect(":memory:")) as opened:
                opened.deserialize(image)
                damage = opened.execute("PRAGMA integrity_check").fetchone() != ("ok",)
                _counted[image] = -1 if damage else opened.execute("SELECT count(*) FROM t").fetchone()[0]
        except (sqlite3.Error, MemoryError):  # the latter for what is no database at all
            _counted[image] = -1
    return _counted[image]
