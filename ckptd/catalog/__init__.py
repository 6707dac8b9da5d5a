"""The catalog: what exists, where, how good. One writer, few readers, one schema for three databases.

    async with open_catalog(state_dir / "catalog.sqlite", settings.catalog, clock, bus.publish) as catalog:
        staged = await catalog.write(lambda tx: checkpoints.stage(tx, new))
        page = await catalog.read(lambda conn: listing.find(conn, wanted))

Row functions live in one file per noun and take the transaction or the connection first.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import structlog
from sqlalchemy import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from ckptd import config
from ckptd.catalog import eventlog, faults, sqlite, versions
from ckptd.catalog.ballast import Ballast
from ckptd.catalog.tx import Tx
from ckptd.catalog.writer import Writer
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
                except (DBAPIError, PoolTimeout) as error:
                    known = faults.explain(error, self._where)
                    if known is None:
                        raise
                    raise known from error
        return result

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
        if writer.eased_full_disk:
            writer.eased_full_disk = not await writer.ballast.fill()
        if writer.path is None:
            return
        size_bytes = await sqlite.wal_bytes(writer.path)
        if size_bytes > self._settings.wal_bytes_max and not await writer.exclusive(sqlite.truncate_wal):
            log.warning("catalog.wal_large", path=self._where, size_bytes=size_bytes, why="a reader's view is open")


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
            await _make_ready(conn, path, where)
            await ballast.fill()
            writer = Writer(conn=conn, clock=clock, publish=publish, ballast=ballast, where=where, path=path)
            try:
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


async def _make_ready(conn: AsyncConnection, path: Path | None, where: str) -> None:
    """Check, then migrate. The damaged file stays as it is: nothing is written before it is found sound."""
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
    await versions.bring_up_to_date(conn, path, where)


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
