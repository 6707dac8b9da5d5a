"""The reading side: who loads which checkpoint, and what keeps it there meanwhile.

Each load is a read under a name of its own, which its client chose: one hold in the catalog, at most one
place in the control page of an arena, one `detach`. Two loads of one checkpoint share nothing, over one
connection or several, so neither can end the other's.

    attach ──► begun ──► held ──► told ──► detach
                 └────────┴── given up: an error, a detach that overtakes it, the end of its connection

What is told ends with its `detach`, or when the process dies: it outlives the connection and the daemon. Of a
process that /proc does not show (another pid namespace) nobody can see the end: what it reads ends with the
connection that it came by, too, and no memory is handed to it.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from ckptd.catalog import checkpoints, holds, metrics, readholds
from ckptd.catalog.tx import Tx
from ckptd.errors import BadRequest, Busy, CkptdError, NotFound
from ckptd.intake import descriptor
from ckptd.intake import requests as ask
from ckptd.intake.arenas import Arena
from ckptd.intake.listener import Peer
from ckptd.intake.training import Answer, Front, Handler, select
from ckptd.model import Checkpoint, Origin, new_id
from ckptd_client import control

log = structlog.get_logger()

LISTED_BYTES_MAX = 800_000  # of the files in one answer, as JSON: a frame has 1 MiB
READS_MAX = 256  # that one connection may have going: a client ends each as soon as it has the bytes


@dataclass(eq=False)
class Read:
    """One load that goes on. `checkpoint_id` is set as soon as it may be held."""

    name: str
    holder: str
    peer: Peer
    is_named: bool  # by its client; else the daemon did, and `detach` names the checkpoint
    checkpoint_id: str = ""
    is_hot: bool = False


class Reading:
    """Attaches readers, and lets go when they are done, dead or gone."""

    def __init__(self, front: Front) -> None:
        """Nobody is known to read; what the catalog says of readers is looked at first."""
        self._front = front
        self._open: dict[str, Read] = {}  # of connections that stand, by name
        self._unseen: set[Peer] = set()
        self._left: dict[int, int] = {}  # pid -> start time of processes that may read on without a connection
        self._over: dict[str, None] = {}  # holders whose rows have still to go
        self._looked_s = -math.inf
        self.handlers: dict[type[ask.Request], Handler] = {ask.Detach: self.detach}

    def begin(self, peer: Peer, request: ask.Attach) -> ask.Attach:
        """Note a read before the next frame is looked at, which may end it already; returns it with its name.

        BadRequest  that name is in use      Busy  too many reads go on
        """
        if len(peer.attached) >= READS_MAX:
            raise Busy(
                f"{READS_MAX} loads of this connection go on already", hint="`detach` ends one", retry_after_s=1.0
            )
        name = request.read or new_id()
        if name in self._open:
            raise BadRequest(f"a load named {name} goes on already", hint="name each load anew")
        read = Read(name, readholds.holder(peer.pid, peer.ticks, name), peer, is_named=request.read is not None)
        peer.attached[name] = self._open[name] = read
        if not peer.ticks:
            self._unseen.add(peer)
        return msgspec.structs.replace(request, read=name)

    async def attach(self, peer: Peer, request: ask.Attach) -> tuple[Answer, int | None]:
        """Find what a reader wants and hold it; with a descriptor when a hot copy is there. `begin` came before.

        Whatever is raised, nothing is held then.
        """
        read = peer.attached.get(str(request.read))
        if read is None:  # its detach has come already
            raise _given_up(request)
        try:
            return await self._attach(peer, request, read)
        except BaseException:
            self._end(read)
            raise

    async def _attach(self, peer: Peer, request: ask.Attach, read: Read) -> tuple[Answer, int | None]:
        row = await select(self._front, peer, request)
        if not row.is_whole:
            raise NotFound(f"checkpoint {row.id} is {row.state}, {row.level}: nothing to load yet")
        await self._front.check_load(row, request.selector)
        await self._hold(peer, row, read)
        answer, fd = await self._answer(peer, row, read)
        if not self._goes_on(read):  # and there is no descriptor, see _hot
            raise _given_up(request)
        return answer, fd

    def _goes_on(self, read: Read) -> bool:
        return self._open.get(read.name) is read

    async def _hold(self, peer: Peer, row: Checkpoint, read: Read) -> None:
        read.checkpoint_id = row.id

        async def hold(tx: Tx) -> None:
            # Looked at again in the transaction that holds it: retention may have been faster.
            if not (await checkpoints.get(tx.conn, row.id)).is_whole:
                raise NotFound(f"checkpoint {row.id} was retired a moment ago")
            await holds.lease(tx, row.id, read.holder, readholds.READ_LEASE_S)
            if row.experiment_id in peer.fresh and row.step is not None:
                # The first load of a new segment, before it logged or saved: training goes on from there.
                await metrics.resume_from(tx, row.experiment_id, peer.fresh[row.experiment_id], row.step)

        await self._front.catalog.write(hold)
        peer.fresh.pop(row.experiment_id, None)

    async def _answer(self, peer: Peer, row: Checkpoint, read: Read) -> tuple[Answer, int | None]:
        facts: Answer = {
            "read": read.name,
            "checkpoint": row.id,
            "experiment": row.experiment_id,
            "step": row.step,
            "level": str(row.level),
            "path": row.path,
            "size_bytes": row.size_bytes,
            "format": row.format,
        }
        hot = self._hot(peer, row, read)
        if hot is not None:
            arena, images, fd = hot
            return {**facts, "hot": True, "files": images, "arena_bytes": arena.size_bytes}, fd
        files = await self._front.catalog.read(lambda conn: checkpoints.files(conn, row.id))
        listed = [{"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in files]
        if _fits(listed):
            return {**facts, "hot": False, "files": listed}, None
        if row.origin in {Origin.MEMORY, Origin.REBUILD}:  # the manifest beside them names them all
            return {**facts, "hot": False, "files": None}, None
        raise BadRequest(
            f"checkpoint {row.id} has {len(listed)} files: more than one answer can name",
            hint="`ckpt path` prints where it lies, `ckpt verify` reads it back: load it with the library that wrote it",
        )

    def _hot(self, peer: Peer, row: Checkpoint, read: Read) -> tuple[Arena, list[dict[str, Any]], int] | None:
        """Note the read in the arena that holds `row`; None when there is no place or no arena, or nobody sees its reader.

        Nothing is waited for between here and the answer: a detach finds the place, or has come before and there is none.
        """
        arena = self._front.pool.of_checkpoint(row.id)
        raw = arena.descriptor() if arena is not None else None
        if arena is None or raw is None or not peer.ticks or not self._goes_on(read):
            return None
        images = _images(raw, arena)
        if not _fits(images):
            return None
        # Opened anew and read-only: the reader can map it, never write what others may still read. Without
        # waiting: whoever was lent the arena can hold a file lease on it, and open() would wait for that.
        try:
            fd = os.open(f"/proc/self/fd/{arena.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            log.warning(
                "arena.not_attached", cause="open", errno=error.errno, arena=arena.id.hex(), uid=arena.owner_uid
            )
            return None
        if not control.add_reader(arena.page, peer.pid, _mark(read.name)):
            os.close(fd)
            return None
        read.is_hot = True
        arena.read_s = self._front.clock.monotonic_s()
        return arena, images, fd

    # -- letting go ------------------------------------------------------------------------

    async def detach(self, peer: Peer, request: ask.Detach) -> Answer:
        """A reader is done; also over another connection than it came by, of the same process. Nothing to end is fine.

        What the catalog does not take now is tried again at each look.
        """
        if peer.ticks == control.UNKNOWN:
            peer.ticks = control.seen_ticks(peer.pid)
        name = request.read
        if name is None:
            if request.checkpoint is None:
                raise BadRequest("detach: `read` or `checkpoint` must say what is over")
            name = await self._unnamed(peer, request.checkpoint)
        if name is None:
            return {}
        read = self._open.get(name)
        if read is not None and _is_same(read.peer, peer):
            self._end(read)
        elif read is None and peer.ticks:  # it came by a connection that is gone, or in the time of an earlier daemon
            self._leave(peer, name)
            for ticks in (peer.ticks, control.UNKNOWN):  # either connection may have come when nobody could look
                self._over[readholds.holder(peer.pid, ticks, name)] = None
        await self._release()
        return {}

    def undelivered(self, peer: Peer, name: str) -> None:
        """The answer did not get through: its client never knew what it got. The row goes at the next look."""
        read = peer.attached.get(name)
        if read is not None:
            self._end(read)

    def _end(self, read: Read) -> None:
        """Forget a read, give up its place in an arena, and have its row go. Safe to repeat."""
        if self._goes_on(read):
            del self._open[read.name]
            read.peer.attached.pop(read.name, None)
            self._leave(read.peer, read.name)
        if read.checkpoint_id:
            self._over[read.holder] = None

    def _leave(self, peer: Peer, name: str) -> None:
        for arena in self._front.pool.all():
            if control.remove_reader(arena.page, peer.pid, _mark(name)):
                self._front.pool.wake()
                return

    async def _unnamed(self, peer: Peer, checkpoint_id: str) -> str | None:
        """One read of this checkpoint that its client can't name. All are alike but for the arena, which is left last."""
        reads = [r for r in peer.attached.values() if r.checkpoint_id == checkpoint_id and not r.is_named]
        if reads:
            return str(min(reads, key=lambda read: read.is_hot).name)
        now, begins = self._front.clock.now(), readholds.of_process(peer.pid, peer.ticks)
        held = await self._front.catalog.read(lambda conn: holds.of_checkpoint(conn, checkpoint_id, now))
        names = [hold.by.removeprefix(begins) for hold in held if hold.by.startswith(begins)]
        return next((name for name in names if name not in self._open), None)

    def left(self, peer: Peer) -> None:
        """A connection closed. Mappings and loads outlive it: while the process can be seen to live it may still read."""
        self._unseen.discard(peer)
        for read in tuple(peer.attached.values()):
            if peer.ticks:
                self._open.pop(read.name, None)
                self._left[peer.pid] = peer.ticks
            else:
                self._end(read)

    async def look(self) -> None:
        """Renew what living processes read, and let go of what the dead read. What fails is tried again at the next look."""
        now_s = self._front.clock.monotonic_s()
        dead = [(pid, ticks) for pid, ticks in self._left.items() if not control.is_alive(pid, ticks)]
        try:
            await self._release()
            if dead or now_s - self._looked_s >= readholds.RENEW_AFTER_S:
                standing = {read.holder for peer in self._unseen for read in peer.attached.values()}
                living = await self._front.catalog.write(lambda tx: readholds.look_after(tx, standing))
                self._looked_s = now_s
                self._left = {pid: t for pid, t in self._left.items() if (pid, t) not in dead} | living
        except CkptdError as error:
            log.warning("hold.not_looked_after", cause=error.code, **error.to_wire())

    async def _release(self) -> None:
        holders = tuple(self._over)
        if holders:
            await self._front.catalog.write(lambda tx: readholds.release(tx, holders))
            for holder in holders:
                self._over.pop(holder, None)


def _is_same(one: Peer, other: Peer) -> bool:
    """Whether two connections belong to one process; of what can't be seen, only one connection is one process."""
    return one is other or (other.ticks != 0 and (one.pid, one.ticks) == (other.pid, other.ticks))


def _given_up(request: ask.Attach) -> NotFound:
    return NotFound(f"the load {request.read} was given up before it was answered")


def _mark(name: str) -> int:
    """Tell reads of one process apart in a control page, where there are 32 bits for it."""
    return int(name[:8], 16)


def _images(raw: bytes, arena: Arena) -> list[dict[str, Any]]:
    found = descriptor.decode(raw, arena.size_bytes)
    return [{"path": f.path, "offset": f.offset, "size_bytes": f.size_bytes} for f in found.files]


def _fits(listed: list[dict[str, Any]]) -> bool:
    """Whether so many files can be named in one frame."""
    size_bytes = 0
    for one in listed:
        size_bytes += len(msgspec.json.encode(one)) + 1
        if size_bytes > LISTED_BYTES_MAX:
            return False
    return True
