"""The pool of arenas: memory that trainers copy into.

Every arena is a memfd that this daemon made, filled with pages and sealed, so that nobody can
shrink it under a reader. Its fd lies in the service manager's store from before it is first lent:
what a trainer committed outlives this process. The control page (ckptd_client.control) says what
the next daemon finds. Decisions run on the event loop; only making an arena blocks, in a thread.

    FREE ──lease──► LEASED ──commit──► BUSY ──published──► HOT ──lease──► LEASED
      ▲                │ abandon, death              (the newest copy stays until memory is wanted)
      └────────────────┘
"""

import math
import mmap
import os
import secrets
from collections.abc import Callable, Collection, Iterable

import anyio
import anyio.to_thread

from ckptd import failpoint
from ckptd.clock import Clock
from ckptd.config import Arenas
from ckptd.errors import BadRequest, NoArena, OverQuota
from ckptd.intake.arena import FD_PREFIX, Arena, Holder, Store, Use, is_sealed, make, owner_of
from ckptd.intake.budget import Budget
from ckptd.intake.waiting import Line, Waiter
from ckptd_client import control

__all__ = ["FD_PREFIX", "Arena", "ArenaPool", "Holder", "Use"]


class ArenaPool:
    """Lends arenas within the budget `settings.bytes_max`, oldest waiter first."""

    def __init__(self, settings: Arenas, store: Store, clock: Clock) -> None:
        """Start empty; `adopt()` brings in what an earlier daemon left in the store."""
        self._settings = settings
        self._store = store
        self._clock = clock
        self._arenas: dict[bytes, Arena] = {}
        self.budget = Budget(settings, store, self._arenas)
        self._line = Line(self._look)
        self._looked: tuple[object, ...] = ()
        self.denied_s = -math.inf  # when a save last waited in vain
        self.on_hot: Callable[[], None] = lambda: None  # another copy is there: keeps them within their budget
        # One at a time: two threads that fill pages side by side take twice as long each.
        self._maker = anyio.CapacityLimiter(1)

    # -- what is there ---------------------------------------------------------------------

    @property
    def bytes_used(self) -> int:
        """Bytes of all arenas, those in the making included."""
        return self.budget.bytes_used

    @property
    def waiting(self) -> int:
        """How many saves wait for an arena."""
        return len(self._line)

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
        facts = os.fstat(fd)
        page = mmap.mmap(fd, control.PAGE) if is_sealed(fd) and facts.st_size > control.PAGE else None
        found = control.read(page) if page is not None else None
        if page is None or found is None or FD_PREFIX + found.arena.hex() != name or found.arena in self._arenas:
            if page is not None:
                page.close()
            os.close(fd)
            if found is None or found.arena not in self._arenas:
                self._store.remove(name)
            return None
        arena = Arena(found.arena, fd, facts.st_size, page, owner_uid=facts.st_uid, generation=found.generation)
        arena.holder_pid, arena.holder_ticks = found.pid, found.started_ticks
        arena.used_s = self._clock.monotonic_s()
        arena.use = Use.FREE if found.state in {control.FREE, control.RELEASED} else Use.LEASED
        self._arenas[arena.id] = arena
        return arena

    def rejoin(self, holder: Holder) -> None:
        """A process is connected again: the leases that it still has can be asked back from it."""
        for arena in self._arenas.values():
            if arena.use is Use.LEASED and arena.holder is None and self._is_of(arena, holder):
                arena.holder = holder

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
        if size_bytes > self.budget.share_bytes(owner_of(holder.uid)):
            raise OverQuota(f"{size_bytes} bytes are over one user's share", hint="see arenas.bytes_per_uid_max")
        waiter = Waiter(experiment_id, size_bytes, holder)
        self._line.enter(waiter)
        try:
            with anyio.move_on_after(min(wait_s, self._settings.lease_wait_s)):
                while True:
                    waiter.turn = anyio.Event()
                    waiter.wants_room = False
                    arena = self._reusable(waiter) or await self._make_for(waiter)
                    if arena is not None:
                        return self._lend(arena, waiter)
                    self._ask_back(waiter)
                    # Before it nobody behind makes an arena, and there is none to be had as it is.
                    hopeless = waiter.wants_room and not any(arena.is_idle() for arena in self._arenas.values())
                    self._line.pass_on(waiter, hopeless=hopeless)
                    await self._line.wait(waiter)
        finally:
            self._line.leave(waiter)
        if wait_s > 0:  # who asks without patience has another way
            self.denied_s = self._clock.monotonic_s()
        raise NoArena(f"no arena of {size_bytes} bytes came free within {wait_s:g} s")

    def wake(self) -> None:
        """Something was freed: let the waiters look again, in their order."""
        self._line.wake()

    def _look(self) -> None:
        """Look on behalf of all that wait: has anything changed that nobody told? Else ask for arenas again."""
        looked = self._looked
        self._looked = tuple((a.id, a.use, a.readers, a.experiment_id) for a in self._arenas.values())
        if self._looked != looked:
            self.wake()
            return
        now_s = self._clock.monotonic_s()
        if not any(arena.may_be_asked_back(now_s) for arena in self._arenas.values()):
            return
        for waiter in self._line.some():
            self._ask_back(waiter)

    def _lend(self, arena: Arena, waiter: Waiter) -> Arena:
        arena.generation += 1
        arena.use = Use.LEASED
        arena.experiment_id, arena.checkpoint_id = waiter.experiment_id, ""
        arena.holder, arena.holder_pid = waiter.holder, waiter.holder.pid
        arena.asked_back_s = -math.inf
        arena.used_s = self._clock.monotonic_s()
        arena.holder_ticks = control.write_lease(arena.page, arena.id, arena.generation, arena.holder_pid)
        return arena

    def _reusable(self, waiter: Waiter) -> Arena | None:
        """An arena whose pages are there and that fits: free ones first, then the oldest copy of its own, then,
        when there is no room for another arena, the oldest copy of anybody's (of the same user).
        """
        owner = owner_of(waiter.holder.uid)
        fits = [
            arena
            for arena in self._arenas.values()
            if arena.owner_uid == owner and arena.is_idle() and arena.fits(waiter.size_bytes)
        ]
        own = [arena for arena in fits if arena.experiment_id == waiter.experiment_id]
        capped = self.budget.is_spent(waiter.experiment_id)
        free = [arena for arena in (own if capped else fits) if arena.use is Use.FREE]
        if free:
            return max(free, key=lambda arena: (arena in own, arena.used_s))
        room = not capped and self.budget.has_room(waiter.size_bytes)
        hot = sorted(own, key=lambda arena: arena.used_s)
        if len(hot) > 1 or (hot and not room):
            return hot[0]
        if not capped and not room and fits:
            return min(fits, key=lambda arena: arena.used_s)
        return None

    async def _make_for(self, waiter: Waiter) -> Arena | None:
        if self.budget.is_spent(waiter.experiment_id):
            # A size that no longer fits (the model grew) must not lock the experiment out.
            self._drop_unfitting(waiter)
            if self.budget.is_spent(waiter.experiment_id):
                return None
        if self._line.wants_room_before(waiter):
            return None
        owner = owner_of(waiter.holder.uid)
        # A user's own older copies make room in its share first; who is over it holds up nobody else.
        while (over := self.budget.over_share_bytes(owner, waiter.size_bytes)) > 0:
            idle = [a for a in self._arenas.values() if a.owner_uid == owner and a.is_idle()]
            if sum(arena.size_bytes for arena in idle) < over:
                return None
            self.destroy(min(idle, key=lambda arena: (arena.use is Use.HOT, arena.used_s)))
        self._make_room(waiter.size_bytes)
        waiter.wants_room = not self.budget.has_room(waiter.size_bytes)
        if waiter.wants_room:
            return None
        try:
            with self.budget.making(waiter.experiment_id, owner, waiter.size_bytes):
                self._line.served(waiter)
                # Shielded: making is no waiting, and who asks without patience gets what there is room for.
                with anyio.CancelScope(shield=True):
                    fd, page = await anyio.to_thread.run_sync(make, waiter.size_bytes, owner, limiter=self._maker)
        except OSError as error:
            raise NoArena(f"memory for an arena of {waiter.size_bytes} bytes is not to be had: {error}") from error
        arena = Arena(secrets.token_bytes(16), fd, waiter.size_bytes, page, owner, experiment_id=waiter.experiment_id)
        control.write_lease(page, arena.id, 0, 0)
        control.set_state(page, control.FREE)
        # Stored before it is lent: from here on a commit in it outlives this process.
        try:
            self._store.store(arena.name, fd)
        except OSError as error:
            arena.close()
            raise NoArena(f"the service manager can't be given an arena to keep: {error.strerror}") from error
        self._arenas[arena.id] = arena
        failpoint.hit("fdstore.pushed")
        return arena

    def _drop_unfitting(self, waiter: Waiter) -> None:
        """Give up one arena of the experiment that the waiter can't use, the least recently used first."""
        useless = [
            arena
            for arena in self._arenas.values()
            if arena.experiment_id == waiter.experiment_id and arena.is_idle() and not arena.fits(waiter.size_bytes)
        ]
        if useless:
            self.destroy(min(useless, key=lambda arena: (arena.use is Use.HOT, arena.used_s)))

    def _make_room(self, size_bytes: int) -> None:
        """Give up free arenas, then hot copies, least recently used first, until `size_bytes` fit.

        Nothing is given up when all of it together would not make the room.
        """
        idle = [arena for arena in self._arenas.values() if arena.is_idle()]
        held_bytes = self.bytes_used - sum(arena.size_bytes for arena in idle)
        if held_bytes + size_bytes > self._settings.bytes_max:
            return
        idle.sort(key=lambda arena: (arena.use is Use.HOT, arena.used_s))
        for arena in idle:
            if self.budget.has_room(size_bytes):
                return
            self.destroy(arena)

    def _ask_back(self, waiter: Waiter) -> None:
        """Ask for a leased but unwritten arena back, the one that has waited longest for its first byte.

        One at a time: who is asked and begins to write instead gives no answer, and the next look
        asks the next. From its own experiment only who holds nothing may ask: ranks share it.
        """
        now_s = self._clock.monotonic_s()
        mine = any(
            self._is_of(arena, waiter.holder) and arena.use is not Use.FREE
            for arena in self._arenas.values()
            if arena.experiment_id == waiter.experiment_id
        )
        lent = [
            arena
            for arena in self._arenas.values()
            if arena.holder is not waiter.holder
            and not (mine and arena.experiment_id == waiter.experiment_id)
            and arena.may_be_asked_back(now_s)
        ]
        if lent:
            oldest = min(lent, key=lambda arena: arena.used_s)
            oldest.asked_back_s = now_s
            if oldest.holder is not None:
                oldest.holder.push({"push": "reclaim", "arena": oldest.id.hex()})

    # -- coming back -------------------------------------------------------------------------

    def leased(self, arena_id: bytes, generation: int, holder: Holder) -> Arena:
        """Find the arena that the process of `holder` holds under `generation`. NoArena when it does not."""
        arena = self._arenas.get(arena_id)
        lent = arena is not None and arena.use is Use.LEASED and arena.generation == generation
        if arena is None or not lent or not self._is_of(arena, holder):
            raise NoArena(
                f"arena {arena_id.hex()[:12]} is not leased to process {holder.pid} under generation {generation}"
            )
        return arena

    def _is_of(self, arena: Arena, holder: Holder) -> bool:
        return arena.holder_pid == holder.pid and arena.owner_uid == owner_of(holder.uid)

    def undelivered(self, arena: Arena, generation: int) -> None:
        """The answer that lent it never left this process: its holder will not miss it."""
        if arena.use is Use.LEASED and arena.generation == generation and arena.is_unwritten():
            self.free(arena)

    def commit(self, arena: Arena, experiment_id: str, checkpoint_id: str) -> None:
        """The arena's content is now the pipeline's business."""
        arena.use, arena.holder = Use.BUSY, None
        arena.experiment_id, arena.checkpoint_id = experiment_id, checkpoint_id
        arena.used_s = self._clock.monotonic_s()

    def published(self, checkpoint_id: str) -> None:
        """Its bytes are durable: the arena stays as hot copy until it is wanted."""
        arena = self.of_checkpoint(checkpoint_id)
        if arena is not None and arena.use is Use.BUSY:
            control.set_state(arena.page, control.RELEASED)
            arena.use = Use.HOT
            arena.used_s = arena.hot_s = arena.read_s = self._clock.monotonic_s()
            self.on_hot()
            self.wake()

    def free(self, arena: Arena) -> None:
        """Nobody needs its content any more."""
        control.set_state(arena.page, control.FREE)
        arena.use, arena.holder, arena.checkpoint_id = Use.FREE, None, ""
        arena.used_s = self._clock.monotonic_s()
        self.wake()

    def free_checkpoint(self, checkpoint_id: str) -> None:
        """Forget the copy of a checkpoint that was retired, replaced or found damaged; who maps it may read on."""
        arena = self.of_checkpoint(checkpoint_id)
        if arena is not None:
            self.free(arena)

    def orphaned(self, holder: Holder, ended: Collection[str] = ()) -> None:
        """A connection closed: its leases have no holder now; `reap()` sees what becomes of them.

        Those of experiments that it said have `ended` are free: an answer may have crossed the end, and nobody knows of it.
        """
        for arena in self.all():
            if arena.holder is holder and arena.use is Use.LEASED:
                arena.holder = None
                if arena.experiment_id in ended and arena.is_unwritten():
                    self.free(arena)

    def reap(self) -> list[Arena]:
        """Free leases of dead processes; return those that died after their commit, to be admitted."""
        committed = []
        for arena in self.all():
            if arena.use is not Use.LEASED or arena.holder is not None:
                continue
            if arena.descriptor() is not None:
                committed.append(arena)
            else:
                self.take_back(arena)
        return committed

    def take_back(self, arena: Arena) -> None:
        """Free an arena that was lent, and holds no whole save, when the process that borrowed it is dead.

        One whose borrower was never seen may be written for as long as that lives, which nobody can know: its
        memory is never lent again, only forgotten. What the borrower yet commits in it goes to its spool.
        """
        if not arena.holder_ticks:
            self.destroy(arena)
        elif not control.is_alive(arena.holder_pid, arena.holder_ticks):
            self.free(arena)

    def trim(self, idle_s: float | None = None) -> None:
        """Give the memory of free arenas back that were unused for longer than this; None: as configured."""
        before_s = self._clock.monotonic_s() - (self._settings.idle_s if idle_s is None else idle_s)
        for arena in self.all():
            if arena.use is Use.FREE and arena.used_s < before_s and not arena.readers:
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
