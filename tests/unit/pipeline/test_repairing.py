"""What is damaged on the disk is written again from memory: those bytes or none, whoever asks for the memory meanwhile."""

import os
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from ckptd import pipeline
from ckptd.catalog import checkpoints
from ckptd.catalog.queue import NewJob
from ckptd.errors import Changed, NoArena, RootDegraded, WorkerLost
from ckptd.intake.arenas import Use
from ckptd.model import State
from ckptd.pipeline import repair, trash
from ckptd.worker.protocol import Publish, Purge, Trash
from tests.support.in_process import Keeper, Training, a_tensor, daemon, eventually, size_for
from tests.support.rungs import held

MIB = 1 << 20
FILE = "model.safetensors"
TIGHT = {"arenas": {"bytes_max": 12 * MIB}}  # one arena of 8 MiB, and no second one
LARGE = {FILE: a_tensor(7, 8 * MIB - 100_000)}


def place(node, step: int = 1) -> Path:
    return node.runs / f"demo/run/step_{step:010d}"


def flip(path: Path) -> int:
    """Damage a file; return the inode of its directory."""
    with path.open("r+b") as file:
        file.seek(500)
        byte = file.read(1)
        file.seek(500)
        file.write(bytes([byte[0] ^ 4]))
    return path.parent.stat().st_ino


async def row(node, checkpoint: str):
    return await node.read(lambda conn: checkpoints.get(conn, checkpoint))


async def idle(node) -> None:
    async def done() -> bool:
        return not await node.parts.jobs.unfinished()

    await eventually(done)


async def is_corrupt(node, checkpoint: str) -> bool:
    """It was MISSING as well if somebody looked while it had no name."""
    return (await row(node, checkpoint)).state is State.CORRUPT


def binned(node) -> list[str]:
    return sorted(os.listdir(node.runs / ".ckptd-trash"))


class Gate:
    """Holds up the first request of a kind; what comes after it passes."""

    def __init__(self, node, kind: type, *, after: bool = False) -> None:
        self.reached, self.open = anyio.Event(), anyio.Event()
        self._real, self._kind, self._after = node.parts.workers.call, kind, after
        node.parts.workers.call = self._call

    async def _call(self, request, **more):
        first = isinstance(request, self._kind) and not self.reached.is_set()
        answer = await self._real(request, **more) if first and self._after else None
        if first:
            self.reached.set()
            await self.open.wait()
        return answer if answer is not None else await self._real(request, **more)


pytestmark = pytest.mark.usefixtures("still_upkeep")

# One that comes while a repair has moved the damaged bytes aside takes the checkpoint for missing, rightly.
NO_SCAN = {"watching": {"reconcile_s": 3600, "reconcile_max_s": 3600}}


@asynccontextmanager
async def saved(short_dir, keeper=None, files=None, **settings):
    """A node with one verified checkpoint whose bytes are in memory as well; nothing of it is on its way."""
    async with daemon(short_dir, keeper, **{**NO_SCAN, **settings}) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        one = await training.saved(1, files=files or {FILE: a_tensor(7)})
        await idle(node)
        yield node, training, one


async def begin_repair(node, training, one: str) -> None:
    answer = await training.line.ask("verify", selector=one)
    assert answer["results"][0]["state"] == "corrupt"


async def test_a_trainer_is_not_lent_the_memory_from_which_a_damaged_checkpoint_is_to_be_written_again(
    short_dir, monkeypatch
):
    """M013: from the moment at which the damage is found until what was written again is verified."""
    gate = anyio.Event()
    for stage in ("verify", "repair"):
        monkeypatch.setitem(pipeline.STAGES, stage, held(gate, pipeline.STAGES[stage]))
    async with daemon(short_dir, **TIGHT) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        gate.set()
        one = await training.saved(1, files=LARGE)
        await idle(node)
        gate = anyio.Event()
        for stage in ("verify", "repair"):
            monkeypatch.setitem(pipeline.STAGES, stage, held(gate, pipeline.STAGES[stage]))
        flip(place(node) / FILE)
        await begin_repair(node, training, one)
        with pytest.raises(NoArena):
            await training.lease(size_for(LARGE), wait_s=0.2)
        gate.set()
        await idle(node)
        assert (await row(node, one)).is_good
        assert (place(node) / FILE).read_bytes() == LARGE[FILE]
        (await training.lease(size_for(LARGE))).close()  # it is a hot copy as others are


async def test_memory_that_holds_other_bytes_gets_no_name_and_what_was_damaged_comes_back(short_dir):
    """Promise 8: a manifest made from other bytes would vouch for them once the catalog is lost."""
    async with saved(short_dir) as (node, training, one):
        inode = flip(place(node) / FILE)
        gate = Gate(node, Publish)
        await begin_repair(node, training, one)
        await gate.reached.wait()
        arena = node.parts.pool.of_checkpoint(one)
        at = os.pread(arena.fd, arena.size_bytes, 0).index(a_tensor(7))
        os.pwrite(arena.fd, a_tensor(8), at)
        gate.open.set()
        await idle(node)
        await eventually(lambda: is_corrupt(node, one))
        assert place(node).stat().st_ino == inode
        assert binned(node) == []
        assert [(arena.use, arena.readers) for arena in node.parts.pool.all()] == [(Use.FREE, 0)]
        assert not os.path.lexists(node.runs / "demo/run/latest")


async def test_a_repair_that_a_restart_interrupted_goes_on_from_the_memory_that_outlived_it(short_dir, monkeypatch):
    keeper = Keeper()
    real = pipeline.STAGES["repair"]
    monkeypatch.setitem(pipeline.STAGES, "repair", held(anyio.Event(), real))
    async with saved(short_dir, keeper) as (node, training, one):
        inode = flip(place(node) / FILE)
        await begin_repair(node, training, one)

        async def waits() -> bool:
            return [job.stage for job in await node.parts.jobs.unfinished()] == ["repair"]

        await eventually(waits)
    async with daemon(short_dir, keeper, front=False) as node:
        assert [(arena.use, arena.checkpoint_id, arena.readers) for arena in node.parts.pool.all()] == [
            (Use.HOT, one, 1)
        ]
    monkeypatch.setitem(pipeline.STAGES, "repair", real)
    async with daemon(short_dir, keeper) as node:
        await idle(node)
        assert (await row(node, one)).is_good
        assert place(node).stat().st_ino != inode
        assert (place(node) / FILE).read_bytes() == a_tensor(7)
    keeper.close()


async def test_what_is_removed_before_its_repair_begins_stays_removed(short_dir, monkeypatch):
    """Its memory was opened already when the person came."""
    async with saved(short_dir) as (node, training, one):
        await training.saved(2)
        await idle(node)
        await eventually(lambda: node.parts.pool.of_checkpoint(one) is not None)
        flip(place(node) / FILE)
        real, reached, go_on = node.parts.spool.open, anyio.Event(), anyio.Event()

        async def held(checkpoint: str):
            fd = await real(checkpoint)
            reached.set()
            await go_on.wait()
            return fd

        monkeypatch.setattr(node.parts.spool, "open", held)
        await begin_repair(node, training, one)
        await reached.wait()
        await training.line.ask("remove", selector=one)
        go_on.set()
        await idle(node)
        assert (await row(node, one)).state is State.TRASHED
        assert (place(node).exists(), binned(node)) == (False, [one])


@pytest.mark.parametrize("dies", [False, True], ids=["told at once", "found by the next try"])
async def test_what_is_retired_while_it_is_written_again_leaves_nothing_under_its_name(short_dir, dies):
    """The tombstone is carried out with the bytes that it means; what the repair wrote goes away again."""
    async with saved(short_dir) as (node, training, one):
        inode = flip(place(node) / FILE)
        gate = Gate(node, Publish, after=True)
        await begin_repair(node, training, one)
        await gate.reached.wait()
        assert place(node).stat().st_ino != inode
        await node.write(lambda tx: checkpoints.mark_trashed(tx, one, one, "a plan"))
        if dies:
            real, left = node.parts.pipeline._tools.catalog.write, [WorkerLost("it died")]

            async def write(fn):
                if left and "_record(tx" in _source(fn):
                    raise left.pop()
                return await real(fn)

            node.parts.catalog.write = write
        gate.open.set()
        await idle(node)
        assert place(node).stat().st_ino == inode
        await trash.resume(node.parts.tools)
        assert (await row(node, one)).state is State.TRASHED
        assert (place(node).exists(), binned(node)) == (False, [one])
        assert (node.runs / ".ckptd-trash" / one).stat().st_ino == inode


def _source(fn) -> str:
    import inspect

    return inspect.getsource(fn)


async def test_who_removes_what_is_just_being_written_again_is_told_that_it_was_not_removed(short_dir):
    async with saved(short_dir) as (node, training, one):
        await training.saved(2)
        await idle(node)
        flip(place(node) / FILE)
        gate = Gate(node, Publish)
        await begin_repair(node, training, one)
        await gate.reached.wait()
        with pytest.raises(Changed):
            await training.line.ask("remove", selector=one)
        gate.open.set()
        await idle(node)
        assert (await row(node, one)).is_good
        assert (place(node) / FILE).read_bytes() == a_tensor(7)
        assert binned(node) == []


async def test_a_strangers_directory_under_the_name_of_a_dropped_checkpoint_is_not_what_its_repair_wrote(short_dir):
    """Only what names the checkpoint itself is taken away again."""
    async with saved(short_dir) as (node, _, one):
        payload = {"trash": f"repair-{one}-1", "repairs": 1, "descriptor": {"files": []}}
        await node.write(lambda tx: checkpoints.mark_trashed(tx, one, one, "a plan"))
        await trash.resume(node.parts.tools)
        place(node).mkdir()
        (place(node) / "mine").write_bytes(b"mine")
        new = NewJob(checkpoint_id=one, lane=f"{one}/recheck", stage="repair", payload=payload)
        await node.write(lambda tx: node.parts.jobs.enqueue(tx, new))
        await idle(node)
        assert os.listdir(place(node)) == ["mine"]
        assert binned(node) == [one]


async def test_what_a_repair_moved_aside_goes_from_the_trash_though_the_disk_hangs_at_that_moment(short_dir):
    """VERIFIED does not wait for it."""
    async with saved(short_dir, jobs={"backoff_s_max": 0.2}) as (node, training, one):
        real, left = node.parts.workers.call, [RootDegraded("hangs")] * 3

        async def call(request, **more):
            if isinstance(request, Purge) and request.trash.startswith("repair-") and left:
                assert (await row(node, one)).is_good
                raise left.pop()
            return await real(request, **more)

        node.parts.workers.call = call
        flip(place(node) / FILE)
        await begin_repair(node, training, one)
        await idle(node)
        assert (left, binned(node)) == ([], [])
        assert os.readlink(node.runs / "demo/run/latest") == "step_0000000001"


async def test_what_an_earlier_repair_left_in_the_trash_is_in_no_later_ones_way(short_dir):
    async with saved(short_dir) as (node, training, one):
        left = node.runs / f".ckptd-trash/repair-{one}-1"
        left.mkdir(parents=True)
        (left / "old").write_bytes(b"old")
        flip(place(node) / FILE)
        await begin_repair(node, training, one)
        await idle(node)
        assert (await row(node, one)).is_good
        assert binned(node) == []


async def test_damage_that_memory_can_not_make_good_any_more_leaves_it_where_it_was(short_dir, monkeypatch):
    """The copy went after the damaged directory had been moved aside: a machine that started again."""
    async with saved(short_dir) as (node, training, one):
        inode = flip(place(node) / FILE)
        real, left = node.parts.workers.call, [WorkerLost("it died")]

        async def call(request, **more):
            if isinstance(request, Publish) and left:
                node.parts.pool.free_checkpoint(one)
                raise left.pop()
            return await real(request, **more)

        node.parts.workers.call = call
        await begin_repair(node, training, one)
        await idle(node)
        await eventually(lambda: is_corrupt(node, one))
        assert place(node).stat().st_ino == inode
        assert binned(node) == []
        assert not os.path.lexists(node.runs / "demo/run/latest")


async def test_a_copy_whose_repair_is_no_more_is_let_go_after_two_looks(short_dir):
    async with saved(short_dir) as (node, _, one):
        tools = node.parts.tools
        assert tools.sources.keep(one)
        first = await repair.let_go_of_ended(tools, set())
        assert (first, tools.sources.kept()) == ({one}, [one])
        assert await repair.let_go_of_ended(tools, first) == set()
        assert tools.sources.kept() == []


async def test_only_what_names_the_checkpoint_is_moved_where_that_is_asked_for(short_dir):
    async with saved(short_dir) as (node, _, one):
        (place(node) / "manifest.json").unlink()
        found = await node.read(lambda conn: checkpoints.identity(conn, one))
        request = Trash(
            root=str(node.runs),
            path=str(place(node)),
            identity=repair._plain(found),
            trash="x",
            checkpoint=one,
            named=True,
        )
        with pytest.raises(Exception, match="does not say") as refused:
            await node.parts.workers.call(request)
        assert refused.value.code == "source_changed"
        assert place(node).is_dir()
