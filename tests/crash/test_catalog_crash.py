"""SIGKILL in the middle of writes: what was acknowledged is there, the rest is whole or absent.

(The kernel still writes what a killed process had written, so this says nothing about power cuts:
those are the business of synchronous=FULL, which test_opening.py finds set.)
"""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

WRITER = """
import asyncio, sys
from pathlib import Path
from random import Random
import anyio
from ckptd import config
from ckptd.catalog import checkpoints
from ckptd.jobs import Jobs, NewJob
from tests.support.catalog import *

async def main():
    async with opened(Path(sys.argv[1])) as catalog:
        jobs = Jobs(catalog, config.Jobs(), StillClock(), Random(1))
        async def trainer(name):
            known = await experiment(catalog, name=name)
            step = 0
            while True:
                new = a_checkpoint(known, step, metrics={"loss": 1.0, "acc": 2.0}, tags=("a", "b"))
                async def save(tx):
                    await climb(tx, new)
                    await jobs.enqueue(tx, NewJob(checkpoint_id=new.id, lane=known, stage="verify"))
                await catalog.write(save)
                print(new.id, flush=True)
                step += 1
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(trainer, f"run{number}-{sys.argv[2]}")
asyncio.run(main())
"""


def killed_while_writing(path: Path, round_no: int, *, after_s: float = 0.0, fail: str = "") -> set[str]:
    """Let a process write until it is killed; return the ids it was told are committed."""
    environment = {**os.environ, "CKPTD_FAIL": fail}
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(round_no)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    acknowledged = set()
    if not fail:
        acknowledged.add(child.stdout.readline().strip())
        time.sleep(after_s)
        child.kill()
    acknowledged |= {line.strip() for line in child.stdout if line.endswith("\n")}
    child.stdout.close()
    assert child.wait() == -9
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
    assert sorted(row[0] for row in verified) == sorted(found)
    raw.close()
    return set(found)


def test_acknowledged_commits_survive_a_kill_at_any_time(tmp_path: Path) -> None:
    """M032, M041: round after round on the same file, so that each start recovers the WAL of the last."""
    path = tmp_path / "c.sqlite"
    acknowledged: set[str] = set()
    for round_no, after_s in enumerate((0.0, 0.02, 0.05, 0.11, 0.17)):
        acknowledged |= killed_while_writing(path, round_no, after_s=after_s)
        check(path, acknowledged)
    assert len(acknowledged) >= 10


@pytest.mark.parametrize("point", ["catalog.commit:9", "catalog.committed:9"])
def test_a_kill_just_before_or_after_the_commit_leaves_all_or_nothing(tmp_path: Path, point: str) -> None:
    """F1: between the last statement and COMMIT, and between COMMIT and the acknowledgement."""
    path = tmp_path / "c.sqlite"
    acknowledged = killed_while_writing(path, 0, fail=f"{point}=kill")
    found = check(path, acknowledged)
    assert acknowledged
    if point.startswith("catalog.committed"):
        assert found > acknowledged, "committed, though nobody was told: the hand-off is repeated and found known"
