"""Retention carried out with real files: tombstones, the trash, its end, and what was not ours."""

import os
import shutil
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from sqlalchemy import update

from ckptd.catalog import checkpoints, schema, tombstones
from ckptd.errors import RootDegraded
from ckptd.model import State
from ckptd.pipeline import retain, trash, verify
from ckptd.worker.protocol import DamageRecord, Purge, Trash
from tests.support.in_process import Training, daemon, eventually

pytestmark = pytest.mark.usefixtures("still_upkeep")


async def state(node, checkpoint: str) -> State:
    return await node.read(lambda conn: checkpoints.state_of(conn, checkpoint))


async def trashed(node, line, count: int, name: str = "run") -> list[str]:
    """Save one more than `count` and have all but the last retired; nothing may be moved before it is told to."""
    training = await Training(line, str(node.runs), name=name).open()
    ids = [await training.saved(step) for step in range(1, count + 2)]

    async def done() -> bool:
        return not await node.parts.jobs.unfinished()

    await eventually(done)
    return ids[:count]


def only_last(node) -> None:
    rules = type(node.parts.settings.retention)(keep_last=1, trash_grace_s=0)
    node.parts.admission.current = node.parts.settings.model_copy(update={"retention": rules})


async def test_a_trash_that_fails_half_way_is_carried_on_and_holds_up_nothing(short_dir, monkeypatch):
    """Tombstones come first, so the plan stands; each file is moved on its own, now or at the next look."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(node.parts.pipeline.run, node.parts.stop, lambda: False)
                ids = await trashed(node, line, 4)
                scope.cancel()
        only_last(node)
        call, moved = node.parts.workers.call, []

        async def flaky(request, **more):
            if isinstance(request, Trash):
                moved.append(request.trash)
                if len(moved) in {2, 3}:
                    raise RootDegraded("hangs")
            return await call(request, **more)

        monkeypatch.setattr(node.parts.workers, "call", flaky)
        experiment = (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id
        await retain.apply(node.parts.tools, experiment, node.parts.admission.settings().retention)
        assert [await state(node, one) for one in ids] == [State.TRASHED] * 4
        assert len(os.listdir(node.runs / ".ckptd-trash")) == 2
        assert await trash.resume(node.parts.tools) == 2, "only what was not moved yet"
        assert sorted(os.listdir(node.runs / ".ckptd-trash")) == sorted(ids)
        assert await trash.resume(node.parts.tools) == 0


async def told_by_a_clock_that_was_ahead(tx) -> None:
    await tx.conn.execute(update(schema.checkpoint).values(trashed_at=tx.clock.now() + timedelta(days=1)))


async def test_a_restart_looks_at_every_tombstone_once_however_many_there_are(short_dir, monkeypatch):
    monkeypatch.setattr(trash, "MOVES_MAX", 2)
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await trashed(node, line, 5)
        experiment = (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id

        async def bury(tx):
            for one in ids:
                await checkpoints.mark_trashed(tx, one, one, "test")

        await node.write(bury)  # and the daemon dies before it moves anything
        assert experiment
    monkeypatch.setattr(trash, "LOOKED_MAX", 2)
    async with daemon(short_dir, front=False) as node:
        await node.write(told_by_a_clock_that_was_ahead)
        assert [await trash.resume(node.parts.tools) for _ in range(2)] == [5, 0]
        assert sorted(os.listdir(node.runs / ".ckptd-trash")) == sorted(ids)
        assert node.parts.tools.moved == set(ids)
        await trash.restore(
            node.parts.tools, await node.read(lambda conn: checkpoints.get(conn, ids[0])), 0, 0, pin=True
        )
        await node.write(lambda tx: checkpoints.mark_missing(tx, ids[1], "somebody emptied the trash"))
        assert await trash.resume(node.parts.tools) == 0
        assert node.parts.tools.moved == set(ids[2:]), "what is retired no more is forgotten"


async def test_a_purge_that_fails_for_one_goes_on_with_the_others(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await trashed(node, line, 3)
        only_last(node)
        experiment = (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id
        await retain.apply(node.parts.tools, experiment, node.parts.admission.settings().retention)
        call = node.parts.workers.call

        async def flaky(request, **more):
            if isinstance(request, Purge) and request.trash == ids[0]:
                raise RootDegraded("hangs")
            return await call(request, **more)

        with monkeypatch.context() as patch:
            patch.setattr(node.parts.workers, "call", flaky)
            assert await trash.purge(node.parts.tools) == 2
        assert [await state(node, one) for one in ids] == [State.TRASHED, State.DROPPED, State.DROPPED]
        assert await trash.purge(node.parts.tools) == 1
        assert os.listdir(node.runs / ".ckptd-trash") == []


@pytest.mark.parametrize("page", [1, 3])
async def test_what_can_not_be_unlinked_and_what_is_not_due_hold_up_nothing_that_comes_after(
    short_dir, monkeypatch, page
):
    """However many of them come first: each look takes in a page."""
    monkeypatch.setattr(trash, "PURGES_MAX", 1)
    monkeypatch.setattr(tombstones, "PAGE", page)
    async with daemon(short_dir) as node, node.connect() as line, node.connect() as other:
        young, old = await trashed(node, line, 2), await trashed(node, other, 4, name="other")
        only_last(node)
        slow = type(node.parts.settings.retention)(keep_last=1, trash_grace_s=1e15)
        settings = node.parts.admission.settings()
        for one in (young[0], old[0]):
            experiment = (await node.read(lambda conn, of=one: checkpoints.get(conn, of))).experiment_id
            await retain.apply(node.parts.tools, experiment, settings.retention)
        monkeypatch.setattr(
            type(settings), "rules_for", lambda self, _, name: slow if name == "run" else self.retention
        )
        call = node.parts.workers.call

        async def flaky(request, **more):
            if isinstance(request, Purge) and request.trash == old[0]:
                raise RootDegraded("hangs")
            return await call(request, **more)

        monkeypatch.setattr(node.parts.workers, "call", flaky)
        assert [await trash.purge(node.parts.tools) for _ in range(4)] == [1, 1, 1, 0]
        assert [await state(node, one) for one in young] == [State.TRASHED] * 2
        assert [await state(node, one) for one in old] == [State.TRASHED, *[State.DROPPED] * 3]
        assert node.parts.tools.delayed == {old[0]}


async def test_what_is_not_ours_any_more_is_never_moved_or_unlinked(short_dir):
    """A directory under the old name with other bytes belongs to whoever made it."""
    async with daemon(short_dir) as node, node.connect() as line:
        [one] = await trashed(node, line, 1)
        path = Path((await node.read(lambda conn: checkpoints.get(conn, one))).path)
        shutil.rmtree(path)
        path.mkdir()
        (path / "theirs").write_text("precious")
        await node.write(lambda tx: checkpoints.mark_trashed(tx, one, one, "test"))
        only_last(node)
        await trash.purge(node.parts.tools)
        assert (path / "theirs").read_text() == "precious"
        assert await state(node, one) is State.MISSING, "it was not dropped by us: it was not there"


async def renumbered(tx) -> None:
    """The machine started again: every disk has another number than the catalog knows."""
    await tx.conn.execute(update(schema.checkpoint).values(dev=schema.checkpoint.c.dev + 1))


async def test_a_disk_with_another_number_after_a_restart_is_emptied_as_before(short_dir):
    """Else nothing would be moved, and yet the row would say that it was dropped: a leak for ever."""
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await trashed(node, line, 2)
        await node.write(renumbered)
        only_last(node)
        experiment = (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id
        await retain.apply(node.parts.tools, experiment, node.parts.admission.settings().retention)
        assert sorted(os.listdir(node.runs / ".ckptd-trash")) == sorted(ids)
        assert _steps(node) == ["step_0000000003"]
        node.parts.tools.moved.clear()  # and once more, between the move and the unlink
        assert await trash.purge(node.parts.tools) == 2
        assert os.listdir(node.runs / ".ckptd-trash") == []
        assert [await state(node, one) for one in ids] == [State.DROPPED] * 2


async def test_what_was_lost_before_it_could_be_retired_is_missing_and_never_dropped(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        [one] = await trashed(node, line, 1)
        path = Path((await node.read(lambda conn: checkpoints.get(conn, one))).path)
        path.rename(short_dir / "kept")
        await node.write(lambda tx: checkpoints.mark_trashed(tx, one, one, "test"))
        only_last(node)
        assert await trash.purge(node.parts.tools) == 0
        row = await node.read(lambda conn: checkpoints.get(conn, one))
        assert (row.state, row.trashed_at) == (State.MISSING, None)
        assert "when it was to be retired" in row.error["message"]
        (short_dir / "kept").rename(path)
        await line.ask("rebuild")

        async def live() -> bool:
            return await state(node, one) is State.LIVE

        await eventually(live)


async def test_a_crash_between_the_unlink_and_its_note_ends_as_dropped(short_dir, monkeypatch):
    """The note before the unlink tells the next daemon that what is gone was in the trash, and not lost."""
    async with daemon(short_dir) as node, node.connect() as line:
        [one] = await trashed(node, line, 1)
        only_last(node)
        experiment = (await node.read(lambda conn: checkpoints.get(conn, one))).experiment_id
        await retain.apply(node.parts.tools, experiment, node.parts.admission.settings().retention)

        async def dies(*_):
            raise RootDegraded("the daemon dies here")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "mark_dropped", dies)
            assert await trash.purge(node.parts.tools) == 0
        assert os.listdir(node.runs / ".ckptd-trash") == []
        node.parts.tools.moved.clear()
        assert await trash.purge(node.parts.tools) == 1
        assert await state(node, one) is State.DROPPED


async def test_ten_newest_stay_exactly_and_a_restart_changes_nothing(short_dir):
    """M093."""
    settings = {"retention": {"keep_last": 3}}
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        for step in range(1, 7):
            await training.saved(step)

        async def three() -> bool:
            return len(_steps(node)) == 3

        await eventually(three)
    async with daemon(short_dir, **settings) as node:
        await anyio.sleep(0.3)
        assert _steps(node) == ["step_0000000004", "step_0000000005", "step_0000000006"]


def _steps(node) -> list[str]:
    return sorted(name for name in os.listdir(node.runs / "demo/run") if name.startswith("step_"))


@pytest.mark.parametrize(("mib", "named"), [(3, 3), (5000, verify.DAMAGED_MIB_MAX)])
def test_a_map_of_endless_damage_is_cut_so_that_it_can_be_told(mib, named):
    found = verify._damage(DamageRecord("model", "digest", "", list(range(mib))))
    assert len(found.mib) == named
    assert found.detail == ("" if mib == named else "5000 MiB in all")
