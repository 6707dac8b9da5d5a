"""The schema: its indexes serve the shipped queries, its keys refuse orphans, its migrations end in it."""

import os
import re
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event, insert
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateIndex, CreateTable

from ckptd.catalog import (
    Catalog,
    audits,
    bests,
    checkpoint_rows,
    checkpoints,
    contenders,
    eventlog,
    experiments,
    history,
    holds,
    hookruns,
    keys,
    listing,
    metrics,
    open_reader,
    queue,
    roots,
    schema,
    versions,
)
from ckptd.catalog.contenders import Among
from ckptd.catalog.listing import Filter, Scope
from ckptd.errors import CatalogFault, CkptdError
from ckptd.model import Level, State, new_id
from tests.support.catalog import SETTINGS, StillClock, experiment, opened, saved

SHIPPED: dict[str, Callable[..., Awaitable[Any]]] = {
    "checkpoint by id": lambda c, x: checkpoints.get(c, x.one),
    "files": lambda c, x: checkpoints.files(c, x.one),
    "many": lambda c, x: checkpoints.get_many(c, [x.one, x.one]),
    "newest good": lambda c, x: checkpoint_rows.newest_good(c, x.known),
    "list": lambda c, x: listing.find(c, Filter()),
    "list next": lambda c, x: listing.find(c, Filter(after="n:5")),
    "list project": lambda c, x: listing.find(c, Filter(project="demo")),
    "list experiment": lambda c, x: listing.find(c, Filter(project="demo", name="run")),
    "list experiment state": lambda c, x: listing.find(c, Filter(experiment_id=x.known, state=State.LIVE)),
    "list user": lambda c, x: listing.find(c, Filter(uid=1000)),
    "list state": lambda c, x: listing.find(c, Filter(state=State.CORRUPT)),
    "list level": lambda c, x: listing.find(c, Filter(level=Level.VERIFIED)),
    "list tag": lambda c, x: listing.find(c, Filter(tag="t")),
    "list step": lambda c, x: listing.find(c, Filter(sort="step")),
    "list step next": lambda c, x: listing.find(c, Filter(sort="step", after="s:5:5")),
    "list metric": lambda c, x: listing.find(c, Filter(sort="metric", metric="loss")),
    "list metric next": lambda c, x: listing.find(c, Filter(sort="metric", metric="loss", after="m:0.5:5")),
    "resolve latest": lambda c, x: listing.resolve(c, "demo/run", Scope()),
    "resolve step": lambda c, x: listing.resolve(c, "demo/run@5", Scope()),
    "resolve best": lambda c, x: listing.resolve(c, "demo/run@best:loss", Scope()),
    "resolve prefix": lambda c, x: listing.resolve(c, "abcdef", Scope()),
    "resolve path": lambda c, x: listing.resolve(c, "/data/x", Scope()),
    "by path": lambda c, x: listing.by_path(c, "/data/x"),
    "of experiment": lambda c, x: listing.of_experiment(c, x.known),
    "known": lambda c, x: listing.known(c, 1),
    "trashed": lambda c, x: listing.trashed_before(c, StillClock().now()),
    "unfinished": lambda c, x: listing.unfinished(c),
    "experiments": lambda c, x: experiments.page(c, after=5),
    "experiment by name": lambda c, x: experiments.find(c, None, "demo", "run"),
    "silent": lambda c, x: experiments.silent_since(c, StillClock().now()),
    "summary": lambda c, x: experiments.summary(c, x.known),
    "holds": lambda c, x: holds.of_experiment(c, x.known, StillClock().now()),
    "history": lambda c, x: history.of_experiment(c, x.known),
    "hold": lambda c, x: holds.of_checkpoint(c, x.one, StillClock().now()),
    "best leaders": lambda c, x: contenders.leaders(
        c, Among(experiment_nos=[1], is_one_experiment=True), "loss", "min", 1
    ),
    "best leaders of project": lambda c, x: contenders.leaders(c, Among(project_no=1), "loss", "min", 1),
    "best among all": lambda c, x: contenders.everyone(c, Among(experiment_nos=[1]), retired=True),
    "best of one": lambda c, x: contenders.one(c, x.one),
    "best": lambda c, x: bests.current(c, x.known),
    "best held": lambda c, x: bests.held(c, x.known),
    "best firsts": lambda c, x: bests.firsts(c, [x.known]),
    "best of checkpoints": lambda c, x: bests.of_checkpoints(c, [x.one]),
    "best places": lambda c, x: bests.places(c, [1, 2]),
    "best boards holding": lambda c, x: bests.boards_holding(c, [x.one]),
    "best descent": lambda c, x: bests.descent(c, 1),
    "series": lambda c, x: metrics.series(c, x.known, "loss"),
    "tail": lambda c, x: metrics.tail(c, x.known, 5),
    "summaries": lambda c, x: metrics.summaries(c, x.known),
    "audit": lambda c, x: audits.page(c, after=5),
    "audit of": lambda c, x: audits.page(c, subject="x"),
    "events": lambda c, x: eventlog.page(c, since=5),
    "events of": lambda c, x: eventlog.page(c, checkpoint_id=x.one),
    "events named": lambda c, x: eventlog.named(c, ["root.added"], 5, 10),
    "event reach": lambda c, x: eventlog.reach(c),
    "hook runs": lambda c, x: hookruns.runs(c, after=50),
    "findings": lambda c, x: hookruns.findings(c, x.one),
    "due jobs": lambda c, x: queue.due(c, StillClock().now(), 1, can_wait=False),
    "due jobs that can wait": lambda c, x: queue.due(c, StillClock().now(), 1, can_wait=True),
    "next job": lambda c, x: queue.next_time(c),
    "next job that can't wait": lambda c, x: queue.next_time(c, of_all=False),
    "jobs": lambda c, x: queue.unfinished(c, 10),
    "job counts": lambda c, x: queue.counts(c),
    "job of checkpoint": lambda c, x: queue.of_checkpoint(c, x.one),
    "lane": lambda c, x: queue.in_lane(c, "x"),
    "root": lambda c, x: roots.by_path(c, "/data"),
}


# Whole lists, newest first or by a sort key: their first page is the beginning of the index itself.
PAGES = {
    "list",
    "list level",
    "list step",
    "list step next",
    "list tag",
    "experiments",
    "audit",
    "events",
    "resolve latest",
}


class Rows:
    known: str
    one: str


@pytest.fixture
async def rows(catalog: Catalog) -> Rows:
    found = Rows()
    found.known = await experiment(catalog)
    found.one = (await saved(catalog, found.known, 5, metrics={"loss": 1.0})).id
    return found


async def statements_of(catalog: Catalog, name: str, rows: Rows) -> list[tuple[str, Any]]:
    """Run one shipped query; return what it asked the database."""
    statements: list[tuple[str, Any]] = []

    def note(conn: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            statements.append((statement, parameters))

    async def run(conn: Any) -> None:
        event.listen(conn.sync_connection, "before_cursor_execute", note)
        try:
            await SHIPPED[name](conn, rows)
        finally:
            event.remove(conn.sync_connection, "before_cursor_execute", note)

    try:
        await catalog.read(run)
    except CkptdError:
        assert name.startswith("resolve")
    assert statements
    return statements


def reads_a_whole_table(raw: sqlite3.Connection, statement: str, parameters: Any, *, a_page: bool) -> list[str]:
    """The query plan if it reads a table that grows from end to end; empty when it does not.

    a_page  walking an index in the order asked for is fine: the page ends it
    """
    plan = [row[3] for row in raw.execute("EXPLAIN QUERY PLAN " + statement, parameters)]
    scans = any(re.match(r"SCAN (?!root\b)", step) for step in plan)
    in_order = a_page and "LIMIT" in statement and not any("TEMP B-TREE" in step for step in plan)
    return plan if scans and not in_order else []


async def test_every_shipped_query_uses_an_index(catalog: Catalog, rows: Rows, tmp_path: Path) -> None:
    """M035."""
    # Without its cache of statements: a cached EXPLAIN answers for the schema it was prepared for.
    raw = sqlite3.connect(tmp_path / "catalog.sqlite", cached_statements=0)
    found = {
        name: plan
        for name in SHIPPED
        for statement, parameters in await statements_of(catalog, name, rows)
        if (plan := reads_a_whole_table(raw, statement, parameters, a_page=name in PAGES))
    }
    assert found == {}
    for (index,) in raw.execute("SELECT name FROM sqlite_master WHERE name LIKE 'ix%'").fetchall():
        raw.execute(f"DROP INDEX {index}")
    missed = {
        name
        for name in SHIPPED
        for statement, parameters in await statements_of(catalog, name, rows)
        if reads_a_whole_table(raw, statement, parameters, a_page=name in PAGES)
    }
    raw.close()
    assert missed >= {"by path", "next job", "audit of", "hold"}, "this test must notice missing indexes"


async def test_a_long_list_of_keys_is_looked_up_by_the_same_indexes_as_a_short_one(
    catalog: Catalog, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one parameter, of which SQLite does not know how long it is."""
    raw = sqlite3.connect(tmp_path / "catalog.sqlite", cached_statements=0)

    async def plans(name: str, parameters_max: int) -> list[list[str]]:
        monkeypatch.setattr(keys, "PARAMETERS_MAX", parameters_max)
        asked = await statements_of(catalog, name, rows)
        found = [[row[3] for row in raw.execute("EXPLAIN QUERY PLAN " + one, given)] for one, given in asked]
        a_list = re.compile(r"(CORRELATED )?LIST SUBQUERY|SCAN anon_\d+ VIRTUAL TABLE")
        return [[step for step in plan if not a_list.match(step)] for plan in found]

    for name in SHIPPED:
        assert await plans(name, 0) == await plans(name, 64), name
    raw.close()


@pytest.mark.parametrize("name", ["holds", "history"])
async def test_the_plan_after_a_save_passes_over_all_that_its_experiment_ever_dropped(
    catalog: Catalog, rows: Rows, tmp_path: Path, name: str
) -> None:
    """Else each of a million saves would read the million before it."""
    raw = sqlite3.connect(tmp_path / "catalog.sqlite", cached_statements=0)
    for statement, parameters in await statements_of(catalog, name, rows):
        plan = [row[3] for row in raw.execute("EXPLAIN QUERY PLAN " + statement, parameters)]
        assert all("state=?" in step for step in plan if step.startswith("SEARCH checkpoint ")), plan
    raw.close()


async def test_an_orphan_is_refused(catalog: Catalog) -> None:
    """M035: foreign keys are on."""
    for table, values in (
        (schema.pin, {"checkpoint_no": 999, "uid": 1, "note": "", "pinned_at": StillClock().now()}),
        (schema.experiment_tag, {"experiment_no": 999, "tag": "x"}),
    ):
        with pytest.raises(IntegrityError):
            await catalog.write(lambda tx, t=table, v=values: tx.conn.execute(insert(t).values(v)))


@pytest.mark.parametrize("dialect", [postgresql.dialect(), mysql.dialect()], ids=["postgresql", "mysql"])
def test_the_schema_can_be_said_to_the_other_databases(dialect: Any) -> None:
    """M036: every type and every index has a form there; MySQL takes index keys up to 3,072 bytes."""
    for table in schema.metadata.sorted_tables:
        assert str(CreateTable(table).compile(dialect=dialect))
        for index in table.indexes:
            assert str(CreateIndex(index).compile(dialect=dialect))
            assert sum(4 * (getattr(column.type, "length", None) or 2) for column in index.columns) <= 3072
            assert len(str(index.name)) <= 63


def dump(connection: Any) -> dict[str, str]:
    """The schema as SQLite holds it, without layout of the text and the order of a table's constraints."""
    rows = connection.exec_driver_sql(
        "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'alembic%'"
    )
    found = {}
    for name, sql in rows:
        text = re.sub(r"\s+", " ", sql).replace("( ", "(").replace(" )", ")").removesuffix(")")
        columns, *constraints = text.split(", CONSTRAINT ")
        found[name] = ", ".join([columns, *sorted(constraints)])
    return found


def test_migrated_and_fresh_catalogs_are_the_same() -> None:
    """M038: column by column, index by index, trigger by trigger."""
    fresh, migrated = create_engine("sqlite://"), create_engine("sqlite://")
    with fresh.begin() as one, migrated.begin() as other:
        versions.create(one)
        versions.migrate(other)
        assert dump(one) == dump(other)
        context = MigrationContext.configure(other, opts={"compare_type": True})
        assert [d for d in compare_metadata(context, schema.metadata) if "alembic_version" not in str(d)] == []
        assert context.get_current_revision() == versions.HEAD
    fresh.dispose()
    migrated.dispose()


def test_head_is_the_newest_step() -> None:
    assert ScriptDirectory.from_config(versions._config()).get_current_head() == versions.HEAD


def test_every_step_can_be_undone() -> None:
    """M039."""
    from alembic import command

    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        versions.migrate(connection)
        command.downgrade(versions._config(connection), "base")
        assert dump(connection).keys() <= {"sqlite_sequence"}
    engine.dispose()


async def altered(path: Path, statement: str) -> None:
    """Make a catalog, and let somebody else's hand change it."""
    async with opened(path):
        pass
    raw = sqlite3.connect(path)
    raw.execute(statement)
    raw.commit()
    raw.close()


async def test_a_newer_catalog_is_refused_with_advice_and_left_alone(tmp_path: Path) -> None:
    """M040, F19."""
    path = tmp_path / "c.sqlite"
    await altered(path, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(CatalogFault, match="9999") as caught:
        async with opened(path):
            pass
    assert "upgrade ckptd" in caught.value.hint
    assert sqlite3.connect(path).execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)


async def test_tables_of_somebody_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE customers (name)")
    raw.close()
    with pytest.raises(CatalogFault, match="customers"):
        async with opened(path):
            pass


async def test_a_catalog_that_lacks_a_table_of_its_schema_is_refused_with_advice(tmp_path: Path) -> None:
    """Else the daemon would die of the first statement about it, start again and die again."""
    path = tmp_path / "c.sqlite"
    await altered(path, "DROP TABLE hook_run")
    for way in (opened(path), open_reader(path, SETTINGS)):
        with pytest.raises(CatalogFault, match="lacks hook_run") as caught:
            async with way:
                pass
        assert "ckpt rebuild" in caught.value.hint


async def test_a_current_catalog_is_opened_without_alembic_and_without_a_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    async with opened(path) as catalog:
        await experiment(catalog)
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tests.support.catalog import opened\n"
        "async def main():\n"
        "    async with opened(Path(sys.argv[1])): pass\n"
        "asyncio.run(main())\n"
        "sys.exit(any(name.split('.')[0] == 'alembic' for name in sys.modules))\n"
    )
    done = await anyio.run_process([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == 0
    assert not os.path.exists(f"{path}.before-{versions.HEAD}")


async def test_an_unknown_id_is_an_error_in_every_reader(catalog: Catalog) -> None:
    """Row 24 of the list: empty is not an error, and an error is not empty."""
    for read in (checkpoints.get, checkpoints.files, checkpoints.identity, experiments.get, metrics.summaries):
        with pytest.raises(CkptdError):
            await catalog.read(lambda conn, fn=read: fn(conn, new_id()))
