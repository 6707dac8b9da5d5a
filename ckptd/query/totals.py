"""How many checkpoints there are, how large, how good; the newest, the oldest and the best. Behind `ckpt ls --summary`."""

from typing import Any

from sqlalchemy import ColumnElement, Select, func, or_, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.model import State
from ckptd_client.wire import number

BEST_MAX = 50  # metrics whose best is named
INVALID = (State.CORRUPT, State.MISSING, State.FAILED)

_row = schema.checkpoint.c
_experiment = schema.experiment.c
_best = schema.best.c
_board = schema.board.c

Answer = dict[str, Any]


async def totals(
    conn: AsyncConnection, uid: int | None = None, project: str | None = None, name: str | None = None
) -> Answer:
    """Return the reply of `summary` (docs/reference/wire-control.md) for what the arguments leave over.

    Counts are made by the database; dropped and replaced checkpoints are no longer any. `recoverable` are those in
    the trash, and invalid ones with an arena or a copy that still holds them.
    """
    scope = _scope(uid, project, name)
    here = scope & _row.state.not_in((State.DROPPED, State.REPLACED))
    counted = select(_row.state, _row.level, func.count(), func.coalesce(func.sum(_row.size_bytes), 0))
    by_state: dict[str, int] = {}
    by_level: dict[str, int] = {}
    size_bytes = 0
    for state, level, count, bytes_ in await conn.execute(counted.where(here).group_by(_row.state, _row.level)):
        by_state[state] = by_state.get(state, 0) + count
        by_level[level] = by_level.get(level, 0) + count
        size_bytes += int(bytes_)
    live = scope & (_row.state == State.LIVE)
    return {
        "count": sum(by_state.values()),
        "size_bytes": size_bytes,
        "valid": by_state.get(State.LIVE, 0),
        "invalid": sum(by_state.get(state, 0) for state in INVALID),
        "recoverable": by_state.get(State.TRASHED, 0) + await _rescuable(conn, scope),
        "by_state": by_state,
        "by_level": by_level,
        "newest": await _first(conn, _NAMED.where(live).order_by(_row.sequence.desc())),
        "oldest": await _first(conn, _NAMED.where(live).order_by(_row.sequence)),
        "best": await _winners(conn, scope),
    }


def _scope(uid: int | None, project: str | None, name: str | None) -> ColumnElement[bool]:
    """Narrow by row numbers, so that an index of `checkpoint` answers."""
    scope = true() if uid is None else _row.uid == uid
    if project is not None:
        scope = scope & _row.project_no.in_(select(schema.project.c.no).where(schema.project.c.name == project))
    if name is not None:
        scope = scope & _row.experiment_no.in_(select(_experiment.no).where(_experiment.name == name))
    return scope


async def _rescuable(conn: AsyncConnection, scope: ColumnElement[bool]) -> int:
    copied = select(schema.copy.c.no).where(schema.copy.c.checkpoint_no == _row.sequence).exists()
    wanted = select(func.count()).where(scope & _row.state.in_(INVALID) & or_(_row.arena.is_not(None), copied))
    return int((await conn.execute(wanted)).scalar_one())


_NAMED = (
    select(_row.id, schema.project.c.name.label("project"), _experiment.name, _row.step, _row.created_at)
    .join(schema.experiment, _experiment.no == _row.experiment_no)
    .join(schema.project, schema.project.c.no == _experiment.project_no)
)


async def _first(conn: AsyncConnection, wanted: Select[Any]) -> Answer | None:
    row = (await conn.execute(wanted.limit(1))).first()
    return None if row is None else {**_named(row), "created_at": row.created_at.isoformat()}


def _named(row: Any) -> Answer:
    return {"checkpoint": row.id, "project": row.project, "name": row.name, "step": row.step}


async def _winners(conn: AsyncConnection, scope: ColumnElement[bool]) -> list[Answer]:
    """Name the best of each metric and direction over all experiments in scope; the catalog ranks within each."""
    first = select(_board.metric, _board.mode, func.min(_best.value).label("low"), func.max(_best.value).label("high"))
    first = first.join_from(schema.best, schema.board).join(schema.checkpoint, _row.sequence == _best.checkpoint_no)
    own = scope & (_best.rank == 1) & (_board.scope == "experiment") & (_board.metric != "")
    ranked = first.where(own).group_by(_board.metric, _board.mode)
    found = []
    for metric, mode, low, high in (await conn.execute(ranked.order_by(_board.metric).limit(BEST_MAX))).all():
        value = low if mode == "min" else high
        won = _NAMED.join(schema.best, _best.checkpoint_no == _row.sequence).join(schema.board)
        won = won.where(own & (_board.metric == metric) & (_board.mode == mode) & (_best.value == value))
        row = (await conn.execute(won.order_by(_row.sequence).limit(1))).first()
        if row is not None:
            found.append({"metric": metric, "mode": mode, "value": number(value), **_named(row)})
    return found
