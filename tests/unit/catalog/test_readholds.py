"""For how long a checkpoint is kept for its readers: each load has a hold, and none ends another's."""

import os
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from sqlalchemy import update

from ckptd.catalog import holds, readholds, schema
from ckptd.model import new_id
from ckptd_client import control
from ckptd_client.control import UNKNOWN
from ckptd_client.control import started_ticks as ticks_of
from tests.support.in_process import Keeper, Training, daemon, eventually
from tests.support.reading import another_process, held, nobody_holds, readers, retire_all_but_one, told


async def test_read_holds_end_when_the_reader_dies_not_when_it_reconnects(short_dir):
    """A load of minutes must not lose its hold to a lost connection."""
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        with another_process(short_dir, checkpoint) as reader:
            await told(reader)
            await eventually(lambda: len(node.parts.listener.peers) == 1)
            await node.parts.service.reap()
            assert await held(node, checkpoint)
            await anyio.to_thread.run_sync(reader.communicate, b"\n")
            await nobody_holds(node, checkpoint)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("lines", [1, 2])
async def test_the_load_that_ends_first_leaves_the_other_its_hold(short_dir, lines, named):
    """Two threads, or two runs, of one process: what is read must not be retired because somebody else is done."""
    async with daemon(short_dir) as node, node.connect() as line, node.connect() as second:
        training = await Training(line, str(node.runs)).open()
        read = await training.saved(1)
        other = second if lines == 2 else line
        names: list[dict[str, str]] = [{"read": new_id()}, {"read": new_id()}] if named else [{}, {}]
        path = (await line.ask("attach", selector=read, **names[0]))["path"]
        await other.ask("attach", selector=read, **names[1])
        assert readers(node, read) == 2
        for step in (2, 3):
            await training.saved(step)
        await other.ask("detach", **(names[1] or {"checkpoint": read}))
        assert readers(node, read) == 1
        assert len(await held(node, read)) == 1
        await retire_all_but_one(node, training.experiment)
        assert Path(path).is_dir()
        await line.ask("detach", **(names[0] or {"checkpoint": read}))
        assert (readers(node, read), await held(node, read)) == (0, [])
        await retire_all_but_one(node, training.experiment)
        await eventually(lambda: not Path(path).exists())


async def test_a_read_is_ended_over_the_next_connection_and_no_other_with_it(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        one, two = new_id(), new_id()
        async with node.connect() as lost:
            await lost.ask("attach", selector=checkpoint, read=one)
            await lost.ask("attach", selector=checkpoint, read=two)
        await eventually(lambda: len(node.parts.listener.peers) == 1)
        assert (len(await held(node, checkpoint)), readers(node, checkpoint)) == (2, 2)
        await line.ask("detach", read=one)
        [left] = await held(node, checkpoint)
        assert left.endswith(two)
        assert readers(node, checkpoint) == 1
        await line.ask("detach", checkpoint=checkpoint)
        assert (await held(node, checkpoint), readers(node, checkpoint)) == ([], 0)
        await line.ask("detach", checkpoint=checkpoint)
        await line.ask("detach", read=one)


async def test_reads_outlive_a_restart_and_each_ends_by_its_name(short_dir):
    """Between attach and detach another daemon may have come; it knows what the rows and the control page say."""
    keeper = Keeper()
    one, two = new_id(), new_id()
    async with daemon(short_dir, keeper) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        for name in (one, two):
            assert (await line.ask("attach", selector=checkpoint, read=name))["hot"]
    async with daemon(short_dir, keeper) as node, node.connect() as line:
        await node.parts.service.reap()
        assert (len(await held(node, checkpoint)), readers(node, checkpoint)) == (2, 2)
        await line.ask("detach", read=one)
        assert (len(await held(node, checkpoint)), readers(node, checkpoint)) == (1, 1)
        await line.ask("detach", read=two)
        assert (await held(node, checkpoint), readers(node, checkpoint)) == ([], 0)
    keeper.close()


async def test_what_a_dead_process_read_is_let_go_of_by_the_next_daemon_at_its_start(short_dir):
    """M017: else it would be kept for as long as the hold lasts."""
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        with another_process(short_dir, checkpoint) as reader:
            await told(reader)
            assert await held(node, checkpoint)
            mine = new_id()
            await line.ask("attach", selector=checkpoint, read=mine)
            node.parts.service._reading._left.clear()  # this daemon never hears of the death
            await eventually(lambda: len(node.parts.listener.peers) == 1)
            node.parts.service._reading._left.clear()
    async with daemon(short_dir, front=False) as node:
        [left] = await held(node, checkpoint)
        assert left.endswith(mine)


async def test_what_ran_out_while_no_daemon_was_there_is_held_again_for_a_reader_that_lives(short_dir):
    """A node may stand for hours; a reader on a slow disk reads on."""
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        await line.ask("attach", selector=checkpoint, read=new_id())
        past = node.parts.clock.now() - timedelta(hours=5)
        await node.settled()
        await node.write(lambda tx: tx.conn.execute(update(schema.lease).values(until=past)))
        assert await held(node, checkpoint) == []
    async with daemon(short_dir, front=False) as node:
        assert len(await held(node, checkpoint)) == 1
        await node.parts.service.reap()
        assert len(await held(node, checkpoint)) == 1


@pytest.mark.parametrize("seen", [True, False])
async def test_a_load_that_takes_longer_than_a_hold_lasts_keeps_it(short_dir, monkeypatch, seen):
    """An hour of a slow network disk: the hold is renewed while the reader is known to live."""
    if not seen:
        monkeypatch.setattr(control, "seen_ticks", lambda _pid: 0)
    async with daemon(short_dir) as node, node.connect() as line:
        monkeypatch.undo()
        async with node.connect() as trainer:
            checkpoint = await (await Training(trainer, str(node.runs)).open()).saved(1)
        await line.ask("attach", selector=checkpoint, read=new_id())
        if seen:
            line.close()
        soon = node.parts.clock.now() + timedelta(seconds=1)
        await node.write(lambda tx: tx.conn.execute(update(schema.lease).values(until=soon)))
        monkeypatch.setattr(readholds, "RENEW_AFTER_S", 0.0)

        async def renewed() -> bool:
            now = node.parts.clock.now()
            found = await node.read(lambda conn: holds.of_checkpoint(conn, checkpoint, now))
            return [hold.until is not None and hold.until > soon + timedelta(minutes=1) for hold in found] == [True]

        await eventually(renewed)


async def test_a_load_from_the_disk_that_ends_leaves_a_mapping_of_the_same_process_its_place(short_dir):
    """The arena would be lent while that mapping is still read."""
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        arena = node.parts.pool.of_checkpoint(checkpoint)
        assert arena is not None
        mapped, read = new_id(), new_id()
        assert (await line.ask("attach", selector=checkpoint, read=mapped))["hot"]
        while control.add_reader(arena.page, 1):
            pass
        assert not (await line.ask("attach", selector=checkpoint, read=read))["hot"], "eight read it already"
        await line.ask("detach", read=read)
        assert arena.readers == control.READERS_MAX
        await line.ask("detach", read=mapped)
        assert arena.readers == control.READERS_MAX - 1


async def test_of_loads_without_a_name_the_one_from_the_disk_ends_first(short_dir):
    """An older client says only which checkpoint: a mapping that may still be in use must not lose its place."""
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        assert (await line.ask("attach", selector=checkpoint))["hot"]
        arena = node.parts.pool.of_checkpoint(checkpoint)
        assert arena is not None
        while control.add_reader(arena.page, 1):
            pass
        assert not (await line.ask("attach", selector=checkpoint))["hot"]
        await line.ask("detach", checkpoint=checkpoint)
        assert (arena.readers, len(await held(node, checkpoint))) == (control.READERS_MAX, 1)
        await line.ask("detach", checkpoint=checkpoint)
        assert (arena.readers, await held(node, checkpoint)) == (control.READERS_MAX - 1, [])


async def test_what_is_read_on_another_machine_or_in_another_namespace_is_its_own_daemons(short_dir, monkeypatch):
    """A catalog may serve several nodes: the pids of the others mean nothing here, whoever lives or died."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        checkpoint = await training.save(1)
        monkeypatch.setattr(readholds, "place", lambda: "0" * 8)
        theirs = [readholds.holder(pid, ticks, new_id()) for pid, ticks in ((999_999_999, 1), (os.getpid(), 1))]
        monkeypatch.undo()
        for by in theirs:
            await node.write(lambda tx, by=by: holds.lease(tx, checkpoint, by, 60.0))
        now = node.parts.clock.now()
        before = await node.read(lambda conn: holds.of_checkpoint(conn, checkpoint, now))
        await node.write(readholds.look_after)
        assert await node.read(lambda conn: holds.of_checkpoint(conn, checkpoint, now)) == before
        assert sorted(hold.by for hold in before) == sorted(theirs)


async def test_a_process_that_could_not_be_looked_at_when_it_came_ends_its_read_over_any_connection(
    short_dir, monkeypatch
):
    """The daemon had no descriptor left for the look: that is no reason to hold anything for ever."""
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        for blind in (True, False):
            name = new_id()
            monkeypatch.setattr(control, "seen_ticks", lambda _pid, blind=blind: UNKNOWN if blind else ticks_of(_pid))
            async with node.connect() as lost:
                await lost.ask("attach", selector=checkpoint, read=name)
            monkeypatch.setattr(control, "seen_ticks", lambda _pid, blind=blind: ticks_of(_pid) if blind else UNKNOWN)
            async with node.connect() as other:
                monkeypatch.undo()
                await eventually(lambda: len(node.parts.listener.peers) == 2)
                assert len(await held(node, checkpoint)) == 1
                await other.ask("detach", read=name)
                assert (await held(node, checkpoint), readers(node, checkpoint)) == ([], 0)
