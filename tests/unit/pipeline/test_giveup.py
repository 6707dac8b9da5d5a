"""A save that is on its way is given up by a person, and by nobody else."""

from contextlib import asynccontextmanager

import anyio
import pytest

from ckptd import pipeline
from ckptd.catalog import audits, checkpoints, holds
from ckptd.errors import BadPath, Busy, Changed, Held, Vetoed
from ckptd.intake.arenas import Use
from ckptd.model import State
from ckptd.pipeline import asking
from tests.support.in_process import Keeper, Training, daemon, eventually

QUICK = {"retries_max": 1, "backoff_s_max": 0.05}


@pytest.fixture
def in_the_way(monkeypatch):
    """Something that no try gets past, until it is taken away."""
    real, gone = pipeline.STAGES["publish"], anyio.Event()
    monkeypatch.setattr(pipeline, "PARKED_FIRST_S", 3600.0)  # what is parked is tried by the test alone

    async def run(job, tools):
        if gone.is_set():
            return await real(job, tools)
        raise BadPath("a symlink lies on the way")

    monkeypatch.setitem(pipeline.STAGES, "publish", run)
    return gone


@asynccontextmanager
async def parked(directory, keeper=None):
    """A daemon with a save that it can't write; yield the node, a connection and the save."""
    async with daemon(directory, keeper, jobs=QUICK) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).save(1)

        async def is_parked() -> bool:
            return (await line.ask("status"))["jobs"]["parked"] == 1

        await eventually(is_parked)
        yield node, line, checkpoint


async def state_of(node, checkpoint):
    return await node.read(lambda conn: checkpoints.state_of(conn, checkpoint))


async def test_it_is_held_unless_that_is_said_and_a_look_changes_nothing(short_dir, in_the_way):
    async with parked(short_dir) as (node, line, checkpoint):
        with pytest.raises(Held, match="on its way") as refused:
            await line.ask("remove", selector=checkpoint)
        assert "--give-up" in refused.value.hint
        looked = await line.ask("remove", selector=checkpoint, dry_run=True, give_up=True)
        assert looked["action"] == "give up"
        assert await state_of(node, checkpoint) is State.PENDING
        in_the_way.set()
        assert await node.parts.jobs.try_parked() == 1
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)


async def test_its_memory_is_free_its_trainer_is_told_and_the_audit_says_who_did_it(short_dir, in_the_way):
    async with parked(short_dir) as (node, line, checkpoint):
        await line.ask("remove", selector=checkpoint, give_up=True)
        told = await line.push("level", checkpoint=checkpoint, state="failed")
        assert told["error"]["code"] == "given_up"
        assert await state_of(node, checkpoint) is State.FAILED
        assert not [arena for arena in node.parts.pool.all() if arena.use is Use.BUSY]
        assert not await node.parts.jobs.unfinished()
        entries, _ = await node.read(audits.page)
        assert [entry.deed.verb for entry in entries if entry.deed.subject == checkpoint] == ["give_up"]
        with pytest.raises(Changed, match="is failed now"):
            await line.ask("remove", selector=checkpoint, give_up=True, state="pending")
        assert (await line.ask("remove", selector=checkpoint))["action"] == "forget"


async def test_what_was_written_meanwhile_is_not_removed_by_giving_up(short_dir, in_the_way):
    """Whoever reads of a parked save and acts a moment later means the save, not the checkpoint that came of it."""
    async with parked(short_dir) as (node, line, checkpoint):
        training = await Training(line, str(node.runs), name="other").open()
        in_the_way.set()
        await training.saved(1)
        assert await node.parts.jobs.try_parked() == 1
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
        await training.saved(2)
        for dry_run in (True, False):
            with pytest.raises(Changed, match="nothing was done"):
                await line.ask("remove", selector=checkpoint, give_up=True, dry_run=dry_run)
        assert await state_of(node, checkpoint) is State.LIVE


async def test_a_hook_may_forbid_it(short_dir, in_the_way, monkeypatch):
    async def about(_tools, point, _row, **_more):
        return f"not this one ({point})"

    async with parked(short_dir) as (node, line, checkpoint):
        monkeypatch.setattr(asking, "about", about)
        with pytest.raises(Vetoed, match=r"not this one \(checkpoint.before_delete\)"):
            await line.ask("remove", selector=checkpoint, give_up=True)
        assert await state_of(node, checkpoint) is State.PENDING


async def test_a_pin_holds_it(short_dir, in_the_way):
    async with parked(short_dir) as (node, line, checkpoint):
        await node.write(lambda tx: holds.pin(tx, checkpoint, 1000))
        for dry_run in (True, False):
            with pytest.raises(Held, match="pin"):
                await line.ask("remove", selector=checkpoint, give_up=True, dry_run=dry_run)
        assert await state_of(node, checkpoint) is State.PENDING


async def test_one_that_is_being_written_is_left_to_it(short_dir, monkeypatch):
    real, begun, gate = pipeline.STAGES["publish"], anyio.Event(), anyio.Event()

    async def run(job, tools):
        begun.set()
        await gate.wait()
        return await real(job, tools)

    monkeypatch.setitem(pipeline.STAGES, "publish", run)
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).save(1)
        await begun.wait()
        with pytest.raises(Busy, match="worked on"):
            await line.ask("remove", selector=checkpoint, give_up=True)
        gate.set()
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)


@pytest.mark.parametrize("in_spool", [False, True])
async def test_it_does_not_come_back_when_the_daemon_died_before_its_bytes_were_gone(
    short_dir, in_the_way, monkeypatch, *, in_spool
):
    keeper, spool = Keeper(), short_dir / "state/spool"

    async def died(_checkpoint):
        """Nothing is done any more."""

    async with parked(short_dir, None if in_spool else keeper) as (node, line, checkpoint):
        monkeypatch.setattr(node.parts.tools.sources, "drop", died)
        await line.ask("remove", selector=checkpoint, give_up=True)
        if in_spool:
            await node.parts.spool.spill(node.parts.pool.of_checkpoint(checkpoint))
            assert list(spool.iterdir())
    in_the_way.set()
    async with daemon(short_dir, keeper, jobs=QUICK) as node, node.connect() as line:
        await eventually(lambda: not list(spool.iterdir()))
        assert not [arena for arena in node.parts.pool.all() if arena.use is Use.BUSY]
        jobs = (await line.ask("status"))["jobs"]
        assert (jobs["queued"], jobs["running"], jobs["parked"]) == (0, 0, 0)
        assert await state_of(node, checkpoint) is State.FAILED
        assert not list(node.runs.glob("*/*/step_*"))
    keeper.close()
