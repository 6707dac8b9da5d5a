"""Many keys, few statements."""

import os
from typing import Any

import pytest
from sqlalchemy import ColumnElement, event, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import Catalog, bests, checkpoint_rows, eventlog, holds, schema
from ckptd.catalog.keys import LENGTHS, PARAMETERS_MAX, one_of, padded
from ckptd.catalog.tx import Tx
from ckptd.model import new_id
from tests.support.catalog import StillClock, experiment, saved


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 64, 500, 512, 700])
def test_a_list_is_filled_up_with_what_it_holds_already(count: int) -> None:
    keys = list(range(count))
    filled = padded(keys)
    assert filled[:count] == keys
    assert set(filled) == set(keys)
    assert len(filled) in {0, *LENGTHS, 700}


async def test_pages_of_any_length_are_asked_for_in_a_few_statements(catalog: Catalog, clock: StillClock) -> None:
    """Each length was a statement of its own, kept compiled by each connection."""
    known = await experiment(catalog)
    ids = [(await saved(catalog, known, step)).id for step in range(1, 4)] + [new_id() for _ in range(97)]
    await catalog.write(lambda tx: holds.pin(tx, ids[2], 0))
    statements: set[str] = set()

    def note(*args: Any) -> None:
        statements.add(args[2])

    event.listen(Engine, "before_cursor_execute", note)
    try:
        for count in range(1, 101):
            page = ids[:count]
            found = await catalog.read(lambda conn, page=page: checkpoint_rows.get_many(conn, page))
            assert set(found) == set(ids[: min(count, 3)])
            held = await catalog.read(lambda conn, page=page: holds.of_checkpoints(conn, page, clock.now()))
            assert [one.checkpoint_id for one in held] == ids[2:3] * (count > 2)
            assert await catalog.read(lambda conn, page=page: bests.of_checkpoints(conn, page)) == []
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(statements) < 10 * len(LENGTHS), len(statements)
    assert max(statement.count("?") for statement in statements) < 150, "each would be kept, of 100 KB"


@pytest.mark.parametrize("count", [PARAMETERS_MAX, PARAMETERS_MAX + 1, 500])
async def test_a_list_of_any_length_finds_what_a_column_of_any_kind_keeps(catalog: Catalog, count: int) -> None:
    """Text that JSON escapes, what is kept in another form than it has (a path of bytes, a 64th bit), numbers."""
    kept, path, ino = schema.checkpoint.c, os.fsdecode(b"/r/\xff\"\\\n\x01'"), 2**64 - 7
    one = await saved(catalog, await experiment(catalog), 1)
    await catalog.write(lambda tx: tx.conn.execute(update(schema.checkpoint).values(path=path, ino=ino)))

    async def found(conn: AsyncConnection, column: ColumnElement[Any], key: Any, others: list[Any]) -> list[Any]:
        return list((await conn.execute(select(column).where(one_of(column, [*others, key])))).scalars())

    numbers = list(range(10**6, 10**6 + count - 1))
    texts = [str(number) for number in numbers]
    for column, key, others in [
        (kept.path, path, texts),
        (kept.ino, ino, numbers),
        (kept.step, 1, numbers),
        (kept.id, one.id, texts),
    ]:
        assert await catalog.read(lambda conn, asked=(column, key, others): found(conn, *asked)) == [key]
    assert await catalog.read(lambda conn: found(conn, kept.id, one.id.upper(), texts)) == []


async def test_events_of_any_number_are_written_in_a_few_statements_and_in_their_order(catalog: Catalog) -> None:
    statements: set[str] = set()

    def note(*args: Any) -> None:
        statements.add(args[2])

    event.listen(Engine, "before_cursor_execute", note)
    try:
        for count in (2, 15, 16, 17, 33, 50, 100):

            async def tell(tx: Tx, count: int = count) -> None:
                for number in range(count):
                    tx.tell("config.reloaded", {"changed": [str(number)]})

            await catalog.write(tell)
            logged = (await catalog.read(eventlog.page))[-count:]
            assert [one.event.data["changed"] for one in logged] == [[str(number)] for number in range(count)]
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert max(statement.count("?") for statement in statements) <= 16 * 5
