"""Memory that a trainer was lent and does with what it likes (S6, S7): the daemon lives, and nothing wrong is verified."""

import ctypes
import fcntl
import mmap
import os
import random
import signal
import threading
import time
from contextlib import contextmanager, suppress

import anyio
import pytest

from ckptd.config import Arenas
from ckptd.errors import BadRequest, CkptdError, NoArena, OverQuota
from ckptd.intake.arenas import ArenaPool
from ckptd.model import State, new_id
from ckptd_client import control
from tests.support import tally
from tests.support.catalog import StillClock
from tests.support.in_process import Keeper, Training, a_tensor, daemon, eventually, sha256, size_for

MIB = 1 << 20
KEEP_SIZE, PUNCH_HOLE = 1, 2
ENDED = {State.LIVE, State.CORRUPT, State.FAILED, State.MISSING}
_libc = ctypes.CDLL(None, use_errno=True)


def punch(fd: int, offset: int, size_bytes: int) -> int:
    call = _libc.fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return int(call(fd, KEEP_SIZE | PUNCH_HOLE, offset, size_bytes))


@contextmanager
def scribbling(fd: int, size_bytes: int, seed: int, *, control_page: bool):
    """Another thread writes and punches holes all over an arena, tries to change its size, until the block ends."""
    stop, rng = threading.Event(), random.Random(seed)
    start = 0 if control_page else control.PAGE
    resized: list[str] = []

    def run() -> None:
        with mmap.mmap(fd, size_bytes) as page:
            while not stop.is_set():
                at = rng.randrange(start, size_bytes - 8)
                page[at : at + 8] = rng.randbytes(8)
                if rng.random() < 0.1:
                    punch(fd, rng.randrange(start, size_bytes) & ~(control.PAGE - 1), control.PAGE)
                for end in (0, size_bytes * 2):
                    with suppress(PermissionError):
                        os.ftruncate(fd, end)
                        resized.append(f"to {end}")
                time.sleep(0.0005)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert resized == [], "an arena is sealed: nobody changes its size"


async def scribbled_saves(directory, rounds: int, *, control_page: bool) -> None:
    """Hand over saves whose memory never rests; what is verified in the end is what was digested."""
    rng, verified = random.Random(5), 0
    async with daemon(directory, arenas={"bytes_max": 64 << 20}) as node, node.connect() as line:
        run = await Training(line, str(node.runs)).open()
        for step in range(1, rounds + 1):
            files = {"model.safetensors": a_tensor(step, 200_000), "state.json": b'{"v":1}'}
            lease, checkpoint = await run.lease(size_for(files), wait_s=20), new_id()
            late = rng.random() < 0.5
            if late:
                run.write(lease, checkpoint, files, step=step)
            with scribbling(lease.fd, lease.size_bytes, step, control_page=control_page):
                if not late:
                    run.write(lease, checkpoint, files, step=step)
                names = {"experiment": run.experiment, "checkpoint": checkpoint}
                try:
                    await line.ask("commit", **lease.names(), **names)
                except CkptdError as error:
                    assert error.code in {"bad_request", "bad_path", "no_arena", "exists"}, error
                    with suppress(CkptdError):
                        await line.ask("abandon", **lease.names())
                await anyio.sleep(rng.random() * 0.02)
            lease.close()
            found = await node.read(lambda conn, wanted=checkpoint: _rows(conn, wanted))
            if found is not None:
                await eventually(lambda wanted=checkpoint: _at_rest(node, wanted))
                verified += await wrongly_verified(node, checkpoint)
        assert (await line.ask("status"))["ok"]
    tally.add("violations", verified)
    assert verified == 0


async def _rows(conn, checkpoint):
    from ckptd.catalog import checkpoints

    return (await checkpoints.get_many(conn, [checkpoint])).get(checkpoint)


async def _at_rest(node, checkpoint) -> bool:
    row = await node.read(lambda conn: _rows(conn, checkpoint))
    unfinished = {job.checkpoint_id for job in await node.parts.jobs.unfinished()}
    return row.state in ENDED and checkpoint not in unfinished


async def wrongly_verified(node, checkpoint) -> int:
    """1 when a checkpoint is called verified whose bytes are not those that were digested."""
    from pathlib import Path

    from ckptd.catalog import checkpoints

    row = await node.read(lambda conn: _rows(conn, checkpoint))
    if row.state is not State.LIVE or row.verified_at is None:
        return 0
    files = await node.read(lambda conn: checkpoints.files(conn, checkpoint))
    return int(any(sha256(Path(row.path) / file.path) != file.sha256 for file in files))


async def test_memory_that_changes_while_it_is_written_is_never_verified_wrong(short_dir):
    """S6, short form: the digest is of some bytes, the file of others; reading back tells."""
    await scribbled_saves(short_dir, 12, control_page=False)


async def test_noise_in_the_control_page_costs_its_own_save_only(short_dir):
    """S6: state word, generation, descriptor and its length are all written by the trainer."""
    await scribbled_saves(short_dir, 12, control_page=True)


@pytest.mark.faults
@pytest.mark.timeout(290)
@pytest.mark.parametrize("control_page", [False, True])
async def test_five_hundred_races_for_the_bytes_of_a_save_verify_nothing_wrong(short_dir, control_page):
    """S6, long form: a thousand races in both."""
    await scribbled_saves(short_dir, 500, control_page=control_page)


async def test_a_file_lease_on_lent_memory_holds_up_nobody(short_dir):
    """S6: its borrower may open the arena again and take a write lease; the next open() would wait 45 s for it."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        async with daemon(short_dir) as node, node.connect() as line:
            run = await Training(line, str(node.runs)).open()
            files, checkpoint = {"model.safetensors": a_tensor()}, new_id()
            lease = await run.lease(size_for(files))
            run.write(lease, checkpoint, files, step=1)
            await line.ask("commit", **lease.names(), experiment=run.experiment, checkpoint=checkpoint)
            await line.push("level", checkpoint=checkpoint, level="verified")
            again = os.open(f"/proc/self/fd/{lease.fd}", os.O_RDWR)
            fcntl.fcntl(again, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            began_s = time.monotonic()
            answer = await line.ask("attach", experiment=run.experiment)
            assert time.monotonic() - began_s < 20
            assert answer["hot"] is False
            os.close(again)
            assert (await line.ask("attach", experiment=run.experiment))["hot"] is True
            lease.close()
    finally:
        signal.signal(signal.SIGIO, before)


# -- how much: S7 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [1 << 60, 1 << 50, 1 << 40, (64 << 20) + control.PAGE, 4097, 0, -1])
async def test_a_size_that_can_not_be_is_refused_before_any_memory_is_made(short_dir, size_bytes):
    """S7: an exbibyte, a page more than there is, half a page."""
    async with daemon(short_dir, front=False, arenas={"bytes_max": 64 << 20}) as node, node.connect() as line:
        run = await Training(line, str(node.runs)).open()
        began_s = time.monotonic()
        with pytest.raises((OverQuota, BadRequest)):
            await run.lease(size_bytes, wait_s=0)
        assert time.monotonic() - began_s < 20
        assert node.parts.pool.bytes_used == 0


class Client:
    """A connection of some user that keeps what it has."""

    def __init__(self, uid: int) -> None:
        self.uid, self.pid = uid, os.getpid()

    def push(self, message: dict[str, object]) -> None:
        """It is deaf."""


async def test_one_user_can_not_borrow_what_another_may_need():
    """S7, I9: half of the budget each, unless arenas.bytes_per_uid_max says otherwise; the daemon's own user has it all."""
    if os.getuid() != 0:
        pytest.skip("only root can serve several users")
    keeper = Keeper()
    pool = ArenaPool(Arenas(bytes_max=8 * MIB), keeper, StillClock())
    try:
        greedy = Client(1001)
        for number in range(4):
            lent = await pool.lease(f"a{number}", MIB, greedy, 0)
            control.set_state(lent.page, control.WRITING)
        with pytest.raises(NoArena):
            await pool.lease("a4", MIB, greedy, 0)
        with pytest.raises(OverQuota, match="share"):
            await pool.lease("a5", 5 * MIB, greedy, 0)
        async with anyio.create_task_group() as group:
            group.start_soon(pool.lease, "a6", MIB, greedy, 60.0)
            await eventually(lambda: pool.waiting == 1)
            for number in range(4):  # who waits for his own share holds up nobody else
                await pool.lease(f"b{number}", MIB, Client(1002), 0)
            assert pool.waiting == 1, "and has nothing yet"
            group.cancel_scope.cancel()
        pool.free(pool.leased(lent.id, lent.generation, greedy))
        assert (await pool.lease("a7", MIB, greedy, 0)).owner_uid == 1001
    finally:
        pool.close()
        keeper.close()


async def test_an_older_copy_makes_room_in_its_own_users_share_first():
    if os.getuid() != 0:
        pytest.skip("only root can serve several users")
    keeper = Keeper()
    pool = ArenaPool(Arenas(bytes_max=8 * MIB), keeper, StillClock())
    try:
        other = await pool.lease("b", MIB, Client(1002), 0)
        control.commit(other.page, control.PAGE, b"")
        pool.commit(other, "b", "b1")
        pool.published("b1")
        idle = [await pool.lease(f"a{number}", MIB, Client(1001), 0) for number in range(4)]
        for lent in idle:
            pool.free(lent)
        await pool.lease("c", 3 * MIB, Client(1001), 0)
        assert sum(arena.size_bytes for arena in pool.all() if arena.owner_uid == 1001) <= 4 * MIB
        assert pool.of_checkpoint("b1") is other
    finally:
        pool.close()
        keeper.close()


async def test_requests_that_wait_for_memory_are_counted_for_each_user(monkeypatch):
    """S7, S8: one user's crowd leaves the queue open to others."""
    from ckptd.intake import waiting

    if os.getuid() != 0:
        pytest.skip("only root can serve several users")
    monkeypatch.setattr(waiting, "WAITERS_PER_UID_MAX", 3)
    keeper = Keeper()
    pool = ArenaPool(Arenas(bytes_max=2 * MIB), keeper, StillClock())
    try:
        held = await pool.lease("a", MIB, Client(1001), 0)
        control.set_state(held.page, control.WRITING)
        refused: list[str] = []

        async def ask(uid: int) -> None:
            try:
                await pool.lease("a", MIB, Client(uid), 0.5)
            except NoArena as error:
                refused.append(error.message)
                assert ("of them yours" in error.message) == ("retry_after_s" in error.details)

        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(ask, 1001)
            await anyio.sleep(0.05)
            group.start_soon(ask, 1002)
        assert sum("of them yours" in message for message in refused) == 3
        assert len(refused) == 6
    finally:
        pool.close()
        keeper.close()
