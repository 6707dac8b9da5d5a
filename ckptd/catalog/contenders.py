"""Who takes part in a decision about the best: one checkpoint, all there are, or those that an index puts first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, bindparam, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.bests import Board, descent
from ckptd.model import State


@dataclass(frozen=True, slots=True)
class Seen:
    """What a rule needs to know of a checkpoint. `counts`: it is good, or was when it was retired."""

    sequence: int
    id: str
    experiment_no: int
    segment: int
    step: int | None
    revision: int
    is_good: bool
    metrics: dict[str, float]
    experiment_id: str = ""
    counts: bool = True
    update_best: bool = True


@dataclass(frozen=True, slots=True)
class Among:
    """Which checkpoints may take part in a board: all of a project, or of these experiments."""

    project_no: int | None = None
    experiment_nos: Sequence[int] = ()
    is_one_experiment: bool = False  # then training steps say what came first


_row = schema.checkpoint.c
_metric = schema.checkpoint_metric.c
_experiment = schema.experiment.c

_RETIRED = and_(
    _row.state.in_((State.TRASHED, State.DROPPED)),
    _row.verified_at.is_not(None),
    _row.error.is_(None),
    _row.veto.is_(None),
)
_SEEN = (_row.sequence, _row.id, _row.experiment_no, _row.segment, _row.step, _row.revision, _row.is_good, _row.metrics)
_ONE = (
    select(
        *_SEEN,
        _experiment.id.label("experiment_id"),
        or_(_row.is_good, _RETIRED).label("counts"),
        _row.update_best,
    )
    .join_from(schema.checkpoint, schema.experiment)
    .where(_row.id == bindparam("wanted"))
)


async def one(conn: AsyncConnection, checkpoint_id: str) -> Seen | None:
    """Return what rules need to know of one checkpoint; None when it is unknown."""
    row = (await conn.execute(_ONE, {"wanted": checkpoint_id})).one_or_none()
    return None if row is None else Seen(*row)


async def among(conn: AsyncConnection, board: Board) -> Among:
    """Return whose checkpoints a board is about."""
    if board.scope == "project":
        return Among(project_no=board.owner_no)
    if board.scope == "experiment":
        return Among(experiment_nos=[board.owner_no], is_one_experiment=True)
    return Among(experiment_nos=await descent(conn, board.owner_no))


async def everyone(conn: AsyncConnection, which: Among, *, retired: bool) -> list[Seen]:
    """Return all that take part, and with `retired` those that did; metrics are not looked at.

    It reads as much as there is: for a new rule, a lost winner, a recomputation.
    """
    counts = or_(_row.is_good, _RETIRED) if retired else _row.is_good
    found: list[Seen] = []
    for condition in _conditions(which):
        rows = await conn.execute(select(*_SEEN).where(condition, counts, _row.update_best))
        found += [Seen(*row) for row in rows]
    return found


async def leaders(conn: AsyncConnection, which: Among, metric: str, mode: str, k: int) -> list[Seen]:
    """Return checkpoints among which the K best by one metric surely are.

    An index gives them in the order of the values, so a long experiment costs what a short one does.
    """
    direction = _metric.value.asc() if mode == "min" else _metric.value.desc()
    age = (_row.segment, func.coalesce(_row.step, -1), _row.revision) if which.is_one_experiment else ()
    wanted = (
        select(*_SEEN)
        .join(schema.checkpoint_metric, _metric.checkpoint_no == _row.sequence)
        .where(_metric.name == metric, _metric.special == 0, _row.is_good, _row.update_best)
        .order_by(direction, *age, _row.sequence)
        .limit(k)
    )
    within = [_row.project_no == which.project_no] if which.project_no is not None else []
    within += [_metric.experiment_no == no for no in which.experiment_nos]
    found: list[Seen] = []
    for condition in within:
        found += [Seen(*row) for row in await conn.execute(wanted.where(condition))]
    return found


def _conditions(which: Among) -> Iterable[ColumnElement[bool]]:
    """One for each experiment, so that its index is walked in order, or one for the project."""
    if which.project_no is not None:
        return (_row.project_no == which.project_no,)
    return (_row.experiment_no == no for no in which.experiment_nos)
