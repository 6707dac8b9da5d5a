"""What the catalog itself knows of speed and volume, whatever daemon ran: bytes by experiment, times of one's saves."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema, striptable
from ckptd.catalog.strips import StripState
from ckptd.model import JobState
from ckptd.query.distribution import Distribution

RECENT_MAX = 100_000  # checkpoints looked at for volumes, the newest: a look costs the same however long the history is
SAVES_MAX = 1000  # the same for the times of one experiment
SHOWN_MAX = 20

_row = schema.checkpoint.c
_experiment = schema.experiment.c
_strip = striptable.strip.c


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose checkpoints, and which; None: all."""

    uid: int | None = None
    project: str | None = None
    experiment_id: str | None = None


async def volumes(conn: AsyncConnection, scope: Scope, since: datetime | None = None) -> list[dict[str, Any]]:
    """Return checkpoints and bytes made durable since then by experiment, the largest first.

    Retired ones count too, and what was taken out of one since: it was written all the same.
    """
    written = func.sum(_row.size_bytes + func.coalesce(_strip.size_bytes, 0))
    newest = (await conn.execute(select(func.max(_row.sequence)))).scalar_one() or 0
    wanted = (
        select(_experiment.id, schema.project.c.name.label("project"), _experiment.name, func.count().label("saves"))
        .add_columns(written.label("bytes"))
        .join(schema.experiment, _experiment.no == _row.experiment_no)
        .join(schema.project, schema.project.c.no == _experiment.project_no)
        .outerjoin(striptable.strip, and_(_strip.checkpoint_no == _row.sequence, _strip.state != StripState.STRIPPING))
        .where(_row.sequence > newest - RECENT_MAX, _row.durable_at.is_not(None))
        .group_by(_experiment.id, schema.project.c.name, _experiment.name)
        .order_by(written.desc())
        .limit(SHOWN_MAX)
    )
    if scope.uid is not None:
        wanted = wanted.where(_row.uid == scope.uid)
    if scope.project is not None:
        wanted = wanted.where(schema.project.c.name == scope.project)
    if since is not None:
        wanted = wanted.where(_row.durable_at >= since)
    if scope.experiment_id is not None:
        wanted = wanted.where(_experiment.id == scope.experiment_id)
    return [
        {
            "experiment": row.id,
            "project": row.project,
            "name": row.name,
            "checkpoints": row.saves,
            "written_bytes": int(row.bytes),
        }
        for row in await conn.execute(wanted)
    ]


async def climbs(
    conn: AsyncConnection, experiment_id: str, since: datetime | None = None
) -> tuple[Distribution, Distribution]:
    """Return how long the experiment's newest SAVES_MAX saves took to become durable, and verified."""
    no = select(_experiment.no).where(_experiment.id == experiment_id).scalar_subquery()
    wanted = (
        select(_row.staged_at, _row.durable_at, _row.verified_at)
        .where(_row.experiment_no == no, _row.staged_at.is_not(None), _row.durable_at.is_not(None))
        .order_by(_row.sequence.desc())
        .limit(SAVES_MAX)
    )
    if since is not None:
        wanted = wanted.where(_row.durable_at >= since)
    durable, verified = Distribution(), Distribution()
    for row in await conn.execute(wanted):
        durable.add((row.durable_at - row.staged_at).total_seconds())
        if row.verified_at is not None:
            verified.add((row.verified_at - row.staged_at).total_seconds())
    return durable, verified


async def oldest_queued(conn: AsyncConnection) -> datetime | None:
    """Return since when the longest waiting job waits."""
    wanted = select(func.min(schema.job.c.queued_at)).where(schema.job.c.state == JobState.QUEUED)
    found: datetime | None = (await conn.execute(wanted)).scalar_one()
    return found
