"""What is retired and not yet unlinked, in forms that are cheap to go through every few seconds, however many there are."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import exists, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import holds, schema, striptable
from ckptd.catalog.keys import one_of
from ckptd.catalog.queue import UNFINISHED
from ckptd.catalog.strips import StripState
from ckptd.catalog.tx import Tx
from ckptd.model import State

TOMBSTONES_MAX = 20_000  # of one root, the oldest first
PAGE = 100  # of one experiment: as many as are unlinked in a round (pipeline/trash.py)

_row = schema.checkpoint.c
_strip = striptable.strip.c
_job = schema.job.c
_HOLDS = frozenset({"pin", "lease"})  # a branch holds nothing that was retired before it began
_TOMBSTONE = (_row.sequence, _row.id, _row.trash, _row.trashed_at)


@dataclass(frozen=True, slots=True)
class Tombstone:
    """One retired checkpoint, and its name in the trash."""

    sequence: int
    id: str
    trash: str
    trashed_at: datetime


@dataclass(frozen=True, slots=True)
class Graveyard:
    """An experiment of which something is retired, and since when the oldest of that."""

    experiment_no: int
    project: str
    experiment: str
    since: datetime


async def graveyards(conn: AsyncConnection) -> list[Graveyard]:
    """Return every experiment of which something is retired and not unlinked, the oldest first."""
    since = func.min(_row.trashed_at).label("since")
    wanted = (
        select(_row.experiment_no, since).where(_row.state == State.TRASHED).group_by(_row.experiment_no).subquery()
    )
    rows = await conn.execute(
        select(wanted.c.experiment_no, schema.project.c.name, schema.experiment.c.name, wanted.c.since)
        .join(schema.experiment, schema.experiment.c.no == wanted.c.experiment_no)
        .join(schema.project, schema.project.c.no == schema.experiment.c.project_no)
        .order_by(wanted.c.since)
    )
    return [Graveyard(*row) for row in rows]


async def retired_before(conn: AsyncConnection, of: Graveyard, before: datetime, after: int) -> list[Tombstone]:
    """Return what of one experiment was retired before a time and is not unlinked: the first PAGE beyond a sequence."""
    wanted = select(*_TOMBSTONE).where(
        _row.experiment_no == of.experiment_no,
        _row.state == State.TRASHED,
        _row.trashed_at <= before,
        _row.sequence > after,
    )
    return [Tombstone(*row) for row in await conn.execute(wanted.order_by(_row.sequence).limit(PAGE))]


async def retired_after(conn: AsyncConnection, sequence: int, at_most: int) -> list[tuple[int, str]]:
    """Return sequence and id of what is retired and not unlinked, of any age: the first `at_most` beyond a sequence."""
    wanted = select(_row.sequence, _row.id).where(_row.state == State.TRASHED, _row.sequence > sequence)
    rows = await conn.execute(wanted.order_by(_row.sequence).limit(at_most))
    return [(row.sequence, row.id) for row in rows]


async def under_root(conn: AsyncConnection, root_id: int) -> list[tuple[Tombstone, int]]:
    """Return what was retired under a root and is not unlinked, oldest first, each with its bytes."""
    wanted = select(*_TOMBSTONE, _row.size_bytes).where(_row.state == State.TRASHED, _row.root_no == root_id)
    rows = await conn.execute(wanted.order_by(_row.trashed_at).limit(TOMBSTONES_MAX))
    return [(Tombstone(*row[:4]), row.size_bytes) for row in rows]


async def answered_for(conn: AsyncConnection, checkpoint_ids: Collection[str]) -> set[str]:
    """Return those whose files the trash is known to hold: retired ones, stripped ones, and those that a job is about."""
    stripped = exists().where(_strip.checkpoint_no == _row.sequence, _strip.state != StripState.GONE)
    busy = exists().where(_job.checkpoint_id == _row.id, _job.state.in_(UNFINISHED))
    known = or_(_row.state == State.TRASHED, stripped, busy)
    return set((await conn.execute(select(_row.id).where(one_of(_row.id, checkpoint_ids), known))).scalars())


async def give_up_inodes(tx: Tx, checkpoint_ids: list[str]) -> list[str]:
    """Note that what lies in the trash under these ids is unlinked from now on; return those of which it is so.

    That is those still TRASHED that no pin and no lease holds; what has begun before is gone on with whatever holds
    it, for it is whole no more. From here on no inode is meant by the row: its number may be another file's in a
    moment. And whoever finds a row like this after a crash knows that its files were in the trash, not that they
    got lost.
    """
    trashed = select(_row.id, _row.ino).where(one_of(_row.id, checkpoint_ids), _row.state == State.TRASHED)
    rows = (await tx.conn.execute(trashed)).all()
    held = await holds.of_checkpoints(tx.conn, [row.id for row in rows], tx.clock.now())
    stays = {hold.checkpoint_id for hold in held if hold.kind in _HOLDS}
    found = [row.id for row in rows if row.ino is None or row.id not in stays]
    nowhere = {"dev": None, "ino": None, "inode_size_bytes": None, "mtime_ns": None, "ctime_ns": None}
    await tx.conn.execute(update(schema.checkpoint).where(one_of(_row.id, found)).values(nowhere))
    return found
