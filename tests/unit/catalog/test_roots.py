"""Roots by where a path lies: as many look-ups as the path has directories, however many roots there are."""

from typing import Any

from sqlalchemy import event

from ckptd.catalog import Catalog, roots
from ckptd.catalog.roots import NewRoot
from ckptd.model import RootKind


async def test_the_nearest_root_above_a_path_is_found_and_the_path_itself_is_none(catalog: Catalog):
    async def add(tx: Any) -> None:
        for path in ("/data", "/data/runs", "/data/runs/a", "/data/run"):
            await roots.ensure(tx, NewRoot(path=path, kind=RootKind.MANAGED, uid=1))

    await catalog.write(add)
    for path, nearest in (
        ("/data/runs/a/b/model.pt", "/data/runs/a"),
        ("/data/runs/a", "/data/runs"),
        ("/data/runsx/model.pt", "/data"),
        ("/other/model.pt", None),
    ):
        found = await catalog.read(lambda conn, path=path: roots.above(conn, path))
        assert (None if found is None else found.path) == nearest


async def test_a_look_up_reads_no_row_of_another_root(catalog: Catalog):
    """Each submitted file may have a directory of its own, and each is a root."""
    seen: list[str] = []

    def note(conn: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        seen.append(statement)

    async def look(conn: Any) -> list[str]:
        event.listen(conn.sync_connection, "before_cursor_execute", note)
        try:
            await roots.above(conn, "/data/runs/a/b/model.pt")
        finally:
            event.remove(conn.sync_connection, "before_cursor_execute", note)
        plan = await conn.exec_driver_sql("EXPLAIN QUERY PLAN " + seen[-1], ("x",) * seen[-1].count("?"))
        return [str(row[3]) for row in plan]

    assert all("path_key=?" in step for step in await catalog.read(look))
