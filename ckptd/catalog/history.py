"""All that one experiment has on disk or on its way, read in small pages: ten thousand rows hold nobody up."""

import hashlib
import json
from typing import Any

import anyio.lowlevel
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.checkpoint_rows import SELECT, from_row
from ckptd.model import Checkpoint, State

PAGE_ROWS = 250  # so long the event loop is not asked for anything else: some milliseconds

_row = schema.checkpoint.c
_segment = schema.segment.c
HERE = (State.PENDING, State.LIVE, State.CORRUPT)


async def of_experiment(conn: AsyncConnection, experiment_id: str) -> list[Checkpoint]:
    """Return what is PENDING, LIVE or CORRUPT, in the order of arrival.

    State by state, because only then the index passes over all that the experiment has ever dropped.
    """
    found: list[Checkpoint] = []
    no = (await conn.execute(_number(experiment_id))).scalar_one_or_none()
    for state in () if no is None else HERE:
        found += await _in_state(conn, no, state)
    return sorted(found, key=lambda one: one.sequence)


async def _in_state(conn: AsyncConnection, no: Any, state: State) -> list[Checkpoint]:
    found: list[Checkpoint] = []
    after = 0
    while True:
        wanted = SELECT.where(_row.experiment_no == no, _row.state == state, _row.sequence > after)
        rows = (await conn.execute(wanted.order_by(_row.sequence).limit(PAGE_ROWS))).all()
        found += [from_row(row) for row in rows]
        if len(rows) < PAGE_ROWS:
            return found
        after = rows[-1].sequence
        await anyio.lowlevel.checkpoint()


async def configurations(conn: AsyncConnection, experiment_id: str) -> dict[int, str]:
    """Return a digest of the configuration of each segment; "" where none was said."""
    wanted = select(_segment.number, _segment.config).where(
        _segment.experiment_no == _number(experiment_id).scalar_subquery()
    )
    return {row.number: digest_of(row.config) for row in await conn.execute(wanted)}


def digest_of(config: dict[str, object]) -> str:
    """Name a configuration by its content: keys in any order, "" when it is empty.

    >>> digest_of({"lr": 0.1, "depth": 3}) == digest_of({"depth": 3, "lr": 0.1})
    True
    """
    if not config:
        return ""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


async def tags(conn: AsyncConnection, experiment_id: str) -> frozenset[str]:
    """Return the experiment's own tags."""
    shared = schema.experiment_tag.c
    wanted = select(shared.tag).where(shared.experiment_no == _number(experiment_id).scalar_subquery())
    return frozenset((await conn.execute(wanted)).scalars())


def _number(experiment_id: str) -> Select[tuple[int]]:
    return select(schema.experiment.c.no).where(schema.experiment.c.id == experiment_id)
