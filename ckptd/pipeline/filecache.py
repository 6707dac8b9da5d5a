"""Files that came back from an archive, kept on a local disk within a budget: fetched once, held while in use.

    get     known: held for the reader, and the newest used
            not known: room is made, then fetched (one at a time for a key), compared, made durable, written down
    trim    the longest unused go until the rest fits; what a reader holds never

Files come before their row and go after it: a crash leaves files without a row, and the first use of the next daemon drops them.
A hold ends by itself after HOLD_S: a reader that died does not keep its files for ever.
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import anyio
import structlog

from ckptd import failpoint
from ckptd.catalog import Catalog, cached
from ckptd.catalog.cached import Cached
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.config import Settings
from ckptd.errors import CkptdError, OverQuota
from ckptd.model import FileEntry
from ckptd.worker import Workers
from ckptd.worker.fetching import FetchBegin, FetchDrop, FetchedList, Fetching, FetchKeep, Kept
from ckptd.worker.protocol import Done, FileRecord, Sweep

log = structlog.get_logger()

HOLD_S = 6 * 3600.0
SHELF_CHARS = 2

Fetch = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Item:
    """What an archive holds: 32 hex digits that name it, and its files with their digests."""

    key: str
    files: tuple[FileEntry, ...]

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk."""
        return sum(file.size_bytes for file in self.files)


def to_drop(entries: Sequence[Cached], to_bytes: int) -> list[str]:
    """Name the entries that have to go until the rest has at most `to_bytes`: the longest unused first. Pure.

    What is in use stays, however much it is.
    """
    over = sum(entry.size_bytes for entry in entries) - to_bytes
    gone = []
    for entry in sorted(entries, key=lambda entry: entry.used):
        if over <= 0:
            break
        if not entry.in_use:
            gone.append(entry.key)
            over -= entry.size_bytes
    return gone


@dataclass
class FileCache:
    """See the module. Of this node; the directory is ckptd's own."""

    catalog: Catalog
    workers: Workers
    clock: Clock
    settings: Callable[[], Settings]
    hits: int = 0
    misses: int = 0
    _coming_bytes: int = 0
    _keys: dict[str, anyio.Lock] = field(default_factory=dict)
    _room: anyio.Lock = field(default_factory=anyio.Lock)
    _dropping: dict[str, anyio.Event] = field(default_factory=dict)
    _ready: bool = False

    @property
    def root(self) -> str:
        """Where they lie."""
        return str(self.settings().cache_dir)

    def place(self, key: str) -> str:
        """Return where one lies, or would."""
        return os.path.join(self.root, key[:SHELF_CHARS], key)

    async def get(self, item: Item, holder: str, fetch: Fetch) -> str:
        """Return the directory that holds the item's files, held for `holder` until `release` or HOLD_S are over.

        `fetch` fills the empty directory that it is given, in a worker, a child or wherever it does not
        block this process; it may be cancelled. What it brought is compared before anybody sees it.

        OverQuota      it does not fit beside what is in use: raise cache.bytes_max
        SourceChanged  what was fetched is not what the archive promised
        Whatever `fetch` raises comes out as it is; nothing is kept then.
        """
        await self._recover_once()
        lock = self._keys.setdefault(item.key, anyio.Lock())
        try:
            async with lock:
                if await self.catalog.write(lambda tx: cached.use(tx, item.key, holder, HOLD_S)):
                    self.hits += 1
                    return self.place(item.key)
                self.misses += 1
                await self._make_room(item)
                try:
                    while item.key in self._dropping:
                        await self._dropping[item.key].wait()
                    await self._bring(item, fetch)

                    async def note(tx: Tx) -> None:
                        await cached.add(tx, item.key, item.size_bytes)
                        await cached.use(tx, item.key, holder, HOLD_S)

                    failpoint.hit("fetch.kept")
                    await self.catalog.write(note)
                finally:
                    self._coming_bytes -= item.size_bytes
                return self.place(item.key)
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._keys.pop(item.key, None)

    async def release(self, key: str, holder: str) -> None:
        """A reader is done with it."""
        await self.catalog.write(lambda tx: cached.release(tx, key, holder))

    async def entries(self) -> list[Cached]:
        """Return what is kept, the longest unused first."""
        return await self.catalog.read(lambda conn: cached.entries(conn, self.clock.now()))

    async def trim(self, to_bytes: int) -> list[Cached]:
        """Give up the longest unused until the rest fits; return what went."""
        await self._recover_once()
        async with self._room:
            return await self._trim(to_bytes)

    async def _trim(self, to_bytes: int) -> list[Cached]:
        known = {entry.key: entry for entry in await self.entries()}
        wanted = to_drop(list(known.values()), to_bytes)
        # Said before their rows go: who asks for one of them now waits until its old files are gone.
        self._dropping |= {key: anyio.Event() for key in wanted}
        try:
            gone = await self.catalog.write(lambda tx: cached.forget(tx, wanted)) if wanted else []
            for key in gone:
                await self._drop(key)
        finally:
            for key in wanted:
                self._dropping.pop(key).set()
        return [known[key] for key in gone]

    async def _recover_once(self) -> None:
        """Before the first use: a daemon that never fetches anything starts no worker for it."""
        async with self._room:
            if not self._ready:
                await self._recover()
                self._ready = True

    async def _recover(self) -> None:
        """Drop files that no row names, and forget rows whose files are gone. Errors as Workers.call."""
        kept: Kept = await self.workers.call(FetchedList(root=self.root))
        known = {entry.key for entry in await self.entries()}
        for key in set(kept.keys) - known:
            await self._drop(key)
        lost = sorted(known - set(kept.keys))
        if lost:
            await self.catalog.write(lambda tx: cached.forget(tx, lost, lost=True))
        await self.workers.call(Sweep(root=self.root, older_s=self.settings().orphan_age_s))

    async def _make_room(self, item: Item) -> None:
        """Reserve the item's bytes within the budget; the caller gives the reservation back when its row is there."""
        limit = self.settings().cache.bytes_max
        async with self._room:
            await self._trim(max(limit - self._coming_bytes - item.size_bytes, 0))
            held = await self.catalog.read(cached.used_bytes)
            if held + self._coming_bytes + item.size_bytes > limit:
                raise OverQuota(
                    f"{item.size_bytes} bytes do not fit into cache.bytes_max={limit} beside {held} that are in use",
                    hint="raise cache.bytes_max, or let readers end first",
                )
            self._coming_bytes += item.size_bytes

    async def _bring(self, item: Item, fetch: Fetch) -> None:
        begun: Fetching = await self.workers.call(FetchBegin(root=self.root, key=item.key))
        try:
            await fetch(begun.path)
            files = [FileRecord(f.path, f.size_bytes, f.sha256) for f in item.files]
            kept: Done = await self.workers.call(FetchKeep(root=self.root, key=item.key, path=begun.path, files=files))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._drop(item.key, begun.path)
            raise
        log.info("cache.fetched", key=item.key, bytes=item.size_bytes, was_there=not kept.count)

    async def _drop(self, key: str, path: str = "") -> None:
        try:
            await self.workers.call(FetchDrop(root=self.root, key=key, path=path))
        except CkptdError as error:
            # No row names it any more: the next daemon drops it, or the sweep does.
            log.warning("cache.not_dropped", key=key, **error.to_wire())
