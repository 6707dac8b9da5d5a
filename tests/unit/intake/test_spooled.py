"""The spool: what was saved while no daemon ran arrives once, whole, and foreign things harm nothing."""

import os

import pytest

from ckptd.catalog import checkpoints
from ckptd.errors import NoSpace
from ckptd.model import State, new_id
from ckptd_client import control, spool
from tests.support.in_process import Training, a_tensor, daemon, eventually, size_for


def an_image(training: Training, checkpoint: str, files: dict[str, bytes], **more) -> bytes:
    """A committed image, made as a client makes it."""
    from tests.support.in_process import Lease

    size_bytes = size_for(files)
    fd = os.memfd_create("image")
    os.ftruncate(fd, size_bytes)
    import mmap

    with mmap.mmap(fd, size_bytes) as page:
        control.write_lease(page, b"\0" * 16, 1, os.getpid())
    training.write(Lease("0" * 32, 1, size_bytes, fd), checkpoint, files, **more)
    data = os.pread(fd, size_bytes, 0)
    os.close(fd)
    found = control.read(data)
    assert found is not None
    return data[: spool.image_bytes(found.descriptor_offset, found.descriptor_size)]


def a_trainer(short_dir) -> Training:
    (short_dir / "runs").mkdir(exist_ok=True)
    return Training(None, str(short_dir / "runs"))  # type: ignore[arg-type]


def put(short_dir, checkpoint: str, image: bytes):
    directory = short_dir / "state" / "spool"
    directory.mkdir(parents=True, exist_ok=True)
    return spool.write_arena(str(directory), checkpoint, memoryview(image))


async def test_a_save_that_no_daemon_took_is_published_by_the_next_and_leaves_the_spool(short_dir):
    """M007: with the daemon down a save costs one file, and arrives later."""
    checkpoint, data = new_id(), a_tensor(5)
    path = put(short_dir, checkpoint, an_image(a_trainer(short_dir), checkpoint, {"model.safetensors": data}, step=3))
    async with daemon(short_dir) as node, node.connect() as line:
        answer = await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
        assert (short_dir / "runs/demo/run/step_0000000003/model.safetensors").read_bytes() == data
        assert answer["step"] == 3
        await eventually(lambda: not os.path.exists(path))


async def test_an_image_that_is_also_in_an_arena_is_one_checkpoint(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        files = {"model.safetensors": a_tensor(1)}
        checkpoint = await training.save(1, files=files)
        path = put(short_dir, checkpoint, an_image(training, checkpoint, files, step=1))
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
        await eventually(lambda: not os.path.exists(path))
        assert (await line.ask("summary"))["count"] == 1


async def test_a_save_that_failed_begins_again_when_its_bytes_turn_up(short_dir):
    checkpoint = new_id()
    training = a_trainer(short_dir)
    image = an_image(training, checkpoint, {"model.safetensors": a_tensor()}, step=1)
    async with daemon(short_dir, front=False) as node:
        put(short_dir, checkpoint, image)
        await node.parts.spool.take_in()
        await node.write(lambda tx: checkpoints.mark_failed(tx, checkpoint, {"code": "missing", "message": "gone"}))
        await node.write(lambda tx: node.parts.jobs.cancel(tx, checkpoint))
        node.parts.spool._known.clear()
        await node.parts.spool.take_in()
        assert (await node.read(lambda conn: checkpoints.state_of(conn, checkpoint))) is State.PENDING
        assert [job.stage for job in await node.parts.jobs.unfinished()] == ["publish"]


async def test_an_offer_is_taken_in_and_removed(short_dir):
    path = short_dir / "mine.safetensors"
    path.write_bytes(a_tensor())
    checkpoint = new_id()
    directory = short_dir / "state" / "spool"
    directory.mkdir(parents=True)
    offer = spool.write_offer(str(directory), checkpoint, {"path": str(path), "checkpoint": checkpoint, "step": 4})
    async with daemon(short_dir) as node, node.connect() as line:
        answer = await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
        assert answer["step"] == 4
        assert not os.path.exists(offer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b'{"path":"relative"}',
        b'{"path":"/a","checkpoint":"x"}',
        b"[" * 5000,
        b'{"path":5}',
        b'{"path":"/a","checkpoint":"%s","note":"","note":"x"}' % (b"a" * 32),
    ],
)
async def test_offers_that_make_no_sense_stay_and_are_named_by_doctor(short_dir, body):
    directory = short_dir / "state" / "spool"
    directory.mkdir(parents=True)
    (directory / f"{new_id()}.offer").write_bytes(body)
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await node.parts.spool.take_in()
        [check] = [c for c in (await line.ask("doctor"))["checks"] if c["name"] == "spool"]
        assert (check["status"], len(os.listdir(directory))) == ("warn", 1)


async def test_images_that_were_never_committed_or_lie_about_their_length_are_refused(short_dir):
    training = a_trainer(short_dir)
    good = an_image(training, new_id(), {"a.safetensors": a_tensor()})
    huge = bytearray(good)
    control._DESCRIPTOR.pack_into(huge, control._DESCRIPTOR_AT, 4096, 1 << 50, bytes(32), 1)
    torn = bytearray(good)
    torn[-1] ^= 1
    torn[control.read(good).descriptor_offset] ^= 1  # type: ignore[union-attr]
    for image in (b"\0" * 4096, bytes(huge), bytes(torn)):
        put(short_dir, new_id(), image)
    async with daemon(short_dir, front=False) as node:
        assert await node.parts.spool.take_in() == 0
        assert len(node.parts.spool.refused) == 3


async def test_a_symlink_or_a_fifo_in_the_spool_is_never_opened(short_dir):
    directory = short_dir / "state" / "spool"
    directory.mkdir(parents=True)
    (directory / f"{new_id()}.offer").symlink_to("/etc/passwd")
    os.mkfifo(directory / f"{new_id()}.arena")
    async with daemon(short_dir, front=False) as node:
        assert await node.parts.spool.take_in() == 0


async def test_what_a_full_disk_delays_is_tried_again_and_not_refused(short_dir, monkeypatch):
    training = a_trainer(short_dir)
    checkpoint = new_id()
    async with daemon(short_dir, front=False) as node:
        put(short_dir, checkpoint, an_image(training, checkpoint, {"a.safetensors": a_tensor()}, step=1))
        memory = node.parts.admission.memory

        async def full(*_, **__):
            raise NoSpace("the catalog's disk is full")

        monkeypatch.setattr(node.parts.admission, "memory", full)
        assert await node.parts.spool.take_in() == 0
        monkeypatch.setattr(node.parts.admission, "memory", memory)
        assert await node.parts.spool.take_in() == 1


async def test_refused_files_never_keep_later_ones_from_being_seen(short_dir, monkeypatch):
    from ckptd.intake import spooled

    monkeypatch.setattr(spooled, "ENTRIES_MAX", 2)
    training = a_trainer(short_dir)
    async with daemon(short_dir, front=False) as node:
        for _ in range(3):
            put(short_dir, new_id(), b"\0" * 4096)
        for _ in range(3):
            await node.parts.spool.take_in()
        checkpoint = new_id()
        put(short_dir, checkpoint, an_image(training, checkpoint, {"a.safetensors": a_tensor()}, step=1))
        assert await node.parts.spool.take_in() == 1


async def test_temporary_files_of_dead_writers_are_removed_and_those_of_living_ones_stay(short_dir):
    directory = short_dir / "state" / "spool"
    directory.mkdir(parents=True)
    dead = directory / f"{new_id()}.arena.tmp-4194303"
    alive = directory / f"{new_id()}.arena.tmp-{os.getpid()}"
    for path in (dead, alive):
        path.write_bytes(b"x")
    async with daemon(short_dir, front=False) as node:
        await node.parts.spool.take_in()
        assert (dead.exists(), alive.exists()) == (False, True)


async def test_what_a_drain_does_not_get_to_is_spilled_and_taken_in_again(short_dir):
    """P3: a clean stop loses nothing, with or without a service manager."""
    from ckptd import daemon as composition

    data = a_tensor(9)
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        checkpoint = await training.save(2, files={"model.safetensors": data})
        assert composition._undone(node.parts)
        await composition._spill(node.parts)
    async with daemon(short_dir) as node, node.connect() as line:
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
        assert (node.runs / "demo/run/step_0000000002/model.safetensors").read_bytes() == data


async def test_one_save_that_can_not_be_spilled_does_not_keep_the_others_from_it(short_dir, monkeypatch):
    from ckptd import daemon as composition

    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        for step in (1, 2):
            await training.save(step)
        tried = []

        async def spill(arena):
            tried.append(arena)
            raise OSError(28, "full")

        monkeypatch.setattr(node.parts.spool, "spill", spill)
        await composition._spill(node.parts)
        assert len(tried) == 2
