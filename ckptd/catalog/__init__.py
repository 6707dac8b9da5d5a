"""The catalog: what exists, where, how good. One writer, few readers, one schema for three databases.

    async with open_catalog(state_dir / "catalog.sqlite", settings.catalog, clock, bus.publish) as catalog:
        staged = await catalog.write(lambda tx: checkpoints.stage(tx, new))
        page = await catalog.read(lambda conn: listing.find(conn, wanted))

Row functions live in one file per noun and take the transaction or the connection first.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import structlog
from sqlalchemy import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from ckptd import config
from ckptd.catalog import eventlog, faults, sqlite, timesteps, versions
from ckptd.catalog.ballast import Ballast
from ckptd.catalog.edition import Edition
from ckptd.catalog.tx import Tx
from ckptd.catalog.writer import Trouble, Writer
from ckptd.clock import Clock
from ckptd.errors import CatalogFault, CkptdError, NotFound, Unreachable
from ckptd.events import Event

__all__ = ["Catalog", "Tx", "open_catalog", "open_reader"]

T = TypeVar("T")

log = structlog.get_logger()

UPKEEP_COMMITS = 256  # upkeep comes after this many commits,
UPKEEP_S = 60.0  # or with the first one after this long


class Catalog:
    """An open catalog. Made by `open_catalog`."""

    def __init__(self, readers: AsyncEngine, writer: Writer | None, settings: config.Catalog, where: str) -> None:
        """Take over open engines; without a writer the catalog is read-only."""
        self._readers = readers
        self._writer = writer
        self._settings = settings
        self._where = where
        self._reading = anyio.Semaphore(settings.readers)
        self._standing: sqlite.Standing | None = None
        self._torn: Trouble | None = None
        self._upkeep_commits = 0
        self._upkeep_s = writer.clock.monotonic_s() if writer is not None else 0.0

    async def write(self, fn: Callable[[Tx], Awaitable[T]]) -> T:
        """Run `fn` as one transaction; return its result once it is on the disk (FULL sync).

        `fn` must change nothing but the database: it is run again after a full disk was eased. It
        shares the commit with writes that wait beside it, but fails alone. Cancelled while it
        waits: nothing happened. Once begun it runs to its end.

        Busy          WRITERS_MAX writes wait already, or another process holds the database's lock
        NoSpace       the disk is full and the ballast is used up
        CatalogFault  the file is damaged: a person must act
        Unreachable   the catalog was opened for reading only
        Whatever `fn` raises comes out as it is, and its changes are undone.
        """
        if self._writer is None:
            raise Unreachable("the catalog is open for reading only, because no daemon runs")
        result = await self._writer.run(fn)
        if self._upkeep_is_due(self._writer):
            try:
                await self._upkeep(self._writer)
            except (CkptdError, DBAPIError, OSError) as error:
                # The caller's write is on the disk; upkeep comes again.
                log.warning("catalog.upkeep_failed", path=self._where, error=str(error))
        return result

    async def read(self, fn: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `fn` on a reading connection: one consistent view from its first statement on.

        Keep it short (a page, not everything): an open view keeps the WAL from being truncated.
        Waits for one of `catalog.readers` connections; once begun it runs to its end, cancelled or not.

        CatalogFault  the file is damaged: a person must act
        """
        async with self._reading:
            # Shielded: a cancelled statement would cost its connection, and reads are short.
            with anyio.CancelScope(shield=True):
                try:
                    async with self._readers.connect() as conn:
                        result = await fn(conn)
                except (DBAPIError, PoolTimeout, OSError) as error:
                    known = faults.explain(error, self._where)
                    if known is None:
                        raise
                    raise known from error
        return result

    async def touch(self) -> None:
        """Take the writer's turn and the database's lock, and change nothing: returns when the writer is alive.

        Errors as `write`; they are no trouble of a commit's, and are not kept.
        """
        if self._writer is None:
            raise Unreachable("the catalog is open for reading only, because no daemon runs")
        try:
            await self._writer.exclusive(_touch)
        except (DBAPIError, OSError) as error:
            known = faults.explain(error, self._where)
            if known is None:
                raise
            raise known from error

    @property
    def trouble(self) -> Trouble | None:
        """Why nothing can be written at the moment; None as far as is known."""
        return self._torn or (self._writer.trouble if self._writer is not None else None)

    def edition(self, without: frozenset[str] = frozenset()) -> int | None:
        """Return a number that goes up with every commit that may have changed a table not named in `without`.

        It has gone up before the commit's writer is told. None where other processes may write: nobody knows then.
        """
        writer = self._writer
        return writer.edition.of(without) if writer is not None and writer.path is not None else None

    @property
    def reserve(self) -> tuple[int, bool]:
        """Bytes of the reserve beside the catalog, and whether it is whole: it is not while the disk is full."""
        if self._writer is None:
            return 0, True
        return self._writer.ballast.size_bytes, self._writer.ballast.whole

    async def follow_clock(self) -> None:
        """Before wall times are compared: move graces and leases along when the clock was set. Errors as `write`.

        Every transaction does so first; this one makes one when a step is owed.
        """
        if self._writer is None:
            return
        wall = self._writer.wall
        if wall.look() or not wall.known:
            await self.write(lambda tx: timesteps.clamp(tx, tx.clock.now()))
            wall.known = True

    async def recover(self) -> None:
        """Upkeep of every few seconds: the clock, one row written again after trouble, the reserve when there is room."""
        writer = self._writer
        if writer is None:
            return
        try:
            await self.follow_clock()
            if writer.path is not None:
                await self._look_at_files(writer, writer.path)
            if writer.trouble is not None:
                await writer.run(versions.stamp_again)
                log.warning("catalog.recovered", path=self._where)
            if not writer.ballast.whole and await writer.ballast.fill():
                log.warning("catalog.reserve_restored", path=self._where, bytes=writer.ballast.size_bytes)
        except (CkptdError, DBAPIError, OSError) as error:
            log.warning("catalog.not_recovered", path=self._where, cause=type(error).__name__, error=str(error))

    async def _look_at_files(self, writer: Writer, path: Path) -> None:
        """Notice files that were removed or replaced under us: what is committed then is gone with this process.

        The log that lost its name is still open here, so what it holds is moved into the file, now and at each look.
        """
        found = await sqlite.standing(path)
        if self._standing is None:
            self._standing = found
        if found == self._standing:
            return
        saved = await writer.exclusive(sqlite.truncate_wal)
        if self._torn is None:
            error = CatalogFault(
                f"the files of the catalog {path} were removed or replaced while they were in use",
                hint="restart ckptd now; if the catalog itself was removed, run `ckpt rebuild` then",
                path=str(path),
            )
            self._torn = Trouble(error, writer.clock.now())
            log.critical("catalog.torn", saved=saved, **error.to_wire())

    def _upkeep_is_due(self, writer: Writer) -> bool:
        """Claim the turn, so that of many writers that end together one does the upkeep."""
        now_s = writer.clock.monotonic_s()
        if writer.commits - self._upkeep_commits < UPKEEP_COMMITS and now_s - self._upkeep_s < UPKEEP_S:
            return False
        self._upkeep_commits, self._upkeep_s = writer.commits, now_s
        return True

    async def _upkeep(self, writer: Writer) -> None:
        """Keep event log, ballast and WAL at their sizes."""
        await writer.run(eventlog.trim)
        if not writer.ballast.whole:
            await writer.ballast.fill()
        if writer.path is None:
            return
        size_bytes = await sqlite.wal_bytes(writer.path)
        if size_bytes > self._settings.wal_bytes_max and not await writer.exclusive(sqlite.truncate_wal):
            log.warning("catalog.wal_large", path=self._where, size_bytes=size_bytes, why="a reader's view is open")


async def _touch(conn: AsyncConnection) -> None:
    async with conn.begin():
        if conn.dialect.name != "sqlite":  # there BEGIN IMMEDIATE has the lock; elsewhere a BEGIN asks nobody
            await conn.exec_driver_sql("SELECT 1")


@asynccontextmanager
async def open_catalog(
    target: str | Path, settings: config.Catalog, clock: Clock, publish: Callable[[Event], None]
) -> AsyncIterator[Catalog]:
    """Open the catalog at a path or SQLAlchemy URL; make or migrate it first where needed.

    CatalogFault  damaged, newer than this code, or on a network file system (the hint says what to do)
    """
    url = make_url(target) if isinstance(target, str) and "://" in target else sqlite.url_of(Path(target))
    path = sqlite.path_of(url)
    where = str(path) if path is not None else url.render_as_string(hide_password=True)
    ballast = Ballast(Path(f"{path}.ballast"), settings.ballast_bytes if path is not None else 0)
    if path is not None:
        network = url.query.get(sqlite.ALLOW_NETWORK)
        url = url.difference_update_query([sqlite.ALLOW_NETWORK])
        await sqlite.check_place(path, network_allowed=network == "allow")
    writing, reading = _engines(url, settings)
    try:
        async with writing.connect() as conn:
            before = await _make_ready(conn, path, where)
            try:
                await ballast.fill()
            except OSError as error:  # no reason to refuse saves: the disk is not full yet
                log.warning("catalog.no_reserve", path=where, error=str(error))
            edition = Edition()
            edition.follow(writing)
            writer = Writer(
                conn=conn, clock=clock, publish=publish, ballast=ballast, where=where, path=path, edition=edition
            )
            try:
                if before is not None:
                    migrated = {"before": before, "after": versions.HEAD}
                    await writer.run(partial(_tell_migrated, migrated))
                yield Catalog(reading, writer, settings, where)
            finally:
                # Readers go first: the last connection to close is the writer, which moves the WAL into the file.
                with anyio.CancelScope(shield=True):
                    await reading.dispose()
    except DBAPIError as error:
        known = faults.explain(error, where)
        if known is None:
            raise
        raise known from error
    finally:
        with anyio.CancelScope(shield=True):
            await writing.dispose()


def _engines(url: URL, settings: config.Catalog) -> tuple[AsyncEngine, AsyncEngine]:
    if url.get_backend_name() == "sqlite":
        return sqlite.writing_engine(url, settings), sqlite.reading_engine(url, settings)
    readers = create_async_engine(url, pool_size=settings.readers, max_overflow=0, pool_timeout=sqlite.READ_WAIT_S)
    return create_async_engine(url, pool_size=1, max_overflow=0), readers


async def _tell_migrated(data: dict[str, str], tx: Tx) -> None:
    tx.tell("catalog.migrated", data)


async def _make_ready(conn: AsyncConnection, path: Path | None, where: str) -> str | None:
    """Check, then migrate; return the version that it was migrated from. A damaged file stays as it is: nothing is
    written before it is found sound.
    """
    if path is not None:
        damage = await sqlite.quick_check(conn)
        await conn.rollback()
        if damage:
            raise CatalogFault(
                f"the catalog {where} is damaged: {'; '.join(damage)}",
                hint=faults.rebuild_advice(where),
                path=where,
                damage=damage,
            )
    return await versions.bring_up_to_date(conn, path, where)


@asynccontextmanager
async def open_reader(path: Path, settings: config.Catalog) -> AsyncIterator[Catalog]:
    """Open the file read-only, for the CLI while no daemon runs; `write` raises Unreachable.

    NotFound      there is no catalog at `path`
    CatalogFault  damaged, or of another version
    """
    if not await anyio.Path(path).is_file():
        raise NotFound(f"there is no catalog at {path}", hint="start the daemon once: `ckptd`")
    url = sqlite.url_of(path).set(
        database=path.absolute().as_uri(),  # noqa: ASYNC240  text only
        query={"mode": "ro", "uri": "true"},  # never makes or changes the file
    )
    engine = sqlite.reading_engine(url, settings)
    catalog = Catalog(engine, None, settings, str(path))
    try:
        await catalog.read(lambda conn: versions.require_current(conn, str(path)))
        yield catalog
    finally:
        with anyio.CancelScope(shield=True):
            await engine.dispose()
