"""Rows of jobs. What the states mean and when they change is decided in ckptd.jobs."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, exists, false, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.model import JobState, State

LANE_MAX = 64  # a longer lane (a path) is stored as its digest

UNFINISHED = (JobState.QUEUED, JobState.RUNNING, JobState.PARKED)

ASIDE = ("amend", "rest")  # stages beside a checkpoint's way: a job of these is not the checkpoint's own

_job = schema.job.c
_other = schema.job.alias("other")

# Two exact index seeks; one condition with an OR would read the whole lane for each candidate.
_FREE = and_(
    ~exists().where(_other.c.lane == _job.lane, _other.c.state == JobState.RUNNING),
    ~exists().where(_other.c.lane == _job.lane, _other.c.state == JobState.QUEUED, _other.c.no < _job.no),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """Work to enqueue. `can_wait`: its bytes are on the disk already, and no training's memory waits for it."""

    checkpoint_id: str
    lane: str
    stage: str
    can_wait: bool = False
    payload: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row. `claim` is the fence: a claim that was taken over can't finish or renew any more."""

    id: int
    checkpoint_id: str
    lane: str
    stage: str
    can_wait: bool
    state: JobState
    attempts: int
    claim: int
    not_before: datetime
    lease_until: datetime | None
    payload: dict[str, Any]
    error: dict[str, Any] | None
    fresh: Any = None  # what a stage hands to the next one in memory only


@dataclass(frozen=True, slots=True)
class Failing:
    """A job that gave up, or whose tries fail one after another, and the user whose checkpoint it is about."""

    job: Job
    uid: int | None


def lane_key(lane: str) -> str:
    """Return how a lane is stored: as it is, or by digest when it is long or not plain text."""
    if len(lane) <= LANE_MAX and lane.isascii():
        return lane
    return hashlib.sha256(lane.encode(errors="surrogateescape")).hexdigest()


async def add(tx: Tx, new: NewJob) -> Job:
    """Add a queued job that is due now."""
    now = tx.clock.now()
    number = await tx.add(
        schema.job,
        checkpoint_id=new.checkpoint_id,
        lane=lane_key(new.lane),
        stage=new.stage,
        can_wait=new.can_wait,
        state=JobState.QUEUED,
        attempts=0,
        claim=0,
        not_before=now,
        payload=new.payload,
        queued_at=now,
    )
    return await get(tx.conn, number)


async def add_many(tx: Tx, new: Sequence[NewJob]) -> None:
    """Add queued jobs that are due now, of checkpoints that have none yet."""
    now = tx.clock.now()
    rows = [
        {
            "checkpoint_id": one.checkpoint_id,
            "lane": lane_key(one.lane),
            "stage": one.stage,
            "can_wait": one.can_wait,
            "state": JobState.QUEUED,
            "attempts": 0,
            "claim": 0,
            "not_before": now,
            "payload": one.payload,
            "queued_at": now,
        }
        for one in new
    ]
    if rows:
        await tx.conn.execute(insert(schema.job), rows)


async def get(conn: AsyncConnection, job_id: int) -> Job:
    """Return one job that must exist."""
    return _from_row((await conn.execute(select(schema.job).where(_job.no == job_id))).one())


async def of_checkpoint(conn: AsyncConnection, checkpoint_id: str) -> Job | None:
    """Return the unfinished job that takes a checkpoint on its way; not one beside it."""
    own = _job.stage.not_in(ASIDE)
    wanted = select(schema.job).where(_job.checkpoint_id == checkpoint_id, _job.state.in_(UNFINISHED), own)
    row = (await conn.execute(wanted.order_by(_job.no).limit(1))).one_or_none()
    return None if row is None else _from_row(row)


async def in_lane(conn: AsyncConnection, lane: str) -> list[Job]:
    """Return the unfinished jobs of a lane, oldest first."""
    wanted = select(schema.job).where(_job.lane == lane_key(lane), _job.state.in_(UNFINISHED)).order_by(_job.no)
    return [_from_row(row) for row in await conn.execute(wanted)]


async def due(conn: AsyncConnection, now: datetime, limit: int, *, can_wait: bool) -> list[Job]:
    """Return queued jobs of one kind that are due and whose lane is free, longest due first."""
    wanted = (
        select(schema.job)
        .where(_job.state == JobState.QUEUED, _job.can_wait == can_wait, _job.not_before <= now, _FREE)
        .order_by(_job.not_before, _job.no)
        .limit(limit)
    )
    return [_from_row(row) for row in await conn.execute(wanted)]


async def next_time(conn: AsyncConnection, *, of_all: bool = True) -> datetime | None:
    """Return when the next queued job of a free lane is due, of all or of those that can't wait."""
    kinds = [] if of_all else [_job.can_wait == false()]
    wanted = select(_job.not_before).where(_job.state == JobState.QUEUED, *kinds, _FREE)
    wanted = wanted.order_by(_job.not_before, _job.no).limit(1)
    found: datetime | None = (await conn.execute(wanted)).scalar_one_or_none()
    return found


async def running_of(conn: AsyncConnection, numbers: Collection[int]) -> list[Job]:
    """Return those of some jobs that are running, oldest first; what became of the others is no matter."""
    if not numbers:
        return []
    wanted = select(schema.job).where(one_of(_job.no, numbers), _job.state == JobState.RUNNING).order_by(_job.no)
    return [_from_row(row) for row in await conn.execute(wanted)]


async def running(conn: AsyncConnection) -> list[Job]:
    """Return every running job, oldest first."""
    wanted = select(schema.job).where(_job.state == JobState.RUNNING).order_by(_job.no)
    return [_from_row(row) for row in await conn.execute(wanted)]


async def parked_pending(conn: AsyncConnection, limit: int) -> list[Job]:
    """Return parked jobs whose checkpoint still waits to become durable, oldest first."""
    waiting = select(schema.checkpoint.c.id).where(schema.checkpoint.c.state == State.PENDING)
    wanted = select(schema.job).where(_job.state == JobState.PARKED, _job.checkpoint_id.in_(waiting))
    return [_from_row(row) for row in await conn.execute(wanted.order_by(_job.no).limit(limit))]


async def unfinished(conn: AsyncConnection, limit: int) -> Sequence[Job]:
    """Return queued, running and parked jobs, oldest first."""
    wanted = select(schema.job).where(_job.state.in_(UNFINISHED)).order_by(_job.no).limit(limit)
    return [_from_row(row) for row in await conn.execute(wanted)]


async def failing(conn: AsyncConnection, tries: int, *, uid: int | None, limit: int) -> Sequence[Failing]:
    """Return parked jobs, and unfinished ones that failed `tries` times and did nothing well since; oldest first.

    uid  of this user's checkpoints; None: of everybody's
    """
    of = schema.checkpoint.c
    ill = or_(_job.state == JobState.PARKED, _job.attempts >= tries)
    wanted = select(schema.job, of.uid).outerjoin(schema.checkpoint, of.id == _job.checkpoint_id)
    wanted = wanted.where(_job.state.in_(UNFINISHED), ill)
    if uid is not None:
        wanted = wanted.where(of.uid == uid)
    found = [Failing(_from_row(row), row.uid) for row in await conn.execute(wanted.order_by(_job.no).limit(limit))]
    return [one for one in found if one.job.error is not None or one.job.state is JobState.PARKED]


async def counts(conn: AsyncConnection) -> dict[JobState, int]:
    """How many jobs are in each unfinished state."""
    wanted = select(_job.state, func.count()).where(_job.state.in_(UNFINISHED)).group_by(_job.state)
    found = dict.fromkeys(UNFINISHED, 0)
    found.update({JobState(state): count for state, count in await conn.execute(wanted)})
    return found


async def change(tx: Tx, job: Job, values: dict[str, Any]) -> bool:
    """Write `values` if the job still is in the state and under the claim of `job`; say whether it was."""
    same: ColumnElement[bool] = and_(_job.no == job.id, _job.state == job.state, _job.claim == job.claim)
    return bool((await tx.conn.execute(update(schema.job).where(same).values(values))).rowcount)


async def lease(tx: Tx, numbers: Sequence[int], until: datetime) -> None:
    """Make jobs RUNNING under their next claim."""
    if numbers:
        taken = update(schema.job).where(one_of(_job.no, numbers))
        values = {"state": JobState.RUNNING, "claim": _job.claim + 1, "lease_until": until}
        await tx.conn.execute(taken.values(values))


async def clamp(tx: Tx, now: datetime, latest: datetime) -> None:
    """Make waits that end after `latest` end now: the wall clock was set back since they were written."""
    far = update(schema.job).where(_job.state == JobState.QUEUED, _job.not_before > latest)
    await tx.conn.execute(far.values(not_before=now))


async def trim(tx: Tx, before_id: int) -> None:
    """Forget finished jobs with a number below `before_id`."""
    await tx.conn.execute(delete(schema.job).where(_job.state == JobState.DONE, _job.no < before_id))


def _from_row(row: Row[Any]) -> Job:
    return Job(
        id=row.no,
        checkpoint_id=row.checkpoint_id,
        lane=row.lane,
        stage=row.stage,
        can_wait=row.can_wait,
        state=JobState(row.state),
        attempts=row.attempts,
        claim=row.claim,
        not_before=row.not_before,
        lease_until=row.lease_until,
        payload=row.payload,
        error=row.error,
    )
