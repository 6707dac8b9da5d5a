"""Finding checkpoints: pages for lists, what a root is known to hold, what waits.

Pages go by key (the last row's sort values), never by offset, so page 1,000 costs what page 1 does.
Names are turned into row numbers first: then one index has the filter and the order both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.checkpoint_rows import SELECT, from_row, identity_of, newest_good, newest_good_ids
from ckptd.catalog.keys import one_of
from ckptd.catalog.selectors import Scope, resolve
from ckptd.errors import BadRequest
from ckptd.model import Checkpoint, Identity, Level, Origin, State

__all__ = [
    "Filter",
    "Known",
    "Page",
    "Scope",
    "by_path",
    "find",
    "known",
    "latest",
    "latest_of",
    "of_experiment",
    "resolve",
    "trashed_before",
    "unfinished",
]

LIMIT_MAX = 500
COMMON = 5000  # so many rows of a tag, a state, a project are no longer collected and sorted for one page

_row = schema.checkpoint.c
_metric = schema.checkpoint_metric.c
_HERE = (State.PENDING, State.LIVE, State.CORRUPT)
_ENDED = (State.DROPPED, State.REPLACED)
_ON_PATH = (State.PENDING, State.LIVE, State.CORRUPT, State.MISSING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which checkpoints a list shows; every field narrows it."""

    uid: int | None = None
    project: str | None = None
    name: str | None = None  # of the experiment
    experiment_id: str | None = None
    state: State | None = None
    ended: bool = True  # without a state: also what was dropped or replaced, and is no checkpoint any more
    level: Level | None = None  # at least this one
    tag: str | None = None  # of the checkpoint or of its experiment
    sort: Literal["newest", "step", "metric"] = "newest"
    metric: str | None = None  # with sort="metric"; checkpoints without a finite value are left out
    mode: Literal["min", "max"] = "min"
    limit: int = 50  # LIMIT_MAX at most
    after: str | None = None  # cursor of the page before


@dataclass(frozen=True, slots=True)
class Page:
    """One page; `next` is None on the last."""

    checkpoints: list[Checkpoint]
    next: str | None


@dataclass(frozen=True, slots=True)
class Known:
    """What the catalog knows to lie at one path."""

    path: str
    checkpoint_id: str
    state: State
    level: Level
    identity: Identity | None
    is_ours: bool  # written by ckptd (memory hand-off), not by somebody else


async def find(conn: AsyncConnection, wanted: Filter) -> Page:
    """Return one page. BadRequest for a cursor that is none, a limit out of bounds, or a sort without its metric."""
    if not 1 <= wanted.limit <= LIMIT_MAX:
        raise BadRequest(f"limit must be 1 to {LIMIT_MAX}, not {wanted.limit}")
    narrowed = await _narrow(conn, wanted)
    if narrowed is None:
        return Page([], None)
    if wanted.sort == "newest":
        return await _by_arrival(conn, narrowed, wanted)
    if wanted.sort == "step":
        return await _by_step(conn, narrowed, wanted)
    return await _by_metric(conn, narrowed, wanted)


async def of_experiment(conn: AsyncConnection, experiment_id: str) -> list[Checkpoint]:
    """Return what an experiment has on disk or on its way (PENDING, LIVE, CORRUPT), by (step, revision, sequence)."""
    no = select(schema.experiment.c.no).where(schema.experiment.c.id == experiment_id).scalar_subquery()
    wanted = SELECT.where(_row.experiment_no == no, _row.state.in_(_HERE)).order_by(
        _row.step, _row.revision, _row.sequence
    )
    return [from_row(row) for row in await conn.execute(wanted)]


async def latest(conn: AsyncConnection, experiment_id: str) -> Checkpoint | None:
    """Return the newest good checkpoint of an experiment: the highest (step, revision, sequence) of the newest
    segment that has one.
    """
    return await newest_good(conn, experiment_id)


async def newest_whole(conn: AsyncConnection, of: Checkpoint) -> str | None:
    """Return the id of the newest live, verified checkpoint of the same experiment, whatever hooks say of it."""
    no = select(schema.experiment.c.no).where(schema.experiment.c.id == of.experiment_id).scalar_subquery()
    whole = and_(_row.state == State.LIVE, _row.level_rank >= Level.VERIFIED.rank)
    newest_first = (_row.segment.desc(), _row.step.desc(), _row.revision.desc(), _row.sequence.desc())
    wanted = select(_row.id).where(_row.experiment_no == no, whole).order_by(*newest_first).limit(1)
    found: str | None = (await conn.execute(wanted)).scalar_one_or_none()
    return found


async def latest_of(conn: AsyncConnection, experiment_ids: Sequence[str]) -> set[str]:
    """Return the ids of what `latest` finds in each of these experiments."""
    return await newest_good_ids(conn, experiment_ids)


async def known(
    conn: AsyncConnection, root_id: int, *, after: int = 0, limit: int = 10_000
) -> tuple[list[Known], int | None]:
    """Return one page of what should lie under a root (LIVE, CORRUPT, MISSING, and PENDING with a path), and the
    cursor of the next. One read per page, so that no view stays open while a scan goes on.
    """
    wanted = (
        select(
            _row.sequence,
            _row.path,
            _row.id,
            _row.state,
            _row.level,
            _row.origin,
            _row.dev,
            _row.ino,
            _row.inode_size_bytes,
            _row.mtime_ns,
            _row.ctime_ns,
        )
        .where(_row.root_no == root_id, _row.sequence > after, _row.state.in_(_ON_PATH), _row.path_key != "")
        .order_by(_row.sequence)
        .limit(limit)
    )
    rows = (await conn.execute(wanted)).all()
    found = [
        Known(row.path, row.id, State(row.state), Level(row.level), identity_of(row), row.origin == Origin.MEMORY)
        for row in rows
    ]
    return found, rows[-1].sequence if len(rows) == limit else None


async def by_path(conn: AsyncConnection, path: str) -> Checkpoint | None:
    """Return the newest checkpoint recorded at `path` that is not dropped, trashed, failed or replaced."""
    wanted = (
        SELECT.where(_row.path_key == schema.path_key(path), _row.state.in_(_ON_PATH))
        .order_by(_row.sequence.desc())
        .limit(1)
    )
    row = (await conn.execute(wanted)).one_or_none()
    return None if row is None else from_row(row)


async def trashed_before(conn: AsyncConnection, before: datetime, limit: int = 100) -> list[tuple[Checkpoint, str]]:
    """Return trashed checkpoints whose trashing is older than `before`, oldest first, with their trash names."""
    wanted = SELECT.where(_row.state == State.TRASHED, _row.trashed_at <= before).order_by(_row.trashed_at).limit(limit)
    return [(from_row(row), row.trash) for row in await conn.execute(wanted)]


async def unfinished(conn: AsyncConnection) -> list[Checkpoint]:
    """Return every PENDING checkpoint, oldest first: what recovery must look at."""
    wanted = SELECT.where(_row.state == State.PENDING).order_by(_row.sequence)
    return [from_row(row) for row in await conn.execute(wanted)]


async def _narrow(conn: AsyncConnection, wanted: Filter) -> Select[Any] | None:
    """Apply everything but sort and cursor; None when a name fits nothing."""
    query = SELECT
    if wanted.state is not None:
        query = query.where(await _equal(conn, wanted, _row.state, wanted.state, ""))
    elif not wanted.ended:
        query = query.where(_row.state.not_in(_ENDED))
    if wanted.level is not None:
        query = query.where(_row.level_rank >= wanted.level.rank)
    if wanted.tag is not None:
        query = query.where(await _tagged(conn, wanted.tag))
    if wanted.experiment_id is not None or wanted.name is not None:
        column, numbers = _row.experiment_no, _experiments(wanted)
    elif wanted.project is not None:
        column, numbers = _row.project_no, _projects(wanted)
    else:
        return query if wanted.uid is None else query.where(await _equal(conn, wanted, _row.uid, wanted.uid, 0))
    found = (await conn.execute(numbers)).scalars().all()
    if not found:
        return None
    # One number, the usual case, is an equality: then the index has the order too.
    if len(found) == 1:
        return query.where(await _equal(conn, wanted, column, found[0], 0))
    return query.where(one_of(column, found))


async def _equal(conn: AsyncConnection, wanted: Filter, column: Any, value: Any, nothing: Any) -> ColumnElement[bool]:
    """Say that a column has a value, in the form that is fast for the order that is wanted.

    Its index has rows in the order of their arrival. By step they would all be sorted for one page, so when there
    are many the list is walked by step (`nothing`, added to the column, keeps SQLite from collecting).
    """
    equal: ColumnElement[bool] = column == value
    if wanted.sort != "step":
        return equal
    some = select(_row.sequence).where(equal).limit(COMMON).subquery()
    is_common = (await conn.execute(select(func.count()).select_from(some))).scalar_one() == COMMON
    return (column + nothing) == value if is_common else equal


def _experiments(wanted: Filter) -> Select[Any]:
    experiment = schema.experiment.c
    numbers = select(experiment.no)
    if wanted.experiment_id is not None:
        numbers = numbers.where(experiment.id == wanted.experiment_id)
    if wanted.name is not None:
        numbers = numbers.where(experiment.name == wanted.name)
    if wanted.uid is not None:
        numbers = numbers.where(experiment.uid == wanted.uid)
    if wanted.project is not None:
        numbers = numbers.join(schema.project).where(schema.project.c.name == wanted.project)
    return numbers


def _projects(wanted: Filter) -> Select[Any]:
    project = schema.project.c
    numbers = select(project.no).where(project.name == wanted.project)
    return numbers if wanted.uid is None else numbers.where(project.uid == wanted.uid)


async def _tagged(conn: AsyncConnection, tag: str) -> ColumnElement[bool]:
    """Say which checkpoints bear a tag, their own or their experiment's, in the form that is fast for it.

    Of a rare tag the bearers are collected and sorted. Of a common one the list is walked in its own order
    and each row asked (the nought added to the column keeps SQLite from collecting): the page is soon full.
    """
    own, shared = schema.checkpoint_tag.c, schema.experiment_tag.c
    owners = select(own.checkpoint_no).where(own.tag == tag)
    sharers = select(shared.experiment_no).where(shared.tag == tag)
    some = select(_row.sequence).where(_row.experiment_no.in_(sharers)).limit(COMMON).subquery()
    is_common = (await conn.execute(select(func.count()).select_from(some))).scalar_one() == COMMON
    if not is_common:
        some = owners.limit(COMMON).subquery()
        is_common = (await conn.execute(select(func.count()).select_from(some))).scalar_one() == COMMON
    if not is_common:
        return or_(_row.sequence.in_(owners), _row.experiment_no.in_(sharers))
    itself = exists().where(own.tag == tag, own.checkpoint_no == _row.sequence)
    return or_((_row.experiment_no + 0).in_(sharers), itself)


async def _by_arrival(conn: AsyncConnection, query: Select[Any], wanted: Filter) -> Page:
    if wanted.after is not None:
        query = query.where(_row.sequence < _cursor(wanted.after, "n", int)[0])
    query = query.order_by(_row.sequence.desc()).limit(wanted.limit + 1)
    found = [from_row(row) for row in await conn.execute(query)]
    return _page(found, wanted.limit, lambda last: f"n:{last.sequence}")


async def _by_step(conn: AsyncConnection, query: Select[Any], wanted: Filter) -> Page:
    """Highest step first; what has no step comes after everything that has one."""
    step, sequence = _cursor(wanted.after, "s", _optional_int, int) if wanted.after is not None else (None, None)
    found: list[Checkpoint] = []
    if wanted.after is None or step is not None:
        numbered = query.where(_row.step.is_not(None))
        if step is not None:
            numbered = numbered.where(
                _row.step <= step, or_(_row.step < step, and_(_row.step == step, _row.sequence < sequence))
            )
        numbered = numbered.order_by(_row.step.desc(), _row.sequence.desc()).limit(wanted.limit + 1)
        found = [from_row(row) for row in await conn.execute(numbered)]
    rest = wanted.limit + 1 - len(found)
    if rest > 0:
        unnumbered = query.where(_row.step.is_(None))
        if step is None and sequence is not None:
            unnumbered = unnumbered.where(_row.sequence < sequence)
        unnumbered = unnumbered.order_by(_row.sequence.desc()).limit(rest)
        found += [from_row(row) for row in await conn.execute(unnumbered)]
    return _page(found, wanted.limit, lambda last: f"s:{'' if last.step is None else last.step}:{last.sequence}")


async def _by_metric(conn: AsyncConnection, query: Select[Any], wanted: Filter) -> Page:
    """Best value first; equal values: the later arrival first."""
    name = wanted.metric
    if name is None:
        raise BadRequest('sort="metric" needs the metric\'s name')
    ordered = query.join(schema.checkpoint_metric, _metric.checkpoint_no == _row.sequence).where(
        _metric.name == name, _metric.special == 0
    )
    if wanted.after is not None:
        value, sequence = _cursor(wanted.after, "m", float, int)
        beyond = _metric.value > value if wanted.mode == "min" else _metric.value < value
        ordered = ordered.where(or_(beyond, and_(_metric.value == value, _metric.checkpoint_no < sequence)))
    direction = _metric.value.asc() if wanted.mode == "min" else _metric.value.desc()
    ordered = ordered.order_by(direction, _metric.checkpoint_no.desc()).limit(wanted.limit + 1)
    found = [from_row(row) for row in await conn.execute(ordered)]
    return _page(found, wanted.limit, lambda last: f"m:{last.metrics[name]!r}:{last.sequence}")


def _page(found: list[Checkpoint], limit: int, cursor: Any) -> Page:
    shown = found[:limit]
    return Page(shown, cursor(shown[-1]) if len(found) > limit else None)


def _optional_int(text: str) -> int | None:
    return int(text) if text else None


def _cursor(text: str, kind: str, *types: Any) -> tuple[Any, ...]:
    found, *parts = text.split(":")
    if found == kind and len(parts) == len(types):
        try:
            return tuple(make(part) for make, part in zip(types, parts, strict=True))
        except ValueError as error:
            raise BadRequest(f"{text!r} is not a cursor of this list") from error
    raise BadRequest(f"{text!r} is not a cursor of this list", hint="cursors come from the page before, same sort")
