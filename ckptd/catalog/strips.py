"""What was taken out of checkpoints that stay: optimizer states of old ones, and where that stands.

    STRIPPING ─► STRIPPED ─► PURGING ─► GONE
                    └─► UNDOING ─► (no row)

A file's row says `stripped` from the first intent to the last undoing: whoever reads rows counts on none
of its bytes while it may be on the move.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Row, and_, case, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema, striptable
from ckptd.catalog.checkpoint_rows import one
from ckptd.catalog.checkpoints import set_identity
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.errors import Bug, NotFound
from ckptd.model import Identity

LOOKED_MAX = 1000  # strips of one look

_row = schema.checkpoint.c
_file = schema.file.c
_strip = striptable.strip.c


class StripState(StrEnum):
    """Where a strip is."""

    STRIPPING = "stripping"  # meant; the files may still stand in their place
    STRIPPED = "stripped"  # in the trash, from where they can come back
    UNDOING = "undoing"  # on their way back
    PURGING = "purging"  # being unlinked
    GONE = "gone"  # for good


_IN_TRASH = (StripState.STRIPPED, StripState.PURGING)


@dataclass(frozen=True, slots=True)
class Strip:
    """One checkpoint's strip. `files`: names in its directory, with their bytes; `at` is when its state began."""

    checkpoint_id: str
    state: StripState
    at: datetime
    files: Mapping[str, int]
    size_bytes: int
    project: str = ""
    experiment: str = ""


async def of_checkpoint(conn: AsyncConnection, checkpoint_id: str) -> Strip | None:
    """Return what was taken out of a checkpoint; None when it is whole."""
    row = (await conn.execute(_SELECT.where(_row.id == checkpoint_id))).one_or_none()
    return None if row is None else _from_row(row)


async def in_state(conn: AsyncConnection, *states: StripState) -> list[Strip]:
    """Return strips in these states, the oldest first, LOOKED_MAX at most."""
    wanted = _SELECT.where(_strip.state.in_(states)).order_by(_strip.at, _strip.checkpoint_no)
    return [_from_row(row) for row in await conn.execute(wanted.limit(LOOKED_MAX))]


@dataclass(frozen=True, slots=True)
class Heap:
    """An experiment's stripped files in the trash: since when the oldest; `begun`: some are half unlinked."""

    experiment_no: int
    project: str
    experiment: str
    since: datetime
    begun: bool


async def heaps(conn: AsyncConnection) -> list[Heap]:
    """Return every experiment of which stripped files lie in the trash, the oldest first."""
    begun = func.max(case((_strip.state == StripState.PURGING, 1), else_=0))
    wanted = (
        select(_row.experiment_no, func.min(_strip.at).label("since"), begun.label("begun"))
        .join(striptable.strip, _strip.checkpoint_no == _row.sequence)
        .where(_strip.state.in_(_IN_TRASH))
        .group_by(_row.experiment_no)
        .subquery()
    )
    rows = await conn.execute(
        select(wanted.c.experiment_no, schema.project.c.name, schema.experiment.c.name, wanted.c.since, wanted.c.begun)
        .join(schema.experiment, schema.experiment.c.no == wanted.c.experiment_no)
        .join(schema.project, schema.project.c.no == schema.experiment.c.project_no)
        .order_by(wanted.c.since)
    )
    return [Heap(*row[:4], begun=bool(row.begun)) for row in rows]


async def strippable(conn: AsyncConnection, experiment_id: str, patterns: Sequence[str]) -> frozenset[str]:
    """Return the ids of an experiment's good checkpoints that have a file of one of the patterns, not stripped yet."""
    no = select(schema.experiment.c.no).where(schema.experiment.c.id == experiment_id).scalar_subquery()
    matching = or_(*(_file.path.like(_like(pattern), escape="\\") for pattern in patterns))
    wanted = (
        select(_row.id)
        .distinct()
        .join(schema.file, _file.checkpoint_no == _row.sequence)
        .where(_row.experiment_no == no, _row.is_good, _row.format == "safetensors", ~_file.stripped)
        .where(matching, _file.path.not_like("%/%"))
    )
    return frozenset((await conn.execute(wanted)).scalars())


async def begin(tx: Tx, checkpoint_id: str, patterns: Sequence[str]) -> Strip | None:
    """Note what is about to be taken out; None when there is nothing, or something was taken out before. NotFound."""
    row = await one(tx.conn, checkpoint_id)
    if await of_checkpoint(tx.conn, checkpoint_id) is not None:
        return None
    matching = or_(*(_file.path.like(_like(pattern), escape="\\") for pattern in patterns))
    wanted = select(_file.path, _file.size_bytes).where(_file.checkpoint_no == row.sequence, matching)
    files = {each.path: each.size_bytes for each in await tx.conn.execute(wanted) if "/" not in each.path}
    if not files:
        return None
    await _enter(tx, row.sequence, StripState.STRIPPING, files)
    return await of_checkpoint(tx.conn, checkpoint_id)


async def finish(tx: Tx, strip: Strip, found: Identity) -> None:
    """STRIPPING -> STRIPPED: the files are in the trash. Emits checkpoint.stripped."""
    row = await one(tx.conn, strip.checkpoint_id)
    await _advance(tx, row, StripState.STRIPPING, StripState.STRIPPED)
    await _resize(tx, row, -strip.size_bytes)
    await set_identity(tx, strip.checkpoint_id, found)
    _tell(tx, "checkpoint.stripped", row, strip)


async def undo(tx: Tx, strip: Strip) -> None:
    """STRIPPED -> UNDOING. NotFound when the files are gone, or were never in the trash."""
    if strip.state is not StripState.STRIPPED:
        raise NotFound(f"what was taken out of checkpoint {strip.checkpoint_id} is {strip.state}, not in the trash")
    await _advance(tx, await one(tx.conn, strip.checkpoint_id), StripState.STRIPPED, StripState.UNDOING)


async def undone(tx: Tx, strip: Strip, found: Identity) -> None:
    """UNDOING -> no strip at all: everything is back. Emits checkpoint.unstripped."""
    row = await one(tx.conn, strip.checkpoint_id)
    await _advance(tx, row, StripState.UNDOING, None)
    await _mark(tx, row.sequence, strip.files, stripped=False)
    await _resize(tx, row, strip.size_bytes)
    await set_identity(tx, strip.checkpoint_id, found)
    _tell(tx, "checkpoint.unstripped", row, strip)


async def purge(tx: Tx, heap: Heap, grace: timedelta | None, after: int, at_most: int) -> list[tuple[int, str]]:
    """STRIPPED -> PURGING for what has lain in the trash for a grace (None: nothing has); return sequences and ids.

    The first so many beyond a sequence, what is half unlinked among them. The time and the rows are of one mind here:
    a clock that was set moved both.
    """
    now = tx.clock.now()
    due = _strip.state == StripState.PURGING
    if grace is not None:
        due = or_(due, and_(_strip.state == StripState.STRIPPED, _strip.at <= now - grace))
    wanted = (
        select(_row.sequence, _row.id)
        .join(striptable.strip, _strip.checkpoint_no == _row.sequence)
        .where(_row.experiment_no == heap.experiment_no, _row.sequence > after, due)
        .order_by(_row.sequence)
    )
    found = [(row.sequence, row.id) for row in await tx.conn.execute(wanted.limit(at_most))]
    begun = (one_of(_strip.checkpoint_no, [sequence for sequence, _ in found]), _strip.state == StripState.STRIPPED)
    await tx.conn.execute(update(striptable.strip).where(*begun).values(state=StripState.PURGING, at=now))
    return found


async def purged(tx: Tx, checkpoint_id: str) -> None:
    """PURGING -> GONE."""
    await _advance(tx, await one(tx.conn, checkpoint_id), StripState.PURGING, StripState.GONE)


async def found(tx: Tx, checkpoint_id: str, files: Sequence[str]) -> None:
    """Note what a rebuild read beside a manifest: these files were taken out, before this catalog was. Nothing is told."""
    row = await one(tx.conn, checkpoint_id)
    wanted = select(_file.path, _file.size_bytes).where(
        _file.checkpoint_no == row.sequence, one_of(_file.path, list(files))
    )
    known = {each.path: each.size_bytes for each in await tx.conn.execute(wanted)}
    if known:
        await _enter(tx, row.sequence, StripState.STRIPPED, known)
        await _resize(tx, row, -sum(known.values()))


_SELECT = (
    select(
        striptable.strip,
        _row.id.label("checkpoint_id"),
        schema.project.c.name.label("project"),
        schema.experiment.c.name.label("experiment"),
    )
    .join(schema.checkpoint, _row.sequence == _strip.checkpoint_no)
    .join(schema.experiment, schema.experiment.c.no == _row.experiment_no)
    .join(schema.project, schema.project.c.no == _row.project_no)
)


async def _enter(tx: Tx, sequence: int, state: StripState, files: Mapping[str, int]) -> None:
    values = {"state": state, "at": tx.clock.now(), "files": dict(files), "size_bytes": sum(files.values())}
    await tx.conn.execute(insert(striptable.strip).values(checkpoint_no=sequence, **values))
    await _mark(tx, sequence, files, stripped=True)


async def _advance(tx: Tx, row: Row[Any], old: StripState, new: StripState | None) -> None:
    mine = (_strip.checkpoint_no == row.sequence, _strip.state == old)
    if new is None:
        changed = await tx.conn.execute(delete(striptable.strip).where(*mine))
    else:
        changed = await tx.conn.execute(update(striptable.strip).where(*mine).values(state=new, at=tx.clock.now()))
    if changed.rowcount == 0:
        raise Bug(f"the strip of checkpoint {row.id} is not {old}")


async def _mark(tx: Tx, sequence: int, files: Iterable[str], *, stripped: bool) -> None:
    mine = (_file.checkpoint_no == sequence, one_of(_file.path, list(files)))
    await tx.conn.execute(update(schema.file).where(*mine).values(stripped=stripped))


async def _resize(tx: Tx, row: Row[Any], by_bytes: int) -> None:
    size_bytes = max(0, row.size_bytes + by_bytes)
    await tx.conn.execute(update(schema.checkpoint).where(_row.sequence == row.sequence).values(size_bytes=size_bytes))


def _tell(tx: Tx, name: str, row: Row[Any], strip: Strip) -> None:
    about = {"project": row.project, "name": row.experiment, "step": row.step, "path": row.path}
    data = {**about, "size_bytes": strip.size_bytes, "files": list(strip.files)}
    tx.tell(name, data, experiment=row.experiment_id, checkpoint=row.id)


def _like(pattern: str) -> str:
    r"""Write a shell pattern of * and ? as SQL's LIKE.

    >>> print(_like("optim_*.safetensors"))
    optim\_%.safetensors
    """
    escaped = pattern.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%").replace("?", "_")


def _from_row(row: Row[Any]) -> Strip:
    return Strip(
        row.checkpoint_id, StripState(row.state), row.at, dict(row.files), row.size_bytes, row.project, row.experiment
    )
