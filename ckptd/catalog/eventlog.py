"""The bounded log of published events, for `ckpt log` and for followers that come back."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.keys import one_of
from ckptd.catalog.owners import events_of
from ckptd.catalog.tx import Tx
from ckptd.events import Event

KEPT_MAX = 100_000  # about 30 MB; older entries are trimmed


@dataclass(frozen=True, slots=True)
class Logged:
    """One event as it was committed; `sequence` rises with every event."""

    sequence: int
    at: datetime
    event: Event


_event = schema.event_log.c


async def page(
    conn: AsyncConnection,
    *,
    since: int | datetime = 0,
    limit: int = 500,
    checkpoint_id: str | None = None,
    uid: int | None = None,
) -> list[Logged]:
    """Oldest first: events with a sequence above `since`, or not before it; of one checkpoint or user where named."""
    after = _event.at >= since if isinstance(since, datetime) else _event.sequence > since
    wanted = select(schema.event_log).where(after).order_by(_event.sequence).limit(limit)
    if checkpoint_id is not None:
        wanted = wanted.where(_event.checkpoint_id == checkpoint_id)
    if uid is not None:
        wanted = wanted.where(events_of(uid))
    return [_from_row(row) for row in await conn.execute(wanted)]


async def named(conn: AsyncConnection, names: Collection[str], after: int, limit: int) -> list[Logged]:
    """Return events of these names with a sequence above `after`, oldest first."""
    mine = one_of(_event.name, names)
    wanted = select(schema.event_log).where(_event.sequence > after, mine).order_by(_event.sequence).limit(limit)
    return [_from_row(row) for row in await conn.execute(wanted)]


async def reach(conn: AsyncConnection) -> tuple[int, int]:
    """Return the numbers of the oldest and the newest event that the log has; (0, 0) when it is empty."""
    oldest = (await conn.execute(select(func.min(_event.sequence)))).scalar()  # one look-up each; together, a scan
    newest = (await conn.execute(select(func.max(_event.sequence)))).scalar()
    return int(oldest or 0), int(newest or 0)


async def newest(conn: AsyncConnection, limit: int = 100, uid: int | None = None) -> list[Logged]:
    """Return the newest events (of one user where named), oldest of them first."""
    wanted = select(schema.event_log).order_by(_event.sequence.desc()).limit(limit)
    if uid is not None:
        wanted = wanted.where(events_of(uid))
    return [_from_row(row) for row in reversed((await conn.execute(wanted)).all())]


async def trim(tx: Tx, kept_max: int = KEPT_MAX) -> int:
    """Forget all but the newest `kept_max` events; return how many were forgotten."""
    last = (await tx.conn.execute(select(func.max(_event.sequence)))).scalar()
    if last is None:
        return 0
    return int((await tx.conn.execute(delete(schema.event_log).where(_event.sequence <= last - kept_max))).rowcount)


def _from_row(row: Row[Any]) -> Logged:
    event = Event(row.name, row.at, row.experiment_id or "", row.checkpoint_id or "", row.data, row.sequence)
    return Logged(row.sequence, row.at, event)
