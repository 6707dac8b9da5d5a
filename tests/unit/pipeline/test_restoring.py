"""Out of the trash again: an answer that is lost, one that comes while the trash is emptied, and what is not it any more."""

import os
import shutil

import anyio
import pytest
from sqlalchemy import insert

from ckptd.catalog import checkpoints, holds, roots, schema, strips
from ckptd.catalog.strips import StripState
from ckptd.catalog.tombstones import under_root
from ckptd.clock import SystemClock
from ckptd.errors import Busy, Missing, NotFound, RootDegraded, TimedOut
from ckptd.model import Level, State
from ckptd.pipeline import deed, retain, trash
from ckptd.worker.protocol import Purge, Restore
from tests.support.in_process import Training, a_tensor, daemon, eventually
from tests.support.watched import a_watched, live_at, rows_at
from tests.unit.pipeline.test_keeping import follow, row, saved_alone, saves

BIN = ".ckptd-trash"


async def state(node, checkpoint: str) -> State:
    return (await row(node, checkpoint)).state


async def retired(node, line, count: int = 1) -> list[str]:
    """Save one more than `count` and have all but the last in the trash; nothing runs by itself afterwards."""
    ids = await saved_alone(node, line, count + 1)
    rules = follow(node, keep_last=1, trash_grace_s=0)
    await retain.apply(node.parts.tools, (await row(node, ids[0])).experiment_id, rules)
    assert await states(node, ids[:count]) == [State.TRASHED] * count
    return ids[:count]


async def states(node, ids: list[str]) -> list[State]:
    return [await state(node, one) for one in ids]


def binned(node) -> list[str]:
    return sorted(os.listdir(node.runs / BIN))


def in_place(node) -> list[str]:
    return sorted(one for one in os.listdir(node.runs / "demo/run") if one.startswith("step_"))


def lose(node, monkeypatch, moment: str) -> None:
    """Let the next restore fail at a moment: the question is lost, the answer is, or the catalog does not write."""
    call, restored = node.parts.workers.call, checkpoints.mark_restored

    async def lossy(request, **more):
        if isinstance(request, Restore) and moment == "question":
            raise TimedOut("silent")
        answer = await call(request, **more)
        if isinstance(request, Restore) and moment == "answer":
            raise TimedOut("silent")
        return answer

    async def busy(*arguments):
        if moment == "record":
            raise Busy("another process has the lock")
        return await restored(*arguments)

    monkeypatch.setattr(node.parts.workers, "call", lossy)
    monkeypatch.setattr(checkpoints, "mark_restored", busy)


@pytest.mark.parametrize("next_one", ["resume", "purge", "restart"])
@pytest.mark.parametrize("moment", ["question", "answer", "record"])
async def test_a_restore_whose_answer_is_lost_leaves_nothing_that_the_catalog_forgets(
    short_dir, monkeypatch, moment, next_one
):
    """Its files stood under their name, its row said trashed, and a purge of an empty trash said dropped."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        [one] = await retired(node, line)
        with monkeypatch.context() as patch:
            lose(node, patch, moment)
            with pytest.raises((TimedOut, Busy)):
                await trash.restore(node.parts.tools, await row(node, one), 0, 0, pin=True)
        assert (await state(node, one), len(binned(node)), len(in_place(node))) in {
            (State.TRASHED, 1, 1),
            (State.TRASHED, 0, 2),
        }
        if next_one == "resume":
            assert await trash.resume(node.parts.tools) == 1
            assert (binned(node), len(in_place(node))) == ([one], 1), "as before it was asked for"
            assert await trash.resume(node.parts.tools) == 0
            assert (await line.ask("restore", selector=one))["state"] == "live"
            return
        if next_one == "purge":
            assert await trash.purge(node.parts.tools) == 1
            assert (await state(node, one), binned(node), len(in_place(node))) == (State.DROPPED, [], 1)
    if next_one == "restart":
        async with daemon(short_dir, front=False) as node:
            follow(node, keep_last=1, trash_grace_s=0)
            assert (await trash.resume(node.parts.tools), binned(node)) == (1, [one])
            assert await trash.purge(node.parts.tools) == 1
            assert (await state(node, one), binned(node), len(in_place(node))) == (State.DROPPED, [], 1)


async def test_upkeep_puts_a_restore_right_whose_answer_was_lost(short_dir, monkeypatch):
    """Nothing was written, so nothing but a bell tells it that there is something to look at."""
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 2)
        await line.ask("remove", selector=ids[0])
        lose(node, monkeypatch, "answer")
        with pytest.raises(TimedOut):
            await line.ask("restore", selector=ids[0])
        await eventually(lambda: binned(node) == [ids[0]])


@pytest.mark.parametrize("moment", ["rename", "look"])
async def test_a_restore_goes_on_although_the_person_who_asked_has_hung_up(short_dir, monkeypatch, moment):
    monkeypatch.setattr(deed, "ENDS_S", 60.0)
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        [one] = await retired(node, line)
        call, look, begun, cut = node.parts.workers.call, trash._look, anyio.Event(), anyio.Event()

        async def slow(request, **more):
            answer = await call(request, **more)
            if isinstance(request, Restore) and moment == "rename":
                begun.set()
                await cut.wait()
            return answer

        async def looked(*arguments):
            if moment == "look":
                begun.set()
                await cut.wait()
            return await look(*arguments)

        monkeypatch.setattr(node.parts.workers, "call", slow)
        monkeypatch.setattr(trash, "_look", looked)
        async with node.connect() as person:
            await person.send("restore", selector=one)
            await begun.wait()
        await anyio.sleep(0.1)
        cut.set()

        async def live() -> bool:
            return await state(node, one) is State.LIVE

        await eventually(live)
        assert (binned(node), len(in_place(node))) == ([], 2)
        assert await trash.purge(node.parts.tools) == 0
        assert len(in_place(node)) == 2


async def test_a_deed_on_a_disk_that_hangs_ends_soon_after_its_caller(monkeypatch):
    monkeypatch.setattr(deed, "ENDS_S", 0.05)
    ended = []

    async def hangs() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cut")

    with anyio.fail_after(20), anyio.move_on_after(0.01) as caller:
        await deed.to_its_end(hangs)
    assert (ended, caller.cancelled_caught) == (["cut"], True)


async def test_a_deed_ends_as_it_ends_by_itself():
    async def fails() -> None:
        raise RootDegraded("hangs")

    async def is_done() -> str:
        return "done"

    with pytest.raises(RootDegraded):
        await deed.to_its_end(fails)
    assert await deed.to_its_end(is_done) == "done"


async def test_what_lies_in_its_place_after_the_trash_was_emptied_by_hand_keeps_its_own_row(short_dir):
    tree, settings = a_watched(short_dir, allow_delete=True)
    path = tree / "run7/last.safetensors"
    path.write_bytes(a_tensor(1))
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        first = await live_at(node, path)
        newer = tree / "run7/newer.safetensors"
        newer.write_bytes(a_tensor(5))
        await live_at(node, newer)

        async def idle() -> bool:
            return not await node.parts.jobs.unfinished()

        await eventually(idle)
        await line.ask("remove", selector=first)
        shutil.rmtree(tree / BIN)
        path.write_bytes(a_tensor(2))
        second = await live_at(node, path)
        await eventually(idle)
        with pytest.raises(Missing, match="not in the trash"):
            await line.ask("restore", selector=first)
        await trash.resume(node.parts.tools)
        assert await rows_at(node, path) == [(first, "missing"), (second, "live")]
        assert (await row(node, second)).level is Level.VERIFIED
        await line.ask("remove", selector=first)
        assert path.exists()


async def test_what_a_restore_takes_its_verification_from_is_read_again(short_dir):
    """A late metric writes beside the manifest after the save, so the directory's time is another one."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        one, _ = [await training.saved(step) for step in (1, 2)]
        await line.ask("checkpoint.metrics", checkpoint=one, metrics={"loss": 1.0})
        late = node.runs / "demo/run/step_0000000001/late.json"

        async def idle() -> bool:
            return late.exists() and not await node.parts.jobs.unfinished()

        await eventually(idle)
        await line.ask("remove", selector=one)
        await line.ask("restore", selector=one)

        async def verified() -> bool:
            return (await row(node, one)).level is Level.VERIFIED

        await eventually(verified)
        assert (await line.ask("attach", experiment=training.experiment, selector=one))["level"] == "verified"


async def test_what_is_held_in_the_trash_is_not_unlinked(short_dir):
    """No pin is taken there; one that is there all the same counts, and so does a reader's lease while it lasts."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        ids = await retired(node, line, 3)
        for op, more in (("pin", {"note": "for the paper"}), ("pin", {})):
            with pytest.raises(NotFound, match="in the trash") as refused:
                await line.ask(op, selector=ids[0], **more)
            assert "ckpt restore" in refused.value.hint
        assert await node.read(lambda conn: holds.of_checkpoint(conn, ids[0], SystemClock().now())) == []
        pinned = (await row(node, ids[0])).sequence

        async def hold(tx) -> None:
            values = {"uid": 1000, "note": "of an older daemon", "pinned_at": tx.clock.now(), "checkpoint_no": pinned}
            await tx.conn.execute(insert(schema.pin).values(values))
            await holds.lease(tx, ids[1], "reader", 60.0)

        await node.write(hold)
        assert await trash.purge(node.parts.tools) == 1
        assert await states(node, ids) == [State.TRASHED, State.TRASHED, State.DROPPED]
        assert binned(node) == sorted(ids[:2])
        await node.write(lambda tx: holds.release(tx, ids[1], "reader"))
        assert await trash.purge(node.parts.tools) == 1
        assert (await line.ask("restore", selector=ids[0]))["state"] == "live"


async def test_what_was_being_unlinked_when_it_was_held_is_unlinked(short_dir, monkeypatch):
    """Half of it may be gone: no hold makes it whole again."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        [one] = await retired(node, line)
        call = node.parts.workers.call

        async def hangs(request, **more):
            if isinstance(request, Purge):
                raise RootDegraded("hangs")
            return await call(request, **more)

        with monkeypatch.context() as patch:
            patch.setattr(node.parts.workers, "call", hangs)
            assert await trash.purge(node.parts.tools) == 0
        await node.write(lambda tx: holds.lease(tx, one, "reader", 60.0))
        assert await trash.purge(node.parts.tools) == 1
        assert await state(node, one) is State.DROPPED


async def stripped_and_retired(node, line) -> tuple[str, list]:
    """Return one that was stripped and then retired, and its tombstone."""
    ids = await saved_alone(node, line, 3)
    experiment = (await row(node, ids[0])).experiment_id
    await retain.apply(node.parts.tools, experiment, follow(node, strip_after=1))
    await retain.apply(node.parts.tools, experiment, follow(node, keep_last=1, strip_after=1))
    [root] = await node.read(roots.all_roots)
    found = await node.read(lambda conn: under_root(conn, root.id))
    return ids[0], [stone for stone, _ in found if stone.id == ids[0]]


async def test_what_comes_back_while_the_trash_is_emptied_keeps_what_was_taken_out_of_it(short_dir, monkeypatch):
    """The floor of free space unlinks whatever is left of its grace: not while it is on its way back."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        one, due = await stripped_and_retired(node, line)
        call, renamed, go_on = node.parts.workers.call, anyio.Event(), anyio.Event()

        async def slow(request, **more):
            answer = await call(request, **more)
            if isinstance(request, Restore):
                renamed.set()
                await go_on.wait()
            return answer

        monkeypatch.setattr(node.parts.workers, "call", slow)
        unlinked = []
        async with anyio.create_task_group() as group:
            group.start_soon(restored, line, one)
            await renamed.wait()

            async def unlink() -> None:
                unlinked.append(await trash.unlink(node.parts.tools, due, 1))

            group.start_soon(unlink)
            await anyio.sleep(0.2)
            go_on.set()
        assert unlinked == [0]
        assert await state(node, one) is State.LIVE
        assert f"{one}.stripped" in binned(node)
        assert (await line.ask("restore", selector=one))["restored"] == ["optimizer.safetensors"]
        assert await node.read(lambda conn: strips.of_checkpoint(conn, one)) is None


async def restored(line, one: str) -> None:
    assert (await line.ask("restore", selector=one))["restored"] == "checkpoint"


async def test_a_restore_that_comes_while_the_unlinking_begins_is_refused(short_dir, monkeypatch):
    """Else its files could be on their way back when the row gives up their inode, and be known to nobody."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        [one] = await retired(node, line)
        begins, give_up = anyio.Event(), trash.give_up_inodes

        async def slow(tx, ids):
            begins.set()
            await anyio.sleep(0.3)
            return await give_up(tx, ids)

        monkeypatch.setattr(trash, "give_up_inodes", slow)
        async with anyio.create_task_group() as group:
            group.start_soon(trash.purge, node.parts.tools)
            await begins.wait()
            with pytest.raises(NotFound, match=r"unlinking has begun|is dropped"):
                await line.ask("restore", selector=one)
        assert (await state(node, one), binned(node), len(in_place(node))) == (State.DROPPED, [], 1)


async def test_nothing_is_unlinked_of_what_is_not_retired_any_more(short_dir, monkeypatch):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        one, due = await stripped_and_retired(node, line)
        await restored(line, one)

        async def begun(*_) -> list:
            return due

        monkeypatch.setattr(trash, "_begun", begun)
        assert await trash.unlink(node.parts.tools, due, 1) == 0
        assert (await node.read(lambda conn: strips.of_checkpoint(conn, one))).state is StripState.STRIPPED
        assert f"{one}.stripped" in binned(node)
