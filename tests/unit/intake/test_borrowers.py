"""Memory that was lent to somebody whom this daemon never saw: it has perhaps two writers, and is not lent again."""

import mmap
import os

import pytest

from ckptd.catalog import checkpoints
from ckptd.config import Arenas
from ckptd.errors import NoArena
from ckptd.intake.arenas import ArenaPool, Use
from ckptd.model import new_id
from ckptd_client import control
from tests.support.catalog import StillClock
from tests.support.in_process import Keeper, Training, a_tensor, daemon, size_for

MIB = 1 << 20


class Client:
    """A connection whose kernel says no pid, or that of this process."""

    def __init__(self, pid: int) -> None:
        self.uid, self.pid = os.getuid(), pid

    def push(self, message: dict[str, object]) -> None:
        """It is deaf."""


@pytest.fixture
def keeper():
    kept = Keeper()
    yield kept
    kept.close()


async def test_memory_of_a_borrower_that_nobody_ever_saw_is_forgotten_and_not_lent_again(keeper):
    """It may be written for as long as the borrower lives, and nobody knows how long that is."""
    pool = ArenaPool(Arenas(bytes_max=2 * MIB), keeper, StillClock())
    unseen, seen = Client(0), Client(os.getpid())
    lost, kept = await pool.lease("a", MIB, unseen, 0), await pool.lease("b", MIB, seen, 0)
    theirs = mmap.mmap(lost.fd, lost.size_bytes)
    for client in (unseen, seen):
        pool.orphaned(client)
    pool.reap()
    assert list(pool.all()) == [kept]
    assert list(keeper.kept) == [kept.name]
    assert kept.use is Use.LEASED
    theirs[control.PAGE : control.PAGE + 4] = b"late"
    again = await pool.lease("c", MIB, seen, 0)
    assert os.pread(again.fd, 4, control.PAGE) == bytes(4)
    with pytest.raises(NoArena):
        pool.leased(lost.id, 1, unseen)
    theirs.close()
    pool.close()


async def test_what_an_earlier_daemon_lent_to_somebody_unseen_is_forgotten_and_what_it_committed_is_not(short_dir):
    keeper = Keeper()
    files = {"a.safetensors": a_tensor()}
    async with daemon(short_dir, keeper, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        writing, written = await training.lease(size_for(files)), await training.lease(size_for(files))
        checkpoint = new_id()
        training.write(written, checkpoint, files, step=1)
        for lease in (writing, written):  # as a daemon wrote it that lent to anybody
            with mmap.mmap(lease.fd, lease.size_bytes) as page:
                page[40:44], page[48:56] = bytes(4), bytes(8)
    async with daemon(short_dir, keeper) as node, node.connect() as line:
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
        assert [arena.checkpoint_id for arena in node.parts.pool.all()] == [checkpoint]
        assert (await node.read(lambda conn: checkpoints.get(conn, checkpoint))).is_whole
    for lease in (writing, written):
        lease.close()
    keeper.close()
