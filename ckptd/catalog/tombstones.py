"""What is retired and not yet unlinked, in a form that is cheap to go through every few seconds."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.model import State

TOMBSTONES_MAX = 20_000  # of one look; the oldest first, and what is older goes first

_row = schema.checkpoint.c
_SELECT: Select[Any] = (
    select(
        _row.id,
        schema.project.c.name.label("project"),
        schema.experiment.c.name.label("experiment"),
        _row.trashed_at,
        _row.trash,
    )
    .select_from(schema.checkpoint)
    .join(schema.experiment, schema.experiment.c.no == _row.experiment_no)
    .join(schema.project, schema.project.c.no == _row.project_no)
)


@dataclass(frozen=True, slots=True)
class Tombstone:
    """One retired checkpoint: whose rules say how long it stays, and its name in the trash."""

    id: str
    project: str
    experiment: str
    trashed_at: datetime
    trash: str


async def tombstones_before(conn: AsyncConnection, before: datetime) -> list[Tombstone]:
    """Return what was retired before a time and is not unlinked, oldest first."""
    wanted = _SELECT.where(_row.state == State.TRASHED, _row.trashed_at <= before)
    rows = await conn.execute(wanted.order_by(_row.trashed_at).limit(TOMBSTONES_MAX))
    return [_from_row(row) for row in rows]


async def retired_after(conn: AsyncConnection, sequence: int, at_most: int) -> list[tuple[int, str]]:
    """Return sequence and id of what is retired and not unlinked, of any age: the first `at_most` beyond a sequence."""
    wanted = select(_row.sequence, _row.id).where(_row.state == State.TRASHED, _row.sequence > sequence)
    rows = await conn.execute(wanted.order_by(_row.sequence).limit(at_most))
    return [(row.sequence, row.id) for row in rows]


async def under_root(conn: AsyncConnection, root_id: int) -> list[tuple[Tombstone, int]]:
    """Return what was retired under a root and is not unlinked, oldest first, each with its bytes."""
    wanted = _SELECT.add_columns(_row.size_bytes).where(_row.state == State.TRASHED, _row.root_no == root_id)
    rows = await conn.execute(wanted.order_by(_row.trashed_at).limit(TOMBSTONES_MAX))
    return [(_from_row(row), row.size_bytes) for row in rows]


def _from_row(row: Row[Any]) -> Tombstone:
    return Tombstone(row.id, row.project, row.experiment, row.trashed_at, row.trash)


async def give_up_inodes(tx: Tx, checkpoint_ids: list[str]) -> list[str]:
    """Note that what lies in the trash under these ids is unlinked from now on; return those still TRASHED.

    From here on no inode is meant by the row: its number may be another file's in a moment. And whoever
    finds a row like this after a crash knows that its files were in the trash, not that they got lost.
    """
    trashed = select(_row.id).where(one_of(_row.id, checkpoint_ids), _row.state == State.TRASHED)
    found = list((await tx.conn.execute(trashed)).scalars())
    nowhere = {"dev": None, "ino": None, "inode_size_bytes": None, "mtime_ns": None, "ctime_ns": None}
    await tx.conn.execute(update(schema.checkpoint).where(one_of(_row.id, found)).values(nowhere))
    return found
