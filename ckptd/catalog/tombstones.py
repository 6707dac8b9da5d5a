"""What is retired and not yet unlinked, in a form that is cheap to go through every few seconds."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.model import State

TOMBSTONES_MAX = 20_000  # of one look; the oldest first, and what is older goes first

_row = schema.checkpoint.c


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
    wanted = (
        select(
            _row.id,
            schema.project.c.name.label("project"),
            schema.experiment.c.name.label("experiment"),
            _row.trashed_at,
            _row.trash,
        )
        .join(schema.experiment, schema.experiment.c.no == _row.experiment_no)
        .join(schema.project, schema.project.c.no == _row.project_no)
        .where(_row.state == State.TRASHED, _row.trashed_at <= before)
        .order_by(_row.trashed_at)
        .limit(TOMBSTONES_MAX)
    )
    return [
        Tombstone(row.id, row.project, row.experiment, row.trashed_at, row.trash) for row in await conn.execute(wanted)
    ]
