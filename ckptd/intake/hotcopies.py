"""Keeps the copies of saves that stay in memory within what the configuration allows.

    the budget (hot_bytes_max)    looked at with each new copy; what goes is forgotten, its arena lent again
    time (hot_s)                  every LOOK_S; the memory goes back to the machine
    the machine runs short        every LOOK_S; unused arenas first, then the least dear copies, and only as
    (memory_free_bytes_min)       many as are missing

Which copies are best or pinned the catalog knows; that is looked up every LOOK_S as well, so a budget
that bites in between goes by what was true then. Which ones to give up is decided in hot.py.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import Catalog, bests, holds
from ckptd.clock import Clock, tick
from ckptd.config import Arenas
from ckptd.errors import CkptdError
from ckptd.intake.arenas import Arena, ArenaPool, Use
from ckptd.intake.hot import HotCopy, Kind, given_up, outlived

log = structlog.get_logger()

LOOK_S = 10.0
_MEMINFO = Path("/proc/meminfo")


class HotCopies:
    """See the module. Makes itself the pool's `on_hot`."""

    def __init__(self, pool: ArenaPool, catalog: Catalog, clock: Clock, settings: Callable[[], Arenas]) -> None:
        """Nothing is known of any copy yet."""
        self._pool = pool
        self._catalog = catalog
        self._clock = clock
        self._settings = settings
        self._kinds: dict[str, frozenset[Kind]] = {}
        self.available_bytes: Callable[[], int | None] = available_bytes
        self.given_up = 0
        pool.on_hot = self.keep

    @property
    def bytes_used(self) -> int:
        """Bytes of all copies."""
        return sum(arena.size_bytes for arena in self._arenas())

    def keep(self) -> None:
        """Forget what does not fit into the budget. The arenas stay for the next saves."""
        settings = self._settings()
        for arena in self._named(given_up(self._copies(), settings.hot_policy, settings.hot_bytes_max)):
            self._pool.free(arena)
            self.given_up += 1

    async def run(self) -> None:
        """Look every LOOK_S until cancelled."""
        while True:
            await tick(LOOK_S)
            try:
                await self.look()
            except CkptdError as error:
                log.warning("hot.not_looked", cause=error.code, **error.to_wire())

    async def look(self) -> None:
        """Learn what the copies are, then give up what is over the budget, too old, or wanted by the machine.

        Errors of Catalog.read; memory that the machine wants is given back all the same.
        """
        self.ease()
        settings = self._settings()
        ids = [arena.checkpoint_id for arena in self._arenas()]
        if ids and {"best", "pinned"} & set(settings.hot_policy):
            self._kinds = await self._catalog.read(lambda conn: self._look_up(conn, ids))
        self.keep()
        for arena in self._named(outlived(self._copies(), self._clock.monotonic_s() - settings.hot_s)):
            self._pool.destroy(arena)
            self.given_up += 1

    def ease(self) -> None:
        """Give memory back while the machine has less than memory_free_bytes_min; never a copy that is read."""
        settings = self._settings()
        available = self.available_bytes()
        if available is None or available >= settings.memory_free_bytes_min:
            return
        unused = self._pool.bytes_used
        self._pool.trim(idle_s=0.0)
        missing = settings.memory_free_bytes_min - available - (unused - self._pool.bytes_used)
        if missing <= 0:
            return
        least_first = given_up(self._copies(), settings.hot_policy, 0)
        gone_bytes = 0
        for arena in self._named(least_first):
            if gone_bytes >= missing:
                break
            gone_bytes += arena.size_bytes
            self._pool.destroy(arena)
            self.given_up += 1
        log.info("memory.short", available_bytes=available, given_back_bytes=unused - self._pool.bytes_used)

    def _arenas(self) -> list[Arena]:
        return [arena for arena in self._pool.all() if arena.use is Use.HOT]

    def _copies(self) -> list[HotCopy]:
        arenas = self._arenas()
        newest: dict[str, Arena] = {}
        for arena in arenas:
            known = newest.setdefault(arena.experiment_id, arena)
            if arena.hot_s > known.hot_s:
                newest[arena.experiment_id] = arena
        return [self._copy(arena, is_newest=newest[arena.experiment_id] is arena) for arena in arenas]

    def _copy(self, arena: Arena, *, is_newest: bool) -> HotCopy:
        kinds = self._kinds.get(arena.checkpoint_id, frozenset())
        if is_newest:
            kinds |= {"newest"}
        return HotCopy(arena.id, arena.size_bytes, arena.read_s, kinds, is_read=arena.readers > 0)

    def _named(self, keys: Iterable[bytes]) -> list[Arena]:
        return [arena for arena in map(self._pool.get, keys) if arena is not None]

    async def _look_up(self, conn: AsyncConnection, ids: list[str]) -> dict[str, frozenset[Kind]]:
        best = {place.checkpoint_id for place in await bests.of_checkpoints(conn, ids)}
        held = await holds.of_checkpoints(conn, ids, self._clock.now())
        pinned = {hold.checkpoint_id for hold in held if hold.kind == "pin"}
        known: dict[str, frozenset[Kind]] = {}
        for one in ids:
            known[one] = frozenset([*(["best"] if one in best else []), *(["pinned"] if one in pinned else [])])  # type: ignore[list-item]
        return known


def available_bytes() -> int | None:
    """Return how much memory the machine could still give out; None where the kernel does not say. Does not block."""
    try:
        fd = os.open(_MEMINFO, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        lines = os.pread(fd, 4096, 0).splitlines()
    finally:
        os.close(fd)
    found = [line.split() for line in lines if line.startswith(b"MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None
