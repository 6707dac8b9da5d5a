"""What leaves the catalog is a typed record, and SQL is spoken in the catalog only."""

import ast
import dataclasses
import re
from typing import Any

import pytest

from ckptd.catalog import (
    Catalog,
    audits,
    checkpoints,
    eventlog,
    experiments,
    holds,
    listing,
    metrics,
    queue,
    roots,
    schema,
)
from ckptd.catalog.listing import Filter
from ckptd.catalog.metrics import Point
from tests.support import tree
from tests.support.catalog import experiment, saved

INSIDE = ("ckptd/catalog/", "ckptd/query/")
SQL = re.compile(
    r"\s*(?:SELECT\b.+\bFROM|INSERT INTO|UPDATE \w+ SET|DELETE FROM|CREATE (?:TABLE|INDEX)|PRAGMA)\b", re.DOTALL
)
# A type to annotate with; and the library's version, which `ckpt doctor` tells.
HARMLESS = {"sqlalchemy.ext.asyncio", "sqlalchemy.ext.asyncio.AsyncConnection", "sqlite3"}
DATABASES = {"sqlalchemy", "sqlite3", "aiosqlite", "alembic"}


async def test_every_reader_returns_frozen_records(catalog: Catalog) -> None:
    """M037: nobody outside can change a row by changing what was read."""
    known = await experiment(catalog)
    one = await saved(catalog, known, 5, metrics={"loss": 1.0})
    await catalog.write(lambda tx: metrics.append(tx, known, 1, [Point("loss", 5, 1.0, one.created_at)]))

    async def read(conn: Any) -> list[Any]:
        page = await listing.find(conn, Filter())
        logged = await eventlog.page(conn)
        return [
            await checkpoints.get(conn, one.id),
            *await checkpoints.files(conn, one.id),
            page,
            *page.checkpoints,
            *await metrics.tail(conn, known, 0, 10),
            *logged,
            *await roots.all_roots(conn),
            *await queue.unfinished(conn, 10),
            *(await audits.page(conn))[0],
            *await holds.of_checkpoint(conn, one.id, one.created_at),
            *(await experiments.page(conn))[0],
        ]

    found = await catalog.read(read)
    assert len(found) >= 6
    for record in found:
        assert dataclasses.is_dataclass(record), record
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, dataclasses.fields(record)[0].name, None)


def test_no_object_relational_mapper_is_used() -> None:
    """M037: tables and records; no sessions, no lazy loading, nothing that writes by itself."""
    assert [
        path for path in tree.python("ckptd") if any(n.startswith("sqlalchemy.orm") for n in tree.imports(path))
    ] == []


def test_sql_is_spoken_in_the_catalog_only() -> None:
    """M034: one schema, used by everybody through it; no second spelling of a table's name anywhere."""
    outside = [path for path in tree.python("ckptd", "client", "demo") if not path.startswith(INSIDE)]
    named = {path: {name for name in tree.imports(path) if name.split(".")[0] in DATABASES} for path in outside}
    assert {name for names in named.values() for name in names} <= HARMLESS, named
    assert [path for path in outside if re.search(r"\bsqlite3\.(?!sqlite_version)", tree.text(path))] == []
    said = [f"{path}: {text[:60]}" for path in outside for text in strings(path) if SQL.match(text)]
    assert said == []


def test_sql_that_is_written_by_hand_names_tables_of_the_schema() -> None:
    """M034: the few statements that SQLAlchemy has no words for."""
    tables = set(schema.metadata.tables) | {"alembic_version", "sqlite_master", "sqlite_schema"}
    foreign = []
    for path in tree.python("ckptd"):
        for text in strings(path):
            if path.startswith(INSIDE) and SQL.match(text):
                named = re.findall(r"(?:FROM|INTO|UPDATE|ON|TABLE) ([a-z_]+)", text)
                foreign += [f"{path}: {name}" for name in named if name not in tables]
    assert foreign == []


def strings(path: str) -> list[str]:
    nodes = (node for node in ast.walk(tree.parsed(path)) if isinstance(node, ast.Constant))
    return [node.value for node in nodes if isinstance(node.value, str)]
