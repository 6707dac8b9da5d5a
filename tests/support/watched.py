"""Watched trees, and what the catalog says of the files in them."""

from sqlalchemy import select

from ckptd.catalog import schema
from tests.support.in_process import eventually


async def rows_at(node, path) -> list[tuple[str, str]]:
    row = schema.checkpoint.c
    wanted = select(row.id, row.state).where(row.path_key == schema.path_key(str(path))).order_by(row.sequence)
    return [(found.id, found.state) for found in await node.read(lambda conn: conn.execute(wanted))]


async def live_at(node, path) -> str:
    """Wait until exactly one live row is at a path; return its id."""

    async def one() -> str:
        found = [id_ for id_, state in await rows_at(node, path) if state == "live"]
        assert len(found) <= 1, "two live rows for one file"
        return found[0] if found else ""

    return await eventually(one)


def a_watched(short_dir, **more):
    tree = short_dir / "w"
    (tree / "run7").mkdir(parents=True)
    return tree, {"roots": [{"path": str(tree), "kind": "watched", **more}]}
