"""What is particular to SQLite: its promises are pragmas, its files are checked before they are trusted.

one connection writes and truncates the WAL     (two could corrupt it before SQLite 3.51.3)
synchronous=FULL                                 NORMAL loses acknowledged commits at a power cut
BEGIN IMMEDIATE for the writer                   an upgrade from reading to writing can't wait
BEGIN + query_only for readers                   one view from the first statement on
"""

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import anyio.to_thread
from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from ckptd import config, failpoint
from ckptd.catalog.cursor import Driver, begin_views
from ckptd.errors import Bug, CatalogFault
from ckptd_client import places

BUSY_TIMEOUT_MS = 5000  # how long one statement waits for another process's lock
TRUNCATE_WAIT_MS = 250  # how long truncation waits for readers, while every write waits for it
READ_WAIT_S = 10.0  # how long a read waits for a connection
VERSION_TABLE = "alembic_version"  # alembic's own; what has it is a catalog
_JOURNAL_BYTE = 18  # of the file's header: how it is journalled, https://sqlite.org/fileformat.html
_ROLLBACK = b"\x01"
# Of the connection that writes, and of each that reads: the daemon's own memory. What is not in it the kernel has, and
# whatever a reader has in it is void with the next commit, but stays until that reader is asked again: of several that
# are seldom asked that is memory for nothing, and more with each day that the catalog grows.
WRITER_CACHE_KIB, READER_CACHE_KIB = 2048, 256
# Compiled statements that a connection keeps, of 2 to 30 KiB in some hundred pieces each. A writer keeps all that the
# daemon has. A reader keeps those of the last moments, and compiles others anew, in some tens of microseconds each.
# Room for most of them would be worse than either: some were pushed out in each second, and their pieces left gaps that
# nothing fitted into.
WRITER_STATEMENTS_MAX, READER_STATEMENTS_MAX = 256, 16
ALLOW_NETWORK = "network"  # in the URL's query: "allow" accepts a network file system


def path_of(url: URL) -> Path | None:
    """Return the file behind a SQLite URL; None for another database or one in memory."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return Path(url.database)


def url_of(path: Path) -> URL:
    """Return the URL of a catalog file."""
    return URL.create("sqlite+aiosqlite", database=str(path))


def writing_engine(url: URL, settings: config.Catalog) -> AsyncEngine:
    """Return an engine with exactly one connection, which writes."""
    engine = create_async_engine(
        url, module=Driver(), poolclass=StaticPool, connect_args={"cached_statements": WRITER_STATEMENTS_MAX}
    )
    pragmas = (
        "PRAGMA journal_mode=WAL",
        "PRAGMA synchronous=FULL",
        "PRAGMA foreign_keys=ON",
        f"PRAGMA journal_size_limit={settings.wal_bytes_max}",
    )
    _prepare(engine, (*pragmas, f"PRAGMA cache_size=-{WRITER_CACHE_KIB}"), "BEGIN IMMEDIATE")
    return engine


def reading_engine(url: URL, settings: config.Catalog) -> AsyncEngine:
    """Return an engine whose connections can't write, and so never truncate the WAL either."""
    # In turn, not the one that was used last: one that is used when all others are busy would go on filling for days.
    engine = create_async_engine(
        url,
        module=Driver(),
        pool_size=settings.readers,
        max_overflow=0,
        pool_timeout=READ_WAIT_S,
        connect_args={"cached_statements": READER_STATEMENTS_MAX},
    )
    _prepare(engine, ("PRAGMA query_only=ON", f"PRAGMA cache_size=-{READER_CACHE_KIB}"))
    event.listen(engine.sync_engine, "connect", lambda connection, _: begin_views(connection))
    return engine


def _prepare(engine: AsyncEngine, pragmas: tuple[str, ...], begin: str = "") -> None:
    def connected(connection: Any, record: Any) -> None:
        del record
        connection.isolation_level = None  # the driver begins nothing by itself; "begin" below does
        cursor = connection.cursor()
        # Temporary files in memory: a statement must not fail because no descriptor is left for its journal.
        ours = (f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}", "PRAGMA temp_store=MEMORY")
        for pragma in (*ours, *pragmas):
            cursor.execute(pragma)
        cursor.close()

    def begun(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine.sync_engine, "connect", connected)
    if begin:
        event.listen(engine.sync_engine, "begin", begun)


async def check_place(path: Path, *, network_allowed: bool) -> None:
    """Refuse a network file system, and make the file 0600 before SQLite would make it wider.

    CatalogFault  with the reason
    """

    def check() -> None:
        kind = places.network_type(str(path))
        if kind is not None and not network_allowed:
            raise CatalogFault(
                f"{path} is on a network file system ({kind}): SQLite's WAL does not work there",
                hint="set CKPTD_DIR to a node-local directory; manifests and `ckpt rebuild` carry knowledge between nodes",
                path=str(path),
            )
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                header = os.pread(fd, _JOURNAL_BYTE + 1, 0)
            finally:
                os.close(fd)
        except OSError as error:
            raise CatalogFault(
                f"the catalog {path} can't be opened for writing: {error.strerror}",
                hint="check the owner and the permissions of the file and its directory",
                path=str(path),
            ) from error
        if header[_JOURNAL_BYTE:] == _ROLLBACK:
            _check_ours(path)

    await anyio.to_thread.run_sync(check)


def _check_ours(path: Path) -> None:
    """Refuse somebody else's database before a pragma of ours could change it: our own is in WAL mode already."""
    other = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        names = {str(row[0]) for row in other.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError:
        return  # damaged, or locked: opening it says so
    finally:
        other.close()
    if names and VERSION_TABLE not in names:
        raise foreign_tables(names)


def foreign_tables(names: set[str]) -> CatalogFault:
    """Return the error of a database that holds tables, but not ours."""
    return CatalogFault(
        f"the database holds tables that are not ckptd's: {', '.join(sorted(names))[:200]}",
        hint="name another database in catalog.url",
    )


async def quick_check(conn: AsyncConnection) -> list[str]:
    """Return what PRAGMA quick_check finds wrong; empty when the file is sound (0.3 s per million rows)."""
    found = [str(row[0]) for row in await conn.exec_driver_sql("PRAGMA quick_check(5)")]
    return [] if found == ["ok"] else found


async def wal_bytes(path: Path) -> int:
    """Size of the write-ahead log."""

    def size() -> int:
        with contextlib.suppress(FileNotFoundError):
            return Path(f"{path}-wal").stat().st_size
        return 0

    return await anyio.to_thread.run_sync(size)


Standing = tuple[tuple[int, int] | None, ...]


async def standing(path: Path) -> Standing:
    """Say which files the names of the catalog and its write-ahead log lead to; None for one that leads nowhere."""

    def look() -> Standing:
        found: list[tuple[int, int] | None] = []
        for name in (path, Path(f"{path}-wal")):
            try:
                facts = os.stat(name)
            except FileNotFoundError:
                found.append(None)
            else:
                found.append((facts.st_dev, facts.st_ino))
        return tuple(found)

    return await anyio.to_thread.run_sync(look)


async def truncate_wal(conn: AsyncConnection) -> bool:
    """Move the WAL into the file and cut it to nothing; False when a reader's view still needs it."""
    await pragma(conn, f"busy_timeout={TRUNCATE_WAIT_MS}")
    try:
        failpoint.hit("catalog.truncate")
        busy, *_ = await pragma(conn, "wal_checkpoint(TRUNCATE)")
        failpoint.hit("catalog.truncated")
    finally:
        await pragma(conn, f"busy_timeout={BUSY_TIMEOUT_MS}")  # noqa: ASYNC102  Writer.exclusive shields it
    return not busy


async def pragma(conn: AsyncConnection, words: str) -> Any:
    """Run a pragma between transactions, past SQLAlchemy, which would begin one for it; return its first row."""
    driver = (await conn.get_raw_connection()).driver_connection
    if driver is None:
        raise Bug("the catalog's connection is gone")
    async with driver.execute(f"PRAGMA {words}") as cursor:
        return await cursor.fetchone()


async def snapshot(path: Path, target: Path) -> None:
    """Copy a live catalog to `target` by the backup API: whole, or not there, whatever dies. OSError, sqlite3.Error.

    The copy is fsynced under another name, renamed, and its directory fsynced. SQLite's own journal
    would not do: it is unlinked without an fsync, so after a power cut it may be back and undo the copy.
    """

    def copy() -> None:
        fresh = f"{target}.tmp"  # what an earlier, killed try left there is begun anew
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with (
                contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as source,
                contextlib.closing(sqlite3.connect(fresh)) as backup,
            ):
                backup.execute("PRAGMA journal_mode=OFF")
                source.backup(backup)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(fresh, target)  # noqa: TID251 - the catalog lies in the state directory, which workers don't serve
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    await anyio.to_thread.run_sync(copy)
