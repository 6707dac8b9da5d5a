"""Power cuts under the catalog: commits that somebody was told of are there, on ext4 and on XFS."""

import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.catalog.roots import NewRoot, ensure
from ckptd.model import RootKind
from tests.crash.test_catalog_crash import FEW_BYTES, MANY_BYTES, check
from tests.support import deaths, tally
from tests.support.catalog import UID, opened
from tests.support.disk import Disk
from tests.unit.catalog.test_opening import NextVersion

pytestmark = pytest.mark.xdist_group("loop")

STATEMENTS = 6  # of the migration that are tried: its first ones, which make and fill the new table
LONG_CUTS = int(os.environ.get("CKPTD_FAULT_CATALOG_CUTS", "60"))


@pytest.fixture(params=["ext4", "xfs"])
def disk(disks: Callable[[str], Disk], request: pytest.FixtureRequest) -> Iterator[Disk]:
    found = disks(request.param)
    cuts = found.cuts
    yield found
    tally.add(found.counted, found.cuts - cuts)
    for path in found.path.glob("c*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    found.settle()


def cut_while_writing(
    disk: Disk, path: Path, name: str, after_s: float, *, after: int = 1, wal_bytes_max: int = MANY_BYTES
) -> set[str]:
    """Cut the power under a process that commits, some time after so many were told; return what it had told by then."""
    child = deaths.Child(deaths.write_catalog, str(path), name, "", wal_bytes_max)
    told = {child.hear() for _ in range(after)}
    time.sleep(after_s)
    told |= set(child.heard())
    disk.cut()
    child.kill()
    child.told()  # of what it says now nobody would have heard
    child.ended()
    disk.replay()
    return {one for one in told if one}


def test_commits_that_were_acknowledged_before_the_power_failed_are_there(disk: Disk) -> None:
    """F3, M041: synchronous=FULL, cut while four trainers commit; each start recovers the log of the last."""
    path, acknowledged = disk.path / "c.sqlite", set[str]()
    for number, after_s in enumerate((0.0, 0.05, 0.1)):
        acknowledged |= cut_while_writing(disk, path, f"run-{number}", after_s, after=1 + 4 * number)
        check(path, acknowledged)
    assert len(acknowledged) >= 15


def test_without_an_fsync_for_each_commit_the_same_cut_loses_commits(disk: Disk) -> None:
    """F5: the cut has teeth. synchronous=NORMAL, which SQLite recommends for a WAL, forgets what was acknowledged."""
    path = disk.path / "c.sqlite"
    child = deaths.Child(deaths.write_carelessly, str(path), "run")
    told = {child.hear() for _ in range(20)}
    assert None not in told, "it died before"
    disk.cut()
    child.kill()
    child.told()
    child.ended()
    disk.replay()
    raw = sqlite3.connect(path)
    try:
        found = {row[0] for row in raw.execute("SELECT id FROM checkpoint")}
    except sqlite3.DatabaseError:
        found = set()  # not even the tables
    finally:
        raw.close()
    assert not told <= found


async def test_a_migration_whose_power_fails_leaves_the_old_catalog_or_the_new_one(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F3, F20: with the snapshot beside it, whole."""
    path = disk.path / "c.sqlite"
    async with opened(path) as catalog:
        await catalog.write(lambda tx: ensure(tx, NewRoot(path="/data", kind=RootKind.WATCHED, uid=UID)))
    disk.settle()
    NextVersion(tmp_path / "next", monkeypatch)
    steps = [("catalog.snapshot", 1), *(("catalog.migrate", n) for n in range(1, STATEMENTS)), ("catalog.migrated", 1)]
    for point, nth in steps:
        child = deaths.Child(deaths.migrate, str(path), str(tmp_path / "next"), point, nth)
        assert child.hear() == point
        disk.cut()
        child.kill()
        child.ended()
        disk.replay()
        raw = sqlite3.connect(path)
        version = raw.execute("SELECT version_num FROM alembic_version").fetchone()[0]
        columns = {row[1] for row in raw.execute("PRAGMA table_info(root)")}
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert raw.execute("SELECT path FROM root").fetchall() == [("/data",)]
        raw.close()
        assert version == ("0002" if point == "catalog.migrated" else "0001")
        assert ("color" in columns) == (version == "0002")


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_acknowledged_commits_survive_power_cuts_at_random_times(disk: Disk) -> None:
    """F3, M041, long."""
    seed = int(os.environ.get("CKPTD_FAULT_SEED", "1"))
    print(f"seed {seed}, {LONG_CUTS} cuts on {disk.kind}")
    dice = random.Random(seed)
    path, acknowledged = disk.path / "c.sqlite", set[str]()
    for number in range(LONG_CUTS):
        if number % 20 == 0:
            path, acknowledged = disk.path / f"c-{number}.sqlite", set()
        limit = dice.choice([MANY_BYTES, FEW_BYTES])
        acknowledged |= cut_while_writing(disk, path, f"run-{number}", dice.random() * 0.15, wal_bytes_max=limit)
        check(path, acknowledged)
