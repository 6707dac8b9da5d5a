"""Readers: what they get, and what becomes of loads that are given up, or whose process nobody can see."""

import errno
import os
from typing import Any

import anyio
import pytest

from ckptd.catalog import holds, readholds
from ckptd.errors import BadRequest, Busy, NoArena, NotFound
from ckptd.intake import reading
from ckptd.model import new_id
from ckptd_client import control
from tests.support.in_process import Node, Training, Wire, a_tensor, daemon, eventually
from tests.support.reading import held, nobody_holds, readers

# -- what a reader gets -----------------------------------------------------------------------------


async def test_a_reader_gets_the_hot_copy_and_holds_the_checkpoint(short_dir):
    """M010: bytes without the disk, read-only, and retention waits for the reader."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        data = a_tensor(3)
        checkpoint = await training.saved(1, files={"model.safetensors": data})
        answer = await line.ask("attach", selector="latest", experiment=training.experiment)
        assert answer["hot"]
        [file] = answer["files"]
        fd = line.fds.pop()
        assert os.pread(fd, file["size_bytes"], file["offset"]) == data
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        os.close(fd)
        arena = node.parts.pool.of_checkpoint(checkpoint)
        assert arena is not None
        assert arena.readers == 1
        now = node.parts.clock.now()
        assert [h.kind for h in await node.read(lambda conn: holds.of_checkpoint(conn, checkpoint, now))] == ["lease"]
        await line.ask("detach", checkpoint=checkpoint)
        assert arena.readers == 0
        assert await node.read(lambda conn: holds.of_checkpoint(conn, checkpoint, now)) == []


async def test_a_cold_attach_names_the_files_and_their_digests(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        checkpoint = await training.saved(1)
        node.parts.pool.free_checkpoint(checkpoint)
        answer = await line.ask("attach", selector=checkpoint)
        assert not answer["hot"]
        assert {f["path"] for f in answer["files"]} == {"model.safetensors", "state.json"}
        assert all(len(f["sha256"]) == 64 for f in answer["files"])


@pytest.mark.parametrize("hot", [True, False])
async def test_more_files_than_one_frame_names_are_found_by_their_manifest(short_dir, monkeypatch, hot):
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        checkpoint = await training.saved(1)
        if not hot:
            node.parts.pool.free_checkpoint(checkpoint)
        monkeypatch.setattr(reading, "LISTED_BYTES_MAX", 100)
        answer = await line.ask("attach", selector=checkpoint)
        assert (answer["hot"], answer["files"]) == (False, None)


async def test_more_files_than_one_frame_names_of_somebody_elses_are_a_clear_error(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        path = short_dir / "mine/a.safetensors"
        path.parent.mkdir()
        path.write_bytes(a_tensor())
        one = (await line.ask("submit", path=str(path), checkpoint=new_id()))["checkpoint"]
        await line.ask("wait", checkpoint=one, level="verified", timeout_s=30)
        monkeypatch.setattr(reading, "LISTED_BYTES_MAX", 10)
        with pytest.raises(BadRequest, match="1 files: more than one answer can name"):
            await line.ask("attach", selector=one)
        assert (await line.ask("show", selector=one))["checkpoint"]["checkpoint"] == one, "the connection stands"


# -- what never got there ---------------------------------------------------------------------------


async def test_a_detach_that_overtakes_its_attach_leaves_nothing_held(short_dir):
    """A client that got no answer in time says so at once; both frames may be here before either is looked at."""
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        name = new_id()
        attach = await line.send("attach", selector=checkpoint, read=name)
        await line.ask("detach", read=name)
        assert not (await line.reply(attach))["ok"]
        assert (await held(node, checkpoint), readers(node, checkpoint)) == ([], 0)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("how", ["detach", "hang up"])
async def test_a_load_that_is_given_up_while_it_is_being_held_leaves_nothing_held(short_dir, monkeypatch, how, where):
    async with daemon(short_dir) as node, node.connect() as line, node.connect() as reader:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        if where == "disk":
            node.parts.pool.free_checkpoint(checkpoint)
        lease, here, go_on = holds.lease, anyio.Event(), anyio.Event()

        async def slow(*given: Any) -> Any:
            here.set()
            await go_on.wait()
            return await lease(*given)

        monkeypatch.setattr(holds, "lease", slow)
        name = new_id()
        await reader.send("attach", selector=checkpoint, read=name)
        await here.wait()
        if how == "detach":
            detach = await reader.send("detach", read=name)
            await eventually(lambda: name not in node.parts.service._reading._open)
            go_on.set()
            assert (await reader.reply(detach))["ok"]
        else:
            reader.close()
            await anyio.sleep(0.1)  # either order must do
            go_on.set()
        await nobody_holds(node, checkpoint)
        await eventually(lambda: name not in node.parts.service._reading._open)
        await node.parts.service.reap()
        assert await held(node, checkpoint) == []
        assert sum(arena.readers for arena in node.parts.pool.all()) == 0


async def test_an_answer_that_can_not_be_sent_holds_nothing(short_dir, monkeypatch):
    """The daemon ran out of descriptors: the client hears an error, reads the disk, and knows of no hold."""
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)

        def none_left(_fd: int) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(os, "dup", none_left)
        with pytest.raises(Busy, match="run out"):
            await line.ask("attach", selector=checkpoint, read=new_id())
        monkeypatch.undo()
        assert readers(node, checkpoint) == 0
        await nobody_holds(node, checkpoint)


async def test_what_the_catalog_does_not_take_now_is_given_back_later(short_dir, monkeypatch):
    """A full disk must not make a hold outlast its reader for as long as that process lives."""
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        name = new_id()
        await line.ask("attach", selector=checkpoint, read=name)

        async def refuse(*_: object) -> None:
            raise Busy("locked")

        release = readholds.release
        monkeypatch.setattr(readholds, "release", refuse)
        with pytest.raises(Busy):
            await line.ask("detach", read=name)
        assert await held(node, checkpoint)
        monkeypatch.setattr(readholds, "release", release)
        await nobody_holds(node, checkpoint)


async def test_a_name_is_one_load_and_a_connection_has_so_many(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        name = new_id()
        await line.ask("attach", selector=checkpoint, read=name)
        with pytest.raises(BadRequest, match="goes on already"):
            await line.ask("attach", selector=checkpoint, read=name)
        with pytest.raises(NotFound):
            await line.ask("attach", selector="step:9", project="demo", name="run")
        monkeypatch.setattr(reading, "READS_MAX", 2)
        await line.ask("attach", selector=checkpoint)
        with pytest.raises(Busy, match="2 loads"):
            await line.ask("attach", selector=checkpoint)
        await line.ask("detach", read=name)
        await line.ask("attach", selector=checkpoint)
        with pytest.raises(BadRequest, match="`read` or `checkpoint`"):
            await line.ask("detach")


# -- processes whose end nobody here can see --------------------------------------------------------


async def unseen(node: Node, monkeypatch: pytest.MonkeyPatch) -> Wire:
    """Connect as somebody in another pid namespace does."""
    monkeypatch.setattr(control, "seen_ticks", lambda _pid: 0)
    line = Wire.to(node.directory / "s")
    await line.ask("hello", versions=[1], client="test")
    monkeypatch.undo()
    return line


async def test_no_memory_is_lent_to_a_process_whose_end_can_not_be_seen(short_dir, monkeypatch):
    """Its connection may break while it writes; lent on, that memory would have two writers."""
    async with daemon(short_dir, front=False) as node:
        line = await unseen(node, monkeypatch)
        training = await Training(line, str(node.runs)).open()
        with pytest.raises(NoArena) as refused:
            await training.lease(1 << 20)
        assert "pid namespace" in refused.value.hint
        assert node.parts.pool.bytes_used == 0
        line.close()


async def test_readers_that_can_not_be_seen_never_end_each_others_holds(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        one, two = await unseen(node, monkeypatch), await unseen(node, monkeypatch)
        name = new_id()
        assert not (await one.ask("attach", selector=checkpoint, read=name))["hot"], "nobody could see the mapping end"
        await two.ask("attach", selector=checkpoint)
        await two.ask("attach", selector=checkpoint)
        await two.ask("detach", read=name)
        await line.ask("detach", read=name)
        assert len(await held(node, checkpoint)) == 3
        await two.ask("detach", checkpoint=checkpoint)
        assert len(await held(node, checkpoint)) == 2
        two.close()
        await eventually(lambda: len(node.parts.listener.peers) == 2)
        await node.parts.service.reap()
        [left] = await held(node, checkpoint)
        assert left.endswith(name)
        one.close()
        await nobody_holds(node, checkpoint)


def test_a_proc_of_another_namespace_shows_nobody(monkeypatch):
    """It has somebody else under each number: what ends there says nothing of a trainer."""
    assert control.seen_ticks(os.getpid()) == control.started_ticks(os.getpid()) != 0
    monkeypatch.setattr(os, "readlink", lambda _path: "4711")
    assert control.seen_ticks(os.getpid()) == 0
