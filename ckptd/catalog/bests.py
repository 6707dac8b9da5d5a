"""Which checkpoints are the best of an experiment by which rule, as last decided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import bindparam, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.checkpoint_rows import SELECT, from_row, get
from ckptd.catalog.tx import Tx
from ckptd.model import Checkpoint


@dataclass(frozen=True, slots=True)
class Best:
    """One current best: `rank` 1 is the best of its rule."""

    metric: str
    mode: Literal["min", "max"]
    rank: int
    checkpoint_id: str
    value: float


_best = schema.best.c
_row = schema.checkpoint.c
_metric = schema.checkpoint_metric.c
_PLACES = select(schema.best, _row.id.label("checkpoint_id")).join_from(schema.best, schema.checkpoint)
_CURRENT = _PLACES.where(
    _best.experiment_no
    == select(schema.experiment.c.no).where(schema.experiment.c.id == bindparam("experiment")).scalar_subquery()
).order_by(_best.metric, _best.mode, _best.rank)


async def candidates(
    conn: AsyncConnection, experiment_id: str, metric: str, mode: Literal["min", "max"], k: int
) -> list[Checkpoint]:
    """Return checkpoints among which the K best by one metric surely are (ckptd.best decides).

    An index gives them in the order of the values, so a long experiment costs what a short one does.
    """
    no = _number(experiment_id)
    direction = _metric.value.asc() if mode == "min" else _metric.value.desc()
    wanted = (
        SELECT.join(schema.checkpoint_metric, _metric.checkpoint_no == _row.sequence)
        .where(
            _metric.experiment_no == no, _metric.name == metric, _metric.special == 0, _row.is_good, _row.update_best
        )
        .order_by(direction, _row.step, _row.revision, _row.sequence)
        .limit(k)
    )
    return [from_row(row) for row in await conn.execute(wanted)]


async def current(conn: AsyncConnection, experiment_id: str) -> list[Best]:
    """Return the current best rows of every rule, by metric, mode and rank."""
    rows = await conn.execute(_CURRENT, {"experiment": experiment_id})
    return [Best(row.metric, row.mode, row.rank, row.checkpoint_id, row.value) for row in rows]


async def firsts(conn: AsyncConnection, experiment_ids: Sequence[str]) -> dict[str, list[Best]]:
    """Return the first places of each of these experiments (those of a page), by metric and mode."""
    named = _PLACES.add_columns(schema.experiment.c.id.label("experiment_id")).join(
        schema.experiment, schema.experiment.c.no == _best.experiment_no
    )
    wanted = named.where(schema.experiment.c.id.in_(experiment_ids), _best.rank == 1)
    found: dict[str, list[Best]] = {}
    for row in await conn.execute(wanted.order_by(_best.metric, _best.mode)):
        best = Best(row.metric, row.mode, row.rank, row.checkpoint_id, row.value)
        found.setdefault(row.experiment_id, []).append(best)
    return found


async def of_checkpoints(conn: AsyncConnection, checkpoint_ids: Sequence[str]) -> list[Best]:
    """Return the places that these checkpoints (a page of them) hold now, by metric, mode and rank."""
    wanted = _PLACES.where(_row.id.in_(checkpoint_ids)).order_by(_best.metric, _best.mode, _best.rank)
    rows = await conn.execute(wanted)
    return [Best(row.metric, row.mode, row.rank, row.checkpoint_id, row.value) for row in rows]


async def replace(
    tx: Tx, experiment_id: str, decided: Mapping[tuple[str, Literal["min", "max"]], Sequence[tuple[str, float]]]
) -> bool:
    """Make `decided` ((metric, mode) -> ids and values, best first) the current rows; say whether anything changed.

    Emits best.changed for every rule whose first place changed. Rules that are not in `decided` lose their rows.
    """
    before = await current(tx.conn, experiment_id)
    wanted = [
        Best(metric, mode, rank, checkpoint_id, value)
        for (metric, mode), winners in decided.items()
        for rank, (checkpoint_id, value) in enumerate(winners, start=1)
    ]
    if sorted(before, key=_key) == sorted(wanted, key=_key):
        return False
    no = (await tx.conn.execute(select(_number(experiment_id)))).scalar_one()
    await tx.conn.execute(delete(schema.best).where(_best.experiment_no == no))
    if wanted:
        await _add(tx, no, wanted)
    firsts = {(best.metric, best.mode): best.checkpoint_id for best in before if best.rank == 1}
    for best in wanted:
        if best.rank == 1 and firsts.get((best.metric, best.mode)) != best.checkpoint_id:
            await _tell(tx, best)
    return True


async def _add(tx: Tx, experiment_no: int, wanted: Sequence[Best]) -> None:
    numbers = select(_row.id, _row.sequence).where(_row.id.in_({best.checkpoint_id for best in wanted}))
    sequences = {row.id: row.sequence for row in await tx.conn.execute(numbers)}
    now = tx.clock.now()
    rows = [
        {
            "experiment_no": experiment_no,
            "metric": best.metric,
            "mode": best.mode,
            "rank": best.rank,
            "checkpoint_no": sequences[best.checkpoint_id],
            "value": best.value,
            "decided_at": now,
        }
        for best in wanted
    ]
    await tx.conn.execute(insert(schema.best), rows)


async def _tell(tx: Tx, best: Best) -> None:
    about = await get(tx.conn, best.checkpoint_id)
    data = {
        "project": about.project,
        "name": about.experiment,
        "step": about.step,
        "path": about.path,
        "size_bytes": about.size_bytes,
        "metric": best.metric,
        "mode": best.mode,
        "value": best.value,
    }
    tx.tell("best.changed", data, experiment=about.experiment_id, checkpoint=about.id)


def _number(experiment_id: str) -> Any:
    return select(schema.experiment.c.no).where(schema.experiment.c.id == experiment_id).scalar_subquery()


def _key(best: Best) -> tuple[str, str, int, str, float]:
    return best.metric, best.mode, best.rank, best.checkpoint_id, best.value
