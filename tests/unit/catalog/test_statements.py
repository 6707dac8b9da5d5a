"""What a connection keeps compiled: the same texts again and again, on every reader soon, and never more than the limit.

A text that is new each time is compiled each time, and pushes out what is needed again. A reader that is seldom used
would go on filling for days, which looks like a leak.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from ckptd import config
from ckptd.catalog import Catalog, roots, schema, sqlite
from ckptd.catalog.roots import NewRoot
from ckptd.catalog.tx import Tx
from ckptd.model import RootKind
from tests.support.catalog import UID


def written(catalog: Catalog) -> set[str]:
    """Every text that the writing connection is sent from now on."""
    seen: set[str] = set()
    engine = catalog._writer.conn.sync_engine  # type: ignore[union-attr]

    def heard(conn: Any, cursor: Any, statement: str, *others: Any) -> None:
        del conn, cursor, others
        seen.add(statement)

    event.listen(engine, "before_cursor_execute", heard)
    event.listen(engine, "savepoint", lambda conn, name: seen.add(name))
    return seen


async def test_a_batch_of_writes_sends_the_texts_of_the_batch_before_it(catalog: Catalog) -> None:
    async def write(tx: Tx) -> None:
        await tx.conn.execute(select(schema.root.c.no))

    async def batch() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(catalog.write, write)

    seen = written(catalog)
    await batch()
    before = set(seen)
    assert any("SAVEPOINT" in statement for statement in before), "there was a batch"
    for _ in range(3):
        await batch()
    assert seen == before


async def test_a_write_that_failed_in_a_batch_leaves_no_savepoint_behind(catalog: Catalog) -> None:
    """Each that stays is memory until the commit, and the next of the same name would be undone to the wrong place."""

    def write(number: int) -> Callable[[Tx], Any]:
        async def run(tx: Tx) -> None:
            await roots.ensure(tx, NewRoot(path=f"/{number}", kind=RootKind.WATCHED, uid=UID))
            if number % 2:
                raise ValueError

        return run

    async def one(number: int) -> None:
        try:
            await catalog.write(write(number))
        except ValueError:
            assert number % 2

    seen: list[str] = []
    engine = catalog._writer.conn.sync_engine  # type: ignore[union-attr]
    event.listen(engine, "before_cursor_execute", lambda conn, cursor, statement, *_: seen.append(statement.split()[0]))
    async with anyio.create_task_group() as group:
        for number in range(9):
            group.start_soon(one, number)
    assert seen.count("ROLLBACK") >= 1
    assert seen.count("SAVEPOINT") == seen.count("RELEASE") > seen.count("ROLLBACK")
    assert {root.path for root in await catalog.read(roots.all_roots)} == {f"/{n}" for n in range(0, 9, 2)}


@pytest.mark.parametrize("readers", [1, 3])
async def test_reads_go_round_all_readers(catalog: Catalog, tmp_path: Path, readers: int) -> None:
    """Each has soon what it will ever have."""
    engine = sqlite.reading_engine(sqlite.url_of(tmp_path / "catalog.sqlite"), config.Catalog(readers=readers))
    used = []

    async def read() -> None:
        async with engine.connect() as conn:
            await conn.execute(text("SELECT 1"))
            used.append((await conn.get_raw_connection()).driver_connection)
            await anyio.sleep(0.05)

    async with anyio.create_task_group() as group:
        for _ in range(readers):
            group.start_soon(read)
    assert len(set(map(id, used))) == readers
    used.clear()
    for _ in range(2 * readers):
        await read()
    assert [id(one) for one in used[:readers]] == [id(one) for one in used[readers:]]
    assert len(set(map(id, used))) == readers
    await engine.dispose()


@pytest.mark.parametrize(
    ("kind", "limit"), [("reading", "READER_STATEMENTS_MAX"), ("writing", "WRITER_STATEMENTS_MAX")]
)
async def test_a_connection_keeps_no_more_compiled_statements_than_its_limit(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, limit: str
) -> None:
    """What the driver was asked to keep, and that it does: a text that was pushed out is parsed again."""
    monkeypatch.setattr(sqlite, limit, 8)
    made = getattr(sqlite, f"{kind}_engine")
    engine: AsyncEngine = made(sqlite.url_of(tmp_path / "catalog.sqlite"), config.Catalog(readers=1))
    parsed: list[str] = []

    def allow(action: int, *of: str | None) -> int:
        if action == sqlite3.SQLITE_SELECT:
            parsed.append(str(of))
        return sqlite3.SQLITE_OK

    async with engine.connect() as conn:
        driver: Any = (await conn.get_raw_connection()).driver_connection
        await driver._execute(driver._conn.set_authorizer, allow)
        again = text("SELECT 0")
        for between, times in ((4, 1), (20, 2)):
            parsed.clear()
            await conn.execute(again)
            seen = len(parsed)
            for number in range(between):
                await conn.execute(text(f"SELECT {number + 1} + {between}"))
            await conn.execute(again)
            assert len(parsed) - between - seen == times - 1, "compiled once, and again only when there was no room"
    await engine.dispose()
