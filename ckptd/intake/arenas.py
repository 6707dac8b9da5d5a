"""The pool of arenas: memory that trainers copy into.

Every arena is a memfd that this daemon made, filled with pages and sealed, so that nobody can
shrink it under a reader. Its fd lies in the service manager's store from before it is first lent:
what a trainer committed outlives this process. The control page (ckptd_client.control) says what
the next daemon finds. Decisions run on the event loop; only making an arena blocks, in a thread.

    FREE ──lease──► LEASED ──commit──► BUSY ──published──► HOT ──lease──► LEASED
      ▲                │ abandon, death              (the newest copy stays until memory is wanted)
      └────────────────┘
"""

import fcntl
import mmap
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import anyio
import anyio.to_thread

from ckptd import failpoint
from ckptd.clock import Clock
from ckptd.config import Arenas
from ckptd.errors import BadRequest, NoArena, OverQuota
from ckptd_client import control

_F_ADD_SEALS = 1033
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW = 0x1, 0x2, 0x4
WAITERS_MAX = 4096
FD_PREFIX = "arena-"


class Use(StrEnum):
    """What the daemon does with an arena."""

    FREE = "free"
    LEASED = "leased"
    BUSY = "busy"
    HOT = "hot"


class Holder(Protocol):
    """Who holds a lease: a connection."""

    pid: int
    uid: int

    def push(self, message: dict[str, object]) -> None:
        """Send without waiting."""


class Store(Protocol):
    """The service manager's fd store (notify.Notifier)."""

    def store(self, name: str, fd: int) -> None:
        """Keep a copy of `fd` under `name` beyond this process."""

    def remove(self, name: str) -> None:
        """Forget it."""


@dataclass(eq=False)
class Arena:
    """One arena as the daemon sees it. `fd` and `page` live until `close()`."""

    id: bytes
    fd: int
    size_bytes: int
    page: mmap.mmap
    use: Use = Use.FREE
    generation: int = 0
    experiment_id: str = ""
    holder: Holder | None = None
    holder_pid: int = 0
    holder_ticks: int = 0
    holder_uid: int = -1  # -1: taken over from an earlier daemon, which served this daemon's own user
    checkpoint_id: str = ""
    reclaiming: bool = False
    used_s: float = 0.0

    @property
    def name(self) -> str:
        """Its name in the fd store."""
        return FD_PREFIX + self.id.hex()

    @property
    def readers(self) -> int:
        """How many living processes map it; written in the control page, so that it outlives this daemon."""
        return control.readers(self.page)

    def descriptor(self) -> bytes | None:
        """Return the committed descriptor, or None while the arena holds no whole save.

        A released arena still holds one until it is lent again: that is the hot copy.
        """
        page = control.read(self.page)
        if page is None or page.state not in {control.COMMITTED, control.RELEASED}:
            return None
        end = page.descriptor_offset + page.descriptor_size
        if not control.PAGE <= page.descriptor_offset <= end <= self.size_bytes:
            return None
        raw = os.pread(self.fd, page.descriptor_size, page.descriptor_offset)
        return raw if control.is_whole(page._replace(state=control.COMMITTED), raw) else None

    def close(self) -> None:
        """Give up our mapping and fd; the memory goes when the last holder's mapping does."""
        self.page.close()
        os.close(self.fd)


@dataclass(eq=False)
class _Waiter:
    experiment_id: str
    size_bytes: int
    holder: Holder
    freed: anyio.Event = field(default_factory=anyio.Event)


def make(size_bytes: int) -> tuple[int, mmap.mmap]:
    """Make a sealed memfd whose pages all exist. Blocks: about 0.5 s per GB. OSError when memory is short."""
    fd = os.memfd_create("ckptd-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW | _SEAL_SEAL)
        return fd, mmap.mmap(fd, control.PAGE)
    except BaseException:
        os.close(fd)
        raise


class ArenaPool:
    """Lends arenas within the budget `settings.bytes_max`, oldest waiter first."""

    def __init__(self, settings: Arenas, store: Store, clock: Clock) -> None:
        """Start empty; `adopt()` brings in what an earlier daemon left in the store."""
        self._settings = settings
        self._store = store
        self._clock = clock
        self._arenas: dict[bytes, Arena] = {}
        self._making_bytes = 0
        self._making: dict[str, int] = {}
        self._waiters: list[_Waiter] = []
        # One at a time: two threads that fill pages side by side take twice as long each.
        self._maker = anyio.CapacityLimiter(1)
        self.on_committed: Callable[[Arena], None] | None = None

    # -- what is there ---------------------------------------------------------------------

    @property
    def bytes_used(self) -> int:
        """Bytes of all arenas, those in the making included."""
        return sum(arena.size_bytes for arena in self._arenas.values()) + self._making_bytes

    def all(self) -> Iterable[Arena]:
        """Every arena there is."""
        return tuple(self._arenas.values())

    def get(self, arena_id: bytes) -> Arena | None:
        """Find an arena by its id."""
        return self._arenas.get(arena_id)

    def of_checkpoint(self, checkpoint_id: str) -> Arena | None:
        """The arena that holds this checkpoint's bytes, committed or hot."""
        for arena in self._arenas.values():
            if arena.checkpoint_id == checkpoint_id and arena.use in {Use.BUSY, Use.HOT}:
                return arena
        return None

    # -- taking over from an earlier daemon --------------------------------------------------

    def adopt(self, name: str, fd: int) -> Arena | None:
        """Take an arena back from the fd store; None (and the fd closed) when it is not one of ours."""
        size_bytes = os.fstat(fd).st_size
        page = mmap.mmap(fd, control.PAGE) if size_bytes > control.PAGE else None
        found = control.read(page) if page is not None else None
        if page is None or found is None or FD_PREFIX + found.arena.hex() != name:
            if page is not None:
                page.close()
            os.close(fd)
            self._store.remove(name)
            return None
        arena = Arena(found.arena, fd, size_bytes, page, generation=found.generation)
        arena.holder_pid, arena.holder_ticks = found.pid, found.started_ticks
        arena.used_s = self._clock.monotonic_s()
        arena.use = Use.FREE if found.state in {control.FREE, control.RELEASED} else Use.LEASED
        self._arenas[arena.id] = arena
        return arena

    # -- lending -----------------------------------------------------------------------------

    async def lease(self, experiment_id: str, size_bytes: int, holder: Holder, wait_s: float) -> Arena:
        """Lend an arena of at least `size_bytes` to `holder`; its pages are populated.

        OverQuota   it could never fit: the caller saves less or the operator raises the budget
        NoArena     none came free within `wait_s`; the caller spools
        """
        if size_bytes <= control.PAGE or size_bytes % control.PAGE:
            raise BadRequest(
                f"size_bytes={size_bytes} must be a multiple of {control.PAGE} and hold more than one page"
            )
        if size_bytes > self._settings.bytes_max:
            raise OverQuota(
                f"a save of {size_bytes} bytes can't fit into arenas.bytes_max={self._settings.bytes_max}",
                hint="raise arenas.bytes_max, or hand the save off as files",
            )
        if len(self._waiters) >= WAITERS_MAX:
            raise NoArena(f"{WAITERS_MAX} requests wait for an arena already")
        waiter = _Waiter(experiment_id, size_bytes, holder)
        self._waiters.append(waiter)
        try:
            with anyio.move_on_after(min(wait_s, self._settings.lease_wait_s)):
                while True:
                    arena = self._reusable(waiter) or await self._make_for(waiter)
                    if arena is not None:
                        return self._lend(arena, waiter)
                    self._ask_back(waiter)
                    await waiter.freed.wait()
                    waiter.freed = anyio.Event()
        finally:
            self._waiters.remove(waiter)
        raise NoArena(f"no arena of {size_bytes} bytes came free within {wait_s:g} s")

    def wake(self) -> None:
        """Something was freed: let the waiters look again, in their order."""
        for waiter in self._waiters:
            waiter.freed.set()

    def _lend(self, arena: Arena, waiter: _Waiter) -> Arena:
        arena.generation += 1
        arena.use = Use.LEASED
        arena.experiment_id, arena.checkpoint_id = waiter.experiment_id, ""
        arena.holder, arena.holder_pid, arena.holder_uid = waiter.holder, waiter.holder.pid, waiter.holder.uid
        arena.reclaiming = False
        arena.used_s = self._clock.monotonic_s()
        control.write_lease(arena.page, arena.id, arena.generation, arena.holder_pid)
        arena.holder_ticks = control.started_ticks(arena.holder_pid)
        return arena

    def _reusable(self, waiter: _Waiter) -> Arena | None:
        """An arena that fits without waste: the experiment's own before free ones, its newest hot copy last."""
        fits = [
            arena
            for arena in self._arenas.values()
            if waiter.size_bytes <= arena.size_bytes <= 2 * waiter.size_bytes + (64 << 20) and arena.readers == 0
        ]
        own = [arena for arena in fits if arena.experiment_id == waiter.experiment_id]
        free = [arena for arena in own if arena.use is Use.FREE] or [arena for arena in fits if arena.use is Use.FREE]
        if free:
            return max(free, key=lambda arena: arena.used_s)
        hot = sorted((arena for arena in own if arena.use is Use.HOT), key=lambda arena: arena.used_s)
        room = self._held(waiter.experiment_id) < self._settings.per_experiment_max and self._fits(waiter.size_bytes)
        if len(hot) > 1 or (hot and not room):
            return hot[0]
        return None

    def _held(self, experiment_id: str) -> int:
        held = sum(1 for arena in self._arenas.values() if arena.experiment_id == experiment_id)
        return held + self._making.get(experiment_id, 0)

    def _fits(self, size_bytes: int) -> bool:
        return self.bytes_used + size_bytes <= self._settings.bytes_max

    async def _make_for(self, waiter: _Waiter) -> Arena | None:
        if self._held(waiter.experiment_id) >= self._settings.per_experiment_max:
            # A size that no longer fits (the model grew) must not lock the experiment out.
            self._drop_unfitting(waiter)
            if self._held(waiter.experiment_id) >= self._settings.per_experiment_max:
                return None
        self._make_room(waiter.size_bytes)
        if not self._fits(waiter.size_bytes):
            return None
        self._making_bytes += waiter.size_bytes
        self._making[waiter.experiment_id] = self._making.get(waiter.experiment_id, 0) + 1
        try:
            fd, page = await anyio.to_thread.run_sync(make, waiter.size_bytes, limiter=self._maker)
        except OSError as error:
            raise NoArena(f"memory for an arena of {waiter.size_bytes} bytes is not to be had: {error}") from error
        finally:
            self._making_bytes -= waiter.size_bytes
            self._making[waiter.experiment_id] -= 1
        arena = Arena(secrets.token_bytes(16), fd, waiter.size_bytes, page, experiment_id=waiter.experiment_id)
        control.write_lease(page, arena.id, 0, 0)
        control.set_state(page, control.FREE)
        # Stored before it is lent: from here on a commit in it outlives this process.
        self._store.store(arena.name, fd)
        self._arenas[arena.id] = arena
        failpoint.hit("fdstore.pushed")
        return arena

    def _drop_unfitting(self, waiter: _Waiter) -> None:
        for arena in self.all():
            if (
                arena.experiment_id == waiter.experiment_id
                and arena.use in {Use.FREE, Use.HOT}
                and not arena.readers
                and not waiter.size_bytes <= arena.size_bytes <= 2 * waiter.size_bytes + (64 << 20)
            ):
                self.destroy(arena)

    def _make_room(self, size_bytes: int) -> None:
        """Give up free arenas, then hot copies, least recently used first, until `size_bytes` fit."""
        idle = [arena for arena in self._arenas.values() if arena.use in {Use.FREE, Use.HOT} and not arena.readers]
        idle.sort(key=lambda arena: (arena.use is Use.HOT, arena.used_s))
        for arena in idle:
            if self._fits(size_bytes):
                return
            self.destroy(arena)

    def _ask_back(self, waiter: _Waiter) -> None:
        """Ask holders of leased but unwritten arenas of other experiments to give them back."""
        for arena in self._arenas.values():
            if arena.use is not Use.LEASED or arena.experiment_id == waiter.experiment_id or arena.reclaiming:
                continue
            page = control.read(arena.page)
            if page is not None and page.state == control.LEASED and arena.holder is not None:
                arena.reclaiming = True
                arena.holder.push({"push": "reclaim", "arena": arena.id.hex()})

    # -- coming back -------------------------------------------------------------------------

    def leased(self, arena_id: bytes, generation: int, pid: int) -> Arena:
        """Find the arena that process `pid` holds under `generation`. NoArena when it does not."""
        arena = self._arenas.get(arena_id)
        if arena is None or arena.generation != generation or arena.holder_pid != pid or arena.use is not Use.LEASED:
            raise NoArena(f"arena {arena_id.hex()[:12]} is not leased to process {pid} under generation {generation}")
        return arena

    def commit(self, arena: Arena, experiment_id: str, checkpoint_id: str) -> None:
        """The arena's content is now the pipeline's business."""
        arena.use = Use.BUSY
        arena.experiment_id, arena.checkpoint_id = experiment_id, checkpoint_id
        arena.holder = None
        arena.used_s = self._clock.monotonic_s()

    def published(self, checkpoint_id: str) -> None:
        """Its bytes are durable: the arena stays as hot copy until it is wanted."""
        arena = self.of_checkpoint(checkpoint_id)
        if arena is not None and arena.use is Use.BUSY:
            control.set_state(arena.page, control.RELEASED)
            arena.use = Use.HOT
            arena.used_s = self._clock.monotonic_s()
            self.wake()

    def free(self, arena: Arena) -> None:
        """Nobody needs its content any more."""
        control.set_state(arena.page, control.FREE)
        arena.use = Use.FREE
        arena.holder, arena.checkpoint_id, arena.reclaiming = None, "", False
        arena.used_s = self._clock.monotonic_s()
        self.wake()

    def free_checkpoint(self, checkpoint_id: str) -> None:
        """Forget the copy of a checkpoint that was retired, replaced or found damaged."""
        arena = self.of_checkpoint(checkpoint_id)
        if arena is not None and arena.readers == 0:
            self.free(arena)

    def orphaned(self, holder: Holder) -> list[Arena]:
        """A connection closed: its leases have no holder now. Returns them for a look at their word."""
        orphans = [arena for arena in self._arenas.values() if arena.holder is holder and arena.use is Use.LEASED]
        for arena in orphans:
            arena.holder = None
        return orphans

    def reap(self) -> list[Arena]:
        """Free leases of dead processes; return those that died after their commit, to be admitted."""
        committed = []
        for arena in self.all():
            if arena.use is not Use.LEASED or arena.holder is not None:
                continue
            if arena.descriptor() is not None:
                committed.append(arena)
            elif not control.is_alive(arena.holder_pid, arena.holder_ticks):
                self.free(arena)
        return committed

    def trim(self) -> None:
        """Give the memory of long unused free arenas back."""
        now_s = self._clock.monotonic_s()
        for arena in self.all():
            if arena.use is Use.FREE and now_s - arena.used_s > self._settings.idle_s and not arena.readers:
                self.destroy(arena)

    def destroy(self, arena: Arena) -> None:
        """Give an arena's memory back to the machine."""
        del self._arenas[arena.id]
        self._store.remove(arena.name)
        arena.close()

    def close(self) -> None:
        """The daemon stops: drop our fds; the store keeps those that hold something."""
        for arena in self.all():
            if arena.use is Use.FREE:
                self._store.remove(arena.name)
            arena.close()
        self._arenas.clear()
