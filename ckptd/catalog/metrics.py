"""Points of metrics, and their summaries kept up to date so that last, min and max cost one row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, and_, bindparam, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.columns import join_float, split_float
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.errors import NotFound


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric. NaN and the infinities are kept as they are."""

    name: str
    step: int | None
    value: float
    at: datetime


@dataclass(frozen=True, slots=True)
class SeriesPoint:
    """One stored point; `id` rises with arrival and is the cursor of `tail`."""

    id: int
    name: str
    segment: int
    step: int | None
    value: float
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSummary:
    """What one metric of an experiment has been. min and max are over finite values only."""

    name: str
    count: int
    nonfinite: int
    last: float
    last_step: int | None
    last_at: datetime
    min: float | None
    min_step: int | None
    max: float | None
    max_step: int | None


_metric = schema.metric.c
_summary = schema.metric_summary.c
_segment = schema.segment.c

_IN_SEGMENT = and_(_segment.experiment_no == _metric.experiment_no, _segment.number == _metric.segment)
# A point is visible unless a later segment went on from an earlier step.
_VISIBLE = or_(_segment.visible_to.is_(None), _metric.step.is_(None), _metric.step <= _segment.visible_to)


async def append(tx: Tx, experiment_id: str, segment: int, points: Sequence[Point]) -> int:
    """Append points with one executemany and bring the summaries up to date; return how many.

    NotFound  no such experiment, or it has no such segment
    """
    experiment_no = await _experiment_no(tx.conn, experiment_id)
    wanted = select(_segment.visible_to).where(_segment.experiment_no == experiment_no, _segment.number == segment)
    row = (await tx.conn.execute(wanted)).one_or_none()
    if row is None:
        raise NotFound(f"experiment {experiment_id} has no segment {segment}")
    if not points:
        return 0
    running = await _running(tx.conn, experiment_no, {point.name for point in points})
    for point in points:
        if row.visible_to is None or point.step is None or point.step <= row.visible_to:
            running[point.name].take(segment, point)
    await _store(tx, experiment_no, running)
    await tx.conn.execute(
        insert(schema.metric),
        [
            {
                "series_no": running[point.name].no,
                "experiment_no": experiment_no,
                "segment": segment,
                "step": point.step,
                "value": value,
                "special": special,
                "at": point.at,
            }
            for point in points
            for value, special in (split_float(point.value),)
        ],
    )
    return len(points)


async def resume_from(tx: Tx, experiment_id: str, segment: int, step: int) -> None:
    """`segment` goes on from `step`: points of older segments after it are hidden, not destroyed. NotFound.

    The summaries of the metrics concerned are made again from what is visible.
    """
    no = await _experiment_no(tx.conn, experiment_id)
    await tx.conn.execute(
        update(schema.segment).where(_segment.experiment_no == no, _segment.number == segment).values(start_step=step)
    )
    await tx.conn.execute(
        update(schema.segment)
        .where(
            _segment.experiment_no == no,
            _segment.number < segment,
            or_(_segment.visible_to.is_(None), _segment.visible_to > step),
        )
        .values(visible_to=step)
    )
    overtaken = (
        select(_metric.series_no)
        .distinct()
        .where(_metric.experiment_no == no, _metric.segment < segment, _metric.step > step)
    )
    for series_no in (await tx.conn.execute(overtaken)).scalars().all():
        await _summarise_again(tx, series_no)


async def series(
    conn: AsyncConnection, experiment_id: str, name: str, *, limit: int = 10_000, hidden: bool = False
) -> list[SeriesPoint]:
    """Return the newest `limit` points of a metric in order of (step, arrival); NotFound for the experiment.

    hidden  also those that a later segment has overtaken
    """
    no = await _experiment_no(conn, experiment_id)
    wanted = _points().where(_summary.experiment_no == no, _summary.name == name)
    if not hidden:
        wanted = wanted.where(_VISIBLE)
    rows = await conn.execute(wanted.order_by(_metric.step.desc(), _metric.no.desc()).limit(limit))
    return [_point(row) for row in reversed(rows.all())]


async def tail(conn: AsyncConnection, experiment_id: str, after: int = 0, limit: int = 1000) -> list[SeriesPoint]:
    """Return points that arrived after the point `after`, oldest first. NotFound."""
    no = await _experiment_no(conn, experiment_id)
    wanted = _points().where(_metric.experiment_no == no, _metric.no > after).order_by(_metric.no).limit(limit)
    return [_point(row) for row in await conn.execute(wanted)]


async def summaries(conn: AsyncConnection, experiment_id: str) -> dict[str, MetricSummary]:
    """Return last, min and max of every metric of an experiment that has a visible point. NotFound."""
    no = await _experiment_no(conn, experiment_id)
    wanted = select(schema.metric_summary).where(_summary.experiment_no == no, _summary.points > 0)
    found = {}
    for row in await conn.execute(wanted.order_by(_summary.name)):
        found[row.name] = MetricSummary(
            name=row.name,
            count=row.points,
            nonfinite=row.nonfinite,
            last=join_float(row.last, row.last_special),
            last_step=row.last_step,
            last_at=row.last_at,
            min=row.min,
            min_step=row.min_step,
            max=row.max,
            max_step=row.max_step,
        )
    return found


class _Running:
    """A summary while points are taken in. `no` is None until its row exists."""

    __slots__ = ("last", "last_key", "max", "min", "no", "nonfinite", "points")

    def __init__(self, row: Row[Any] | None) -> None:
        self.no: int | None = None if row is None else row.no
        self.points = 0 if row is None else int(row.points)
        self.nonfinite = 0 if row is None else int(row.nonfinite)
        self.min: tuple[float, int | None] | None = None
        self.max: tuple[float, int | None] | None = None
        self.last: tuple[float, int | None, datetime] | None = None
        self.last_key = (0, -1)
        if row is not None and self.points:
            self.min = None if row.min is None else (row.min, row.min_step)
            self.max = None if row.max is None else (row.max, row.max_step)
            self.last = (join_float(row.last, row.last_special), row.last_step, row.last_at)
            self.last_key = _order(row.last_segment, row.last_step)

    def take(self, segment: int, point: Point) -> None:
        """Count one visible point in. The last one is that of the highest (segment, step, arrival)."""
        self.points += 1
        key = _order(segment, point.step)
        if key >= self.last_key:
            self.last, self.last_key = (point.value, point.step, point.at), key
        if not math.isfinite(point.value):
            self.nonfinite += 1
            return
        if self.min is None or point.value < self.min[0]:
            self.min = (point.value, point.step)
        if self.max is None or point.value > self.max[0]:
            self.max = (point.value, point.step)

    def values(self, now: datetime) -> dict[str, Any]:
        """Return the row's columns."""
        value, step, at = self.last or (0.0, None, now)
        last, special = split_float(value)
        return {
            "points": self.points,
            "nonfinite": self.nonfinite,
            "last": last,
            "last_special": special,
            "last_segment": self.last_key[0],
            "last_step": step,
            "last_at": at,
            "min": self.min[0] if self.min else None,
            "min_step": self.min[1] if self.min else None,
            "max": self.max[0] if self.max else None,
            "max_step": self.max[1] if self.max else None,
        }


def _order(segment: int, step: int | None) -> tuple[int, int]:
    return segment, -1 if step is None else step


async def _running(conn: AsyncConnection, experiment_no: int, names: set[str]) -> dict[str, _Running]:
    wanted = select(schema.metric_summary).where(_summary.experiment_no == experiment_no, one_of(_summary.name, names))
    known = {row.name: row for row in await conn.execute(wanted)}
    return {name: _Running(known.get(name)) for name in names}


async def _store(tx: Tx, experiment_no: int, running: dict[str, _Running]) -> None:
    """Write the summaries: new ones one by one (each gets its number), known ones together."""
    now = tx.clock.now()
    known = []
    for name, summary in sorted(running.items()):
        if summary.no is not None:
            known.append({"wanted": summary.no, **summary.values(now)})
            continue
        values = summary.values(now)
        summary.no = await tx.add(schema.metric_summary, experiment_no=experiment_no, name=name, **values)
    if known:
        await tx.conn.execute(update(schema.metric_summary).where(_summary.no == bindparam("wanted")), known)


async def _summarise_again(tx: Tx, series_no: int) -> None:
    """Read a whole series; only a resume that hides points asks for it."""
    again = _Running(None)
    rows = await tx.conn.execute(_points().where(_metric.series_no == series_no, _VISIBLE).order_by(_metric.no))
    for row in rows:
        point = _point(row)
        again.take(point.segment, Point(point.name, point.step, point.value, point.at))
    await tx.conn.execute(
        update(schema.metric_summary).where(_summary.no == series_no).values(again.values(tx.clock.now()))
    )


async def _experiment_no(conn: AsyncConnection, experiment_id: str) -> int:
    wanted = select(schema.experiment.c.no).where(schema.experiment.c.id == experiment_id)
    no = (await conn.execute(wanted)).scalar_one_or_none()
    if no is None:
        raise NotFound(f"there is no experiment {experiment_id}")
    return int(no)


def _points() -> Select[Any]:
    return (
        select(schema.metric, _summary.name.label("name"))
        .join(schema.metric_summary, _summary.no == _metric.series_no)
        .join(schema.segment, _IN_SEGMENT)
    )


def _point(row: Row[Any]) -> SeriesPoint:
    return SeriesPoint(row.no, row.name, row.segment, row.step, join_float(row.value, row.special), row.at)
