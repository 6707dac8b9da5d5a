"""Whose an experiment or a checkpoint is, for many ids at once."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.keys import one_of

_PARTS_MAX = 500  # ids in one statement


async def owners_of(conn: AsyncConnection, ids: Sequence[str]) -> dict[str, int]:
    """Return the uid of each id that is an experiment's or a checkpoint's."""
    found: dict[str, int] = {}
    for start in range(0, len(ids), _PARTS_MAX):
        part = ids[start : start + _PARTS_MAX]
        for table in (schema.experiment, schema.checkpoint):
            for row in await conn.execute(select(table.c.id, table.c.uid).where(one_of(table.c.id, part))):
                found[row.id] = row.uid
    return found


def events_of(uid: int) -> ColumnElement[bool]:
    """Narrow the event log to what concerns one user's experiments and checkpoints."""
    logged = schema.event_log.c
    return or_(
        logged.experiment_id.in_(select(schema.experiment.c.id).where(schema.experiment.c.uid == uid)),
        logged.checkpoint_id.in_(select(schema.checkpoint.c.id).where(schema.checkpoint.c.uid == uid)),
    )
