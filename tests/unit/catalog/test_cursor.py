"""One visit to the database's thread for each statement, and what the libraries make of it afterwards."""

import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiosqlite import Connection
from sqlalchemy import Column, Integer, MetaData, String, Table, bindparam, exc, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from ckptd import config
from ckptd.catalog import sqlite

THING = Table("thing", MetaData(), Column("no", Integer, primary_key=True), Column("name", String, unique=True))


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    made = sqlite.writing_engine(sqlite.url_of(tmp_path / "db"), config.Catalog())
    async with made.begin() as conn:
        await conn.run_sync(THING.metadata.create_all)
        await conn.execute(insert(THING), [{"name": name} for name in ("a", "b", "c")])
    yield made
    await made.dispose()


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was sent to the database's thread, by name."""
    seen: list[str] = []
    real = Connection._execute

    async def counted(self: Connection, fn: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(fn.__name__)
        return await real(self, fn, *args, **kwargs)

    monkeypatch.setattr(Connection, "_execute", counted)
    return seen


async def test_a_statement_costs_one_visit_whatever_it_is(engine: AsyncEngine, visits: list[str]) -> None:
    async with engine.begin() as conn:
        visits.clear()
        for statement in (
            select(THING),
            insert(THING).values(name="d"),
            insert(THING).values(name="e").returning(THING.c.no),
            update(THING).where(THING.c.name == "a").values(name="x"),
        ):
            await conn.execute(statement)
        assert visits == ["_whole"] * 4


async def test_a_transaction_costs_its_begin_its_statements_and_its_end(engine: AsyncEngine, visits: list[str]) -> None:
    async with engine.connect() as conn:
        visits.clear()
        async with conn.begin():
            await conn.execute(select(THING))
        assert visits == ["_whole", "_whole", "commit"]


async def test_a_read_begins_its_view_in_the_visit_of_its_first_statement(
    engine: AsyncEngine, visits: list[str], tmp_path: Path
) -> None:
    readers = sqlite.reading_engine(sqlite.url_of(tmp_path / "db"), config.Catalog())
    count = select(func.count()).select_from(THING)
    for _ in range(2):  # a view ends with its read, also on a connection that is used again
        async with readers.connect() as conn:
            visits.clear()
            before = (await conn.execute(count)).scalar_one()
            assert visits == ["_whole"]
            async with engine.begin() as writing:
                await writing.execute(insert(THING).values(name=f"later {before}"))
            visits.clear()
            assert (await conn.execute(count)).scalar_one() == before, "one view from the first statement on"
            assert visits == ["_whole"]
            visits.clear()
        assert visits == ["rollback"]
    assert before == 4
    await readers.dispose()


async def test_rows_counts_and_numbers_are_those_of_the_database(engine: AsyncEngine) -> None:
    async with engine.begin() as conn:
        found = (await conn.execute(select(THING).order_by(THING.c.no))).all()
        assert [(row.no, row.name) for row in found] == [(1, "a"), (2, "b"), (3, "c")]
        assert (await conn.execute(select(THING).where(THING.c.no == 9))).one_or_none() is None
        assert (await conn.execute(update(THING).values(name=THING.c.name + "!"))).rowcount == 3
        assert (await conn.execute(insert(THING).values(name="d"))).inserted_primary_key == (4,)
        returned = await conn.execute(update(THING).where(THING.c.no > 2).values(name=None).returning(THING.c.no))
        assert returned.scalars().all() == [3, 4]
        many = await conn.execute(
            update(THING).where(THING.c.no == bindparam("of")).values(name=bindparam("new")),
            [{"of": 1, "new": "p"}, {"of": 2, "new": "q"}],
        )
        assert many.rowcount == 2
        assert (await conn.execute(select(THING.c.name).where(THING.c.no < 3))).scalars().all() == ["p", "q"]
        halves = (await conn.execute(select(THING.c.no))).partitions(3)
        assert [len(part) for part in halves] == [3, 1]


async def test_errors_are_the_librarys_and_leave_the_connection_of_use(engine: AsyncEngine) -> None:
    async with engine.connect() as conn:
        with pytest.raises(exc.IntegrityError):
            await conn.execute(insert(THING).values(name="a"))
        with pytest.raises(exc.OperationalError, match="no such table"):
            await conn.execute(text("SELECT * FROM nowhere"))
        assert (await conn.execute(select(THING.c.name))).scalars().all() == ["a", "b", "c"]


async def test_a_connection_that_was_closed_is_an_operational_error(engine: AsyncEngine) -> None:
    async with engine.connect() as conn:
        driver: Any = (await conn.get_raw_connection()).driver_connection
        await driver.close()
        with pytest.raises(exc.OperationalError):
            await conn.execute(select(THING))


async def test_rows_that_nobody_fetched_hold_no_lock(engine: AsyncEngine, tmp_path: Path) -> None:
    """An open cursor would keep the view of its statement, and the write-ahead log could not be cut."""
    async with engine.begin() as conn:
        await conn.execute(select(THING))
    other = sqlite3.connect(tmp_path / "db")
    assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
    other.close()


async def test_a_statement_that_is_cancelled_holds_up_no_later_one(engine: AsyncEngine) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def stand_still() -> int:
        begun.set()
        go_on.wait(60)
        return 1

    async def cancel() -> None:
        await anyio.to_thread.run_sync(begun.wait, 60)
        scope.cancel()

    async with engine.connect() as conn:
        driver: Any = (await conn.get_raw_connection()).driver_connection
        await driver.create_function("stand_still", 0, stand_still)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(cancel)
                await conn.execute(text("SELECT stand_still()"))
        go_on.set()
        assert scope.cancelled_caught
    await anyio.to_thread.run_sync(driver._thread.join, 60)  # else it may still have a word for a loop that is closed
    async with engine.connect() as conn:
        assert (await conn.execute(select(THING.c.name))).scalars().all() == ["a", "b", "c"]
