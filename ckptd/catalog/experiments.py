"""Rows of experiments: one training execution each, a tree by `parent`, with its segments."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Row, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import recovery, schema, segments
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.errors import Ambiguous, BadRequest, NotFound
from ckptd.model import ExperimentStatus, Level, State


@dataclass(frozen=True, slots=True, kw_only=True)
class NewExperiment:
    """What a trainer (or a descriptor, or a manifest) says about its experiment."""

    id: str
    uid: int
    project: str
    name: str
    root: str  # absolute directory under which its checkpoints lie
    config: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    parent_id: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    resume: Literal["allow", "never", "must"] = "allow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One row, as every reader gets it."""

    id: str
    uid: int
    project: str
    name: str
    status: ExperimentStatus
    segment: int
    root: str
    created_at: datetime
    heartbeat_at: datetime
    closed_at: datetime | None = None
    last_step: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    parent_id: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer of `open_experiment`."""

    experiment: Experiment
    segment: int
    existed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Which:
    """Which experiments a page shows; every field narrows it."""

    uid: int | None = None
    project: str | None = None
    tag: str | None = None
    parents: Sequence[str] | None = None  # ids of which one is its parent


EVERY = Which()


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What `ckpt show` says about an experiment."""

    experiment: Experiment
    by_state: dict[str, int]
    size_bytes: int
    newest_step: int | None
    segments: int
    children: tuple[str, ...]


_experiment = schema.experiment.c
_SELECT = select(schema.experiment, schema.project.c.name.label("project")).join_from(schema.experiment, schema.project)
_ON_DISK = (State.LIVE, State.CORRUPT, State.TRASHED)


async def open_experiment(tx: Tx, new: NewExperiment, *, join: bool = False) -> Opened:
    """Return the uid's experiment of that project and name, made if need be, with a new segment.

    join  another process of the same run is connected: its segment is shared, none is opened

    BadRequest  it exists and resume is "never", or the proposed id is another experiment's
    NotFound    it does not exist and resume is "must"
    """
    known = await find(tx.conn, new.uid, new.project, new.name)
    if known is None:
        if new.resume == "must":
            raise NotFound(f"there is no experiment {new.project}/{new.name} to resume")
        made = await _make(tx, new)
        _tell_opened(tx, made)
        return Opened(made, made.segment, existed=False)
    if new.resume == "never":
        raise BadRequest(
            f"the experiment {new.project}/{new.name} exists already",
            hint='choose another name, or resume="allow"',
            experiment=known.id,
        )
    segment = known.segment if join else known.segment + 1
    await _reopen(tx, known, new, segment)
    opened = await get(tx.conn, known.id)
    if not join:
        await segments.add(tx, opened.sequence, segment, new.config, new.facts)
        _tell_opened(tx, opened)
    return Opened(opened, segment, existed=True)


async def ensure(tx: Tx, new: NewExperiment) -> Experiment:
    """Return the experiment of that uid, project and name, made if need be; opens no segment.

    A new one has no process, so it counts as completed until one opens it.
    """
    known = await find(tx.conn, new.uid, new.project, new.name)
    if known is not None:
        return known
    made = await _make(tx, new)
    await tx.conn.execute(
        update(schema.experiment)
        .where(_experiment.id == made.id)
        .values(status=ExperimentStatus.COMPLETED, closed_at=tx.clock.now())
    )
    return await get(tx.conn, made.id)


async def get(conn: AsyncConnection, experiment_id: str) -> Experiment:
    """Return one experiment. NotFound when there is none with that id."""
    row = (await conn.execute(_SELECT.where(_experiment.id == experiment_id))).one_or_none()
    if row is None:
        raise NotFound(f"there is no experiment {experiment_id}")
    return _from_row(row)


async def find(conn: AsyncConnection, uid: int | None, project: str, name: str) -> Experiment | None:
    """Return the experiment of that name; uid None looks at all users' (Ambiguous when several fit)."""
    wanted = _SELECT.where(schema.project.c.name == project, _experiment.name == name)
    if uid is not None:
        wanted = wanted.where(schema.project.c.uid == uid)
    rows = (await conn.execute(wanted.limit(2))).all()
    if len(rows) > 1:
        raise Ambiguous(f"several users have an experiment {project}/{name}", hint="name it by its id")
    return _from_row(rows[0]) if rows else None


async def heartbeat(tx: Tx, experiment_id: str, step: int | None = None) -> None:
    """Note a sign of life; a lost experiment runs again. NotFound."""
    known = await get(tx.conn, experiment_id)
    back = {"status": ExperimentStatus.RUNNING, "closed_at": None} if known.status is ExperimentStatus.LOST else {}
    await tx.conn.execute(
        update(schema.experiment)
        .where(_experiment.id == experiment_id)
        .values(heartbeat_at=tx.clock.now(), last_step=known.last_step if step is None else step, **back)
    )


async def saved_at(tx: Tx, experiment_id: str, step: int) -> None:
    """Note the step of a save: training has come that far, whether or not its process says so itself."""
    behind = or_(_experiment.last_step.is_(None), _experiment.last_step < step)
    await tx.conn.execute(
        update(schema.experiment).where(_experiment.id == experiment_id, behind).values(last_step=step)
    )


async def set_status(tx: Tx, experiment_id: str, status: ExperimentStatus, error: dict[str, Any] | None = None) -> None:
    """Note what its process is doing now; a repeat changes nothing and says nothing. NotFound."""
    known = await get(tx.conn, experiment_id)
    if known.status is status:
        return
    await tx.conn.execute(
        update(schema.experiment)
        .where(_experiment.id == experiment_id)
        .values(
            status=status,
            error=error,
            closed_at=None if status is ExperimentStatus.RUNNING else tx.clock.now(),
        )
    )
    data: dict[str, Any] = {"project": known.project, "name": known.name, "step": known.last_step}
    if status in {ExperimentStatus.FAILED, ExperimentStatus.LOST}:
        data["recovery"] = await recovery.of_experiment(tx.conn, ended(known))
    if status is ExperimentStatus.COMPLETED:
        tx.tell("experiment.closed", data, experiment=known.id)
    elif status is ExperimentStatus.FAILED:
        tx.tell("experiment.failed", {**data, "error": error}, experiment=known.id)
    elif status is ExperimentStatus.LOST:
        tx.tell("experiment.lost", {**data, "pid": known.facts.get("pid")}, experiment=known.id)


def ended(row: Experiment) -> recovery.Ended:
    """Return what recovery needs to know of it."""
    return recovery.Ended(row.id, row.project, row.name, row.root, row.last_step, row.facts)


async def change_tags(tx: Tx, experiment_id: str, add: Iterable[str], remove: Iterable[str]) -> tuple[str, ...]:
    """Add and remove tags; return the sorted rest. NotFound."""
    known = await get(tx.conn, experiment_id)
    tags = tuple(sorted((set(known.tags) | set(add)) - set(remove)))
    await _set_tags(tx, known.sequence, tags)
    return tags


async def page(
    conn: AsyncConnection, which: Which = EVERY, *, limit: int = 50, after: int | None = None
) -> tuple[list[Experiment], int | None]:
    """Newest first: experiments with `sequence` below `after`, and the cursor of the next page."""
    wanted = _SELECT.order_by(_experiment.no.desc()).limit(limit + 1)
    if which.uid is not None:
        wanted = wanted.where(_experiment.uid == which.uid)
    if which.project is not None:
        wanted = wanted.where(schema.project.c.name == which.project)
    if which.tag is not None:
        tagged = schema.experiment_tag.c
        wanted = wanted.where(_experiment.no.in_(select(tagged.experiment_no).where(tagged.tag == which.tag)))
    if which.parents is not None:
        wanted = wanted.where(one_of(_experiment.parent_id, which.parents))
    if after is not None:
        wanted = wanted.where(_experiment.no < after)
    found = [_from_row(row) for row in await conn.execute(wanted)]
    return found[:limit], found[limit - 1].sequence if len(found) > limit else None


async def active(conn: AsyncConnection, *, uid: int | None, limit: int) -> list[Experiment]:
    """Return those that run, then the others, each newest sign of life first."""
    found: list[Experiment] = []
    for running in (True, False):
        if len(found) < limit:
            same = _experiment.status == ExperimentStatus.RUNNING
            wanted = _SELECT.where(same if running else ~same).order_by(_experiment.heartbeat_at.desc())
            if uid is not None:
                wanted = wanted.where(_experiment.uid == uid)
            found += [_from_row(row) for row in await conn.execute(wanted.limit(limit - len(found)))]
    return found


async def silent_since(conn: AsyncConnection, before: datetime) -> Sequence[Experiment]:
    """Return running experiments whose last sign of life is older than `before`."""
    wanted = _SELECT.where(_experiment.status == ExperimentStatus.RUNNING, _experiment.heartbeat_at < before)
    return [_from_row(row) for row in await conn.execute(wanted)]


async def summary(conn: AsyncConnection, experiment_id: str) -> Summary:
    """Return the figures of one experiment. NotFound."""
    known = await get(conn, experiment_id)
    checkpoint = schema.checkpoint.c
    by_state: dict[str, int] = {}
    size_bytes = 0
    counted = (
        select(checkpoint.state, func.count(), func.sum(checkpoint.size_bytes))
        .where(checkpoint.experiment_no == known.sequence)
        .group_by(checkpoint.state)
    )
    for state, count, total in await conn.execute(counted):
        by_state[state] = count
        size_bytes += int(total) if state in _ON_DISK else 0
    newest = select(func.max(checkpoint.step)).where(
        checkpoint.experiment_no == known.sequence,
        checkpoint.state == State.LIVE,
        checkpoint.level_rank >= Level.VERIFIED.rank,
    )
    segments = select(func.count()).where(schema.segment.c.experiment_no == known.sequence)
    children = select(_experiment.id).where(_experiment.parent_id == known.id).order_by(_experiment.no)
    return Summary(
        experiment=known,
        by_state=by_state,
        size_bytes=size_bytes,
        newest_step=(await conn.execute(newest)).scalar(),
        segments=int((await conn.execute(segments)).scalar_one()),
        children=tuple((await conn.execute(children)).scalars()),
    )


async def _make(tx: Tx, new: NewExperiment) -> Experiment:
    if (await tx.conn.execute(select(_experiment.no).where(_experiment.id == new.id))).first() is not None:
        raise BadRequest(f"the id {new.id} belongs to another experiment")
    project = schema.project.c
    wanted = select(project.no).where(project.uid == new.uid, project.name == new.project)
    project_no = (await tx.conn.execute(wanted)).scalar_one_or_none()
    if project_no is None:
        project_no = await tx.add(schema.project, uid=new.uid, name=new.project)
    now = tx.clock.now()
    await tx.conn.execute(
        insert(schema.experiment).values(
            id=new.id,
            uid=new.uid,
            project_no=project_no,
            name=new.name,
            status=ExperimentStatus.RUNNING,
            segment=1,
            root=new.root,
            config=new.config,
            tags=[],
            parent_id=new.parent_id,
            facts=new.facts,
            created_at=now,
            heartbeat_at=now,
        )
    )
    made = await get(tx.conn, new.id)
    await segments.add(tx, made.sequence, made.segment, new.config, new.facts)
    if new.tags:
        await _set_tags(tx, made.sequence, tuple(sorted(set(new.tags))))
        made = await get(tx.conn, new.id)
    return made


async def _reopen(tx: Tx, known: Experiment, new: NewExperiment, segment: int) -> None:
    """A further process of a known experiment: what it says now holds from now on; its id stays."""
    await tx.conn.execute(
        update(schema.experiment)
        .where(_experiment.no == known.sequence)
        .values(
            status=ExperimentStatus.RUNNING,
            segment=segment,
            root=new.root,
            config=new.config or known.config,
            parent_id=known.parent_id or new.parent_id,
            facts=new.facts or known.facts,
            error=None,
            heartbeat_at=tx.clock.now(),
            closed_at=None,
        )
    )
    tags = tuple(sorted({*known.tags, *new.tags}))
    if tags != known.tags:
        await _set_tags(tx, known.sequence, tags)


async def _set_tags(tx: Tx, experiment_no: int, tags: tuple[str, ...]) -> None:
    await tx.conn.execute(delete(schema.experiment_tag).where(schema.experiment_tag.c.experiment_no == experiment_no))
    if tags:
        rows = [{"experiment_no": experiment_no, "tag": tag} for tag in tags]
        await tx.conn.execute(insert(schema.experiment_tag), rows)
    await tx.conn.execute(update(schema.experiment).where(_experiment.no == experiment_no).values(tags=list(tags)))


def _tell_opened(tx: Tx, opened: Experiment) -> None:
    data: dict[str, Any] = {
        "project": opened.project,
        "name": opened.name,
        "segment": opened.segment,
        "pid": opened.facts.get("pid"),
    }
    if opened.segment == 1:
        tx.tell("experiment.opened", data, experiment=opened.id)
    else:
        tx.tell("experiment.resumed", {**data, "step": opened.last_step}, experiment=opened.id)


def _from_row(row: Row[Any]) -> Experiment:
    return Experiment(
        id=row.id,
        uid=row.uid,
        project=row.project,
        name=row.name,
        status=ExperimentStatus(row.status),
        segment=row.segment,
        root=row.root,
        created_at=row.created_at,
        heartbeat_at=row.heartbeat_at,
        closed_at=row.closed_at,
        last_step=row.last_step,
        config=row.config,
        tags=tuple(row.tags),
        parent_id=row.parent_id,
        facts=row.facts,
        error=row.error,
        sequence=row.no,
    )
