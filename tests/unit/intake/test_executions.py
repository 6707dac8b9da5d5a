"""Executions of one experiment over a catalog that was lost or put back: the newest stays the newest.

Retention takes what an earlier execution saved for older, whatever its steps. A catalog that counted executions
from one again would have every new save retired at once, and each resume begin where the old catalog ended.
"""

import os
import shutil
from pathlib import Path

from ckptd.catalog import checkpoints, listing
from ckptd.model import State
from tests.support.in_process import Node, Training, daemon, eventually

KEEP_TWO = {"keep_last": 2, "trash_grace_s": 0}


async def idle(node: Node) -> None:
    async def rests() -> bool:
        return not await node.parts.jobs.unfinished()

    await eventually(rests)


async def execute(node: Node, *steps: int) -> tuple[int, list[str]]:
    """Run the job once: return its segment and what it saved."""
    async with node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        saved = [await training.saved(step, segment=training.answer["segment"]) for step in steps]
        await line.ask("experiment.close", experiment=training.experiment, status="completed", error=None)
    await idle(node)
    return training.answer["segment"], saved


def forget(state: Path) -> None:
    """Lose the catalog."""
    for file in state.glob("catalog.sqlite*"):
        file.unlink()


async def assert_newest(node: Node, saved: list[str]) -> None:
    """What was saved last is kept, and is what a resume begins with."""
    rows = await node.read(lambda conn: checkpoints.get_many(conn, saved))
    assert rows[saved[0]].state in {State.TRASHED, State.DROPPED}
    assert [rows[one].state for one in saved[1:]] == [State.LIVE, State.LIVE]
    latest = await node.read(lambda conn: listing.latest(conn, rows[saved[0]].experiment_id))
    assert latest is not None
    assert latest.id == saved[-1]
    assert os.readlink(node.runs / "demo" / "run" / "latest") == os.path.basename(rows[saved[-1]].path)


async def test_after_a_rebuild_the_next_execution_is_newer_than_all_that_the_disk_holds(short_dir: Path):
    """M040: the catalog is lost, made again, and the job resumes."""
    async with daemon(short_dir) as node:
        for first in (100, 300, 500):
            await execute(node, first, first + 100)
    forget(short_dir / "state")
    async with daemon(short_dir, retention=KEEP_TWO) as node:
        async with node.connect() as line:
            await line.ask("rebuild", root=str(node.runs))
        await idle(node)
        segment, saved = await execute(node, 601, 602, 603)
        assert segment == 4
        await assert_newest(node, saved)


async def test_a_job_that_resumes_before_anybody_has_looked_is_newer_than_all_that_the_disk_holds(short_dir: Path):
    """Nobody has asked for a rebuild: the first that the new catalog hears of the root is the job itself."""
    async with daemon(short_dir) as node:
        for first in (100, 300):
            await execute(node, first, first + 100)
    forget(short_dir / "state")
    async with daemon(short_dir, retention=KEEP_TWO) as node:
        segment, saved = await execute(node, 401, 402, 403)
        assert segment == 3
        await assert_newest(node, saved)


async def test_a_catalog_put_back_from_a_copy_counts_on_from_what_the_disk_holds(short_dir: Path):
    """A copy is older than the executions that came after it."""
    async with daemon(short_dir) as node:
        await execute(node, 100)
    shutil.copytree(short_dir / "state", short_dir / "copy", ignore=shutil.ignore_patterns("*lock", "*sock*"))
    async with daemon(short_dir) as node:
        await execute(node, 200)
        await execute(node, 300)
    forget(short_dir / "state")
    for file in (short_dir / "copy").glob("catalog.sqlite*"):
        shutil.copy(file, short_dir / "state")
    async with daemon(short_dir, retention=KEEP_TWO) as node:
        segment, saved = await execute(node, 301, 302, 303)
        assert segment == 4
        await assert_newest(node, saved)


async def test_a_trainer_that_lives_on_over_a_lost_catalog_is_older_than_the_execution_after_it(short_dir: Path):
    """Its save is the first that the new catalog hears of, under the number that the old one gave it."""
    async with daemon(short_dir) as node:
        await execute(node, 100)
        await execute(node, 200)
    forget(short_dir / "state")
    shutil.rmtree(short_dir / "runs")
    async with daemon(short_dir, retention=KEEP_TWO) as node:
        async with node.connect() as line:
            old = await Training(line, str(node.runs)).open()
            await old.saved(250, segment=2)
        segment, saved = await execute(node, 251, 252, 253)
        assert segment == 3
        await assert_newest(node, saved)
