"""SIGKILL in the middle of writes: what was acknowledged is there, the rest is whole or absent.

(The kernel still writes what a killed process had written, so this says nothing about power cuts:
test_power_cut_catalog.py does.)
"""

import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from ckptd.catalog.roots import NewRoot, ensure
from ckptd.model import RootKind
from tests.support import deaths, tally
from tests.support.catalog import UID, opened
from tests.unit.catalog.test_opening import NextVersion

POINTS = (
    "catalog.commit:9", "catalog.committed:9", "catalog.truncate", "catalog.truncated",
    "catalog.snapshot", "catalog.migrate", "catalog.migrated",
)  # fmt: skip
MANY_BYTES, FEW_BYTES = 64 << 20, 64 << 10  # of the write-ahead log before it is truncated
LONG_KILLS = int(os.environ.get("CKPTD_FAULT_CATALOG_KILLS", "250"))


def killed_while_writing(
    path: Path, name: str, *, after: int = 1, after_s: float = 0.0, fail: str = "", wal_bytes_max: int = MANY_BYTES
) -> set[str]:
    """Let a process write until it has told `after` ids, and is killed; return those that it was told are committed."""
    child = deaths.Child(deaths.write_catalog, str(path), name, fail, wal_bytes_max)
    acknowledged = set()
    if not fail:
        acknowledged = {child.hear() for _ in range(after)} - {None}
        time.sleep(after_s)
        child.kill()
    acknowledged |= set(child.told())
    assert child.ended() == -signal.SIGKILL
    tally.add("kills")
    return {one for one in acknowledged if one}


def check(path: Path, acknowledged: set[str]) -> set[str]:
    """Every acknowledged checkpoint is there with all its rows, and no checkpoint is there without them."""
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
    found = {row[0]: row[1] for row in raw.execute("SELECT id, sequence FROM checkpoint")}
    assert acknowledged <= found.keys()
    for table, wanted in (("checkpoint_metric", 2), ("checkpoint_tag", 2), ("file", 1)):
        counts = dict(raw.execute(f"SELECT checkpoint_no, count(*) FROM {table} GROUP BY checkpoint_no"))
        assert counts == dict.fromkeys(found.values(), wanted)
    assert {row[0] for row in raw.execute("SELECT checkpoint_id FROM job")} == found.keys()
    assert {row[0] for row in raw.execute("SELECT DISTINCT state FROM checkpoint")} <= {"live"}
    verified = raw.execute("SELECT checkpoint_id FROM event WHERE name = 'checkpoint.verified'").fetchall()
    assert {row[0] for row in verified} <= found.keys()
    assert len(verified) == len({row[0] for row in verified})
    raw.close()
    return set(found)


def test_acknowledged_commits_survive_a_kill_at_any_time(tmp_path: Path) -> None:
    """M032, M041: round after round on the same file, so that each start recovers the WAL of the last."""
    path = tmp_path / "c.sqlite"
    acknowledged: set[str] = set()
    for round_no, after_s in enumerate((0.0, 0.02, 0.05, 0.11, 0.17)):
        acknowledged |= killed_while_writing(path, f"run-{round_no}", after=1 + round_no, after_s=after_s)
        check(path, acknowledged)
    assert len(acknowledged) >= 10


@pytest.mark.parametrize("point", ["catalog.commit:9", "catalog.committed:9"])
def test_a_kill_just_before_or_after_the_commit_leaves_all_or_nothing(tmp_path: Path, point: str) -> None:
    """F1: between the last statement and COMMIT, and between COMMIT and the acknowledgement."""
    path = tmp_path / "c.sqlite"
    acknowledged = killed_while_writing(path, "run", fail=f"{point}=kill")
    found = check(path, acknowledged)
    assert acknowledged
    if point.startswith("catalog.committed"):
        assert found > acknowledged, "committed, though nobody was told: the hand-off is repeated and found known"


@pytest.mark.parametrize("point", ["catalog.truncate", "catalog.truncated"])
def test_a_kill_around_the_truncation_of_the_log_loses_nothing(tmp_path: Path, point: str) -> None:
    """F1: the log holds what the file does not, until it was moved there."""
    path = tmp_path / "c.sqlite"
    acknowledged = killed_while_writing(path, "run", fail=f"{point}=kill", wal_bytes_max=FEW_BYTES)
    assert acknowledged
    check(path, acknowledged)
    check(path, acknowledged | killed_while_writing(path, "again", after_s=0.05))


async def test_a_kill_around_a_migration_leaves_the_old_catalog_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F20: the snapshot is made first; every statement in between is killed at in test_opening.py."""
    path = tmp_path / "c.sqlite"
    async with opened(path) as catalog:
        await catalog.write(lambda tx: ensure(tx, NewRoot(path="/data", kind=RootKind.WATCHED, uid=UID)))
    NextVersion(tmp_path / "next", monkeypatch)
    for point in ("catalog.snapshot", "catalog.migrate", "catalog.migrated"):
        child = deaths.Child(deaths.migrate, str(path), str(tmp_path / "next"), point)
        assert child.hear() == point
        child.kill()
        assert child.ended() == -signal.SIGKILL
        tally.add("kills")
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
def test_acknowledged_commits_survive_hundreds_of_kills(tmp_path: Path) -> None:
    """F1, M041, long: at random times and points, on files that are never closed in an orderly way."""
    seed = int(os.environ.get("CKPTD_FAULT_SEED", "1"))
    print(f"seed {seed}, {LONG_KILLS} kills")
    dice = random.Random(seed)
    path, acknowledged = tmp_path / "c.sqlite", set[str]()
    for number in range(LONG_KILLS):
        if number % 25 == 0:
            path, acknowledged = tmp_path / f"c-{number}.sqlite", set()
        fail = dice.choice(
            ["", "", f"catalog.commit:{dice.randint(1, 40)}=kill", f"catalog.committed:{dice.randint(1, 40)}=kill"]
        )
        limit = dice.choice([MANY_BYTES, FEW_BYTES])
        told = killed_while_writing(path, f"run-{number}", after_s=dice.random() * 0.1, fail=fail, wal_bytes_max=limit)
        acknowledged |= told
        check(path, acknowledged)
