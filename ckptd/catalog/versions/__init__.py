"""Versions of the schema. Each step is an alembic revision under steps/; HEAD names the newest.

A fresh catalog is made from schema.py and stamped; an old one is migrated step by step, all steps in
one transaction, after a snapshot. Alembic is imported only then: a daemon's start does not pay for it.
"""

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, event, inspect, text
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import failpoint
from ckptd.catalog import faults, hooktables, sqlite, striptable
from ckptd.catalog.tx import Tx
from ckptd.errors import CatalogFault

HEAD = "0001"
TABLE = sqlite.VERSION_TABLE

HERE = Path(__file__).parent


async def revision_of(conn: AsyncConnection, where: str) -> str | None:
    """Return the revision of the open catalog; None when it has no tables yet.

    CatalogFault  there are tables, but not ours; or it says to be current, and lacks a table
    """
    names = set(await conn.run_sync(lambda sync: inspect(sync).get_table_names()))
    if TABLE in names:
        found = str((await conn.execute(text(f"SELECT version_num FROM {TABLE}"))).scalar_one_or_none())  # noqa: S608  TABLE is ours
        lacks = sorted(set(_tables().tables) - names) if found == HEAD else []
        if lacks:
            raise _incomplete(lacks, where)
        return found
    if names:
        raise sqlite.foreign_tables(names)
    return None


async def require_current(conn: AsyncConnection, where: str) -> None:
    """CatalogFault unless the open catalog has exactly this code's schema."""
    revision = await revision_of(conn, where)
    if revision != HEAD:
        raise _unknown(revision, where) if revision not in (None, *_known()) else _outdated(revision, where)


async def bring_up_to_date(conn: AsyncConnection, path: Path | None, where: str) -> str | None:
    """Make a fresh schema, or migrate an older one after a snapshot and return its version; nothing when it is current.

    CatalogFault  the catalog is newer than this code
    """
    revision = await revision_of(conn, where)
    await conn.rollback()
    if revision == HEAD:
        return None
    if revision is None:
        async with conn.begin():
            await conn.run_sync(create)
        return None
    if revision not in _known():
        raise _unknown(revision, where)
    if path is not None:
        await sqlite.snapshot(path, Path(f"{path}.before-{HEAD}"))
        failpoint.hit("catalog.snapshot")
    async with conn.begin():
        await conn.run_sync(migrate)
    failpoint.hit("catalog.migrated")
    return revision


def create(connection: Connection) -> None:
    """Make every table in the connection's transaction and stamp HEAD."""
    _tables().create_all(connection, checkfirst=False)
    connection.execute(text(f"CREATE TABLE {TABLE} (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
    connection.execute(text(f"INSERT INTO {TABLE} VALUES (:head)"), {"head": HEAD})  # noqa: S608  TABLE is ours


async def stamp_again(tx: Tx) -> None:
    """Write the revision's row once more: the smallest change that shows whether the catalog can be written."""
    await tx.conn.execute(text(f"UPDATE {TABLE} SET version_num = version_num"))  # noqa: S608  TABLE is ours


def migrate(connection: Connection, target: str = "head") -> None:
    """Run the missing steps in the connection's transaction: killed at any statement, nothing has happened."""
    from alembic import command  # noqa: PLC0415  only a migration pays for the import

    def hit(*args: Any) -> None:
        del args
        failpoint.hit("catalog.migrate")

    engine: Engine = connection.engine
    event.listen(engine, "before_cursor_execute", hit)
    try:
        command.upgrade(_config(connection), target)
    finally:
        event.remove(engine, "before_cursor_execute", hit)


def _config(connection: Connection | None = None) -> Any:
    from alembic.config import Config  # noqa: PLC0415  only a migration pays for the import

    found = Config()
    found.set_main_option("script_location", str(HERE))
    found.set_main_option("version_locations", str(HERE / "steps"))
    found.set_main_option("path_separator", "newline")
    found.attributes["connection"] = connection
    return found


def _known() -> set[str]:
    from alembic.script import ScriptDirectory  # noqa: PLC0415  only another version pays for the import

    return {step.revision for step in ScriptDirectory.from_config(_config()).walk_revisions()}


def _tables() -> MetaData:
    # There is one MetaData; to name a table of each module makes sure that all have put theirs into it.
    (tables,) = {hooktables.hook.metadata, striptable.strip.metadata}
    return tables


def _incomplete(lacks: list[str], where: str) -> CatalogFault:
    return CatalogFault(
        f"the catalog {where} says that it has schema {HEAD}, and lacks {', '.join(lacks)}",
        hint=faults.rebuild_advice(where),
        lacks=lacks,
    )


def _unknown(revision: str | None, where: str) -> CatalogFault:
    return CatalogFault(
        f"the catalog {where} has schema {revision}; this ckptd knows up to {HEAD}",
        hint="it was written by a newer ckptd: upgrade ckptd, or start an empty catalog elsewhere and run `ckpt rebuild`",
        revision=str(revision),
        known=HEAD,
    )


def _outdated(revision: str | None, where: str) -> CatalogFault:
    return CatalogFault(
        f"the catalog {where} has schema {revision}, this ckptd needs {HEAD}",
        hint="start the daemon once: it migrates the catalog after a snapshot",
        revision=str(revision),
        known=HEAD,
    )
