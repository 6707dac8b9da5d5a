"""Many files at once: what the catalog knows to lie at their paths, and rows for those that are new.

A scan of a tree brings thousands of paths. What is known costs one look-up for a whole batch and no
transaction; what is new costs a few statements for a whole batch, not for each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy import BigInteger, ColumnElement, Text, bindparam, func, insert, select, type_coerce, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import holds, schema, tags
from ckptd.catalog.checkpoint_rows import identity_of
from ckptd.catalog.experiments import Experiment
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.model import Identity, Level, Origin, State

_PARTS_MAX = 500  # keys in one statement
_ROWS_MAX = 4_000  # of one page of `standing`: some 10 ms of the event loop

_row = schema.checkpoint.c
_COLUMNS = (
    _row.sequence, _row.id, _row.uid, _row.path, _row.state, _row.level_rank, _row.origin,
    _row.dev, _row.ino, _row.inode_size_bytes, _row.mtime_ns, _row.ctime_ns,
)  # fmt: skip
# As the database has them: for a hundred thousand rows our types' way out would cost more than all the rest.
_STANDING = (
    select(
        _row.sequence,
        type_coerce(_row.path, Text),
        type_coerce(_row.ino, BigInteger),
        _row.inode_size_bytes,
        _row.mtime_ns,
    )
    .where(
        _row.root_no == bindparam("root"),
        _row.sequence > bindparam("after"),
        _row.state.in_((State.LIVE, State.CORRUPT)),
    )
    .order_by(_row.sequence)
    .limit(_ROWS_MAX)
)
_TELLING = (State.PENDING, State.LIVE, State.CORRUPT, State.MISSING, State.FAILED, State.TRASHED)


# A row of sequence, path, inode (as a signed number), size and time of writing; the last three None: not seen yet.
Standing: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the newest row of a path or an id says."""

    sequence: int
    id: str
    uid: int
    path: str
    state: State
    was_durable: bool
    origin: Origin
    identity: Identity | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A file that no row knows yet, as a scan saw it."""

    id: str
    experiment: Experiment
    root_id: int
    path: str
    format: str
    step: int | None
    identity: Identity


async def at_paths(conn: AsyncConnection, paths: Sequence[str]) -> dict[str, Recorded]:
    """Return what is recorded at each path: the newest row that is not replaced or dropped."""
    keys = [schema.path_key(path) for path in paths]
    return {one.path: one for one in await _recorded(conn, _row.path_key, keys, _row.state.in_(_TELLING))}


async def by_ids(conn: AsyncConnection, ids: Sequence[str]) -> dict[str, Recorded]:
    """Return what is recorded of each checkpoint id, whatever its state."""
    return {one.id: one for one in await _recorded(conn, _row.id, list(ids), None)}


async def standing(conn: AsyncConnection, root_id: int, after: int = 0) -> Sequence[Standing]:
    """Return one page of what should lie under a root (LIVE, CORRUPT), by sequence; an empty one is the end."""
    return (await conn.execute(_STANDING, {"root": root_id, "after": after})).all()


async def at_sequences(conn: AsyncConnection, sequences: Sequence[int]) -> list[Recorded]:
    """Return the rows of these sequences that exist."""
    return await _recorded(conn, _row.sequence, sequences, None)


async def is_publishing(conn: AsyncConnection, root_id: int) -> bool:
    """Whether a memory hand-off is on its way to a directory under this root."""
    wanted = select(_row.sequence).where(
        _row.state == State.PENDING, _row.root_no == root_id, _row.origin == Origin.MEMORY
    )
    return (await conn.execute(wanted.limit(1))).first() is not None


async def set_root(tx: Tx, sequence: int, root_id: int) -> None:
    """Note under which root a row's files lie now, after somebody moved them from another."""
    await tx.conn.execute(update(schema.checkpoint).where(_row.sequence == sequence).values(root_no=root_id))


async def inherit(tx: Tx, heirs: Mapping[str, str]) -> None:
    """Give what people said of a path to what lies at it now: `heirs` has the new row's id by the old one's.

    A pin moves and tags are copied, so that no rule removes what a person holds because a byte of it was changed.
    Metrics and notes stay: they were said of bytes that may be others now. Emits checkpoint.unpinned,
    checkpoint.pinned and checkpoint.tagged for those that had something to give.
    """
    marked = await holds.marked(tx.conn, list(heirs))
    for old, said in marked.items():
        if said.pinned:
            await holds.carry(tx, old, heirs[old])
        if said.tags:
            await tags.change(tx, heirs[old], said.tags, ())


async def enter(tx: Tx, arrivals: Sequence[Arrival]) -> None:
    """Enter new files: PENDING, level NONE, with the identity that was seen. Emits checkpoint.found for each."""
    if not arrivals:
        return
    revisions = await _revisions(tx.conn, arrivals)
    now = tx.clock.now()
    rows = []
    for one in arrivals:
        revision = 1
        if one.step is not None:
            revision = revisions[one.experiment.sequence, one.step] = (
                revisions.get((one.experiment.sequence, one.step), 0) + 1
            )
        rows.append({**_values(one), "revision": revision, "created_at": now, "staged_at": now})
    projects = {one.experiment.sequence for one in arrivals}
    wanted = select(schema.experiment.c.no, schema.experiment.c.project_no).where(
        one_of(schema.experiment.c.no, projects)
    )
    of_project = {row.no: row.project_no for row in await tx.conn.execute(wanted)}
    for values in rows:
        values["project_no"] = of_project[values["experiment_no"]]
    await tx.conn.execute(insert(schema.checkpoint), rows)
    for one in arrivals:
        data = {
            "project": one.experiment.project,
            "name": one.experiment.name,
            "step": one.step,
            "path": one.path,
            "size_bytes": 0,
            "origin": str(Origin.WATCH),
            "format": one.format,
        }
        tx.tell("checkpoint.found", data, experiment=one.experiment.id, checkpoint=one.id)


def _values(one: Arrival) -> dict[str, Any]:
    seen = one.identity
    return {
        "id": one.id,
        "uid": one.experiment.uid,
        "experiment_no": one.experiment.sequence,
        "segment": one.experiment.segment,
        "root_no": one.root_id,
        "state": State.PENDING,
        "level": Level.NONE,
        "level_rank": Level.NONE.rank,
        "is_good": False,
        "origin": Origin.WATCH,
        "path": one.path,
        "path_key": schema.path_key(one.path),
        "step": one.step,
        "size_bytes": 0,
        "format": one.format,
        "metrics": {},
        "note": "",
        "meta": {},
        "tags": [],
        "update_best": True,
        "manifest_sha256": "",
        "dev": seen.dev,
        "ino": seen.ino,
        "inode_size_bytes": seen.size_bytes,
        "mtime_ns": seen.mtime_ns,
        "ctime_ns": seen.ctime_ns,
    }


async def _revisions(conn: AsyncConnection, arrivals: Iterable[Arrival]) -> dict[tuple[int, int], int]:
    """Return the highest revision of each (experiment, step) among the arrivals that is taken already."""
    steps: dict[int, set[int]] = {}
    for one in arrivals:
        if one.step is not None:
            steps.setdefault(one.experiment.sequence, set()).add(one.step)
    taken: dict[tuple[int, int], int] = {}
    for experiment_no, wanted_steps in steps.items():
        wanted = (
            select(_row.step, func.max(_row.revision))
            .where(_row.experiment_no == experiment_no, one_of(_row.step, wanted_steps))
            .group_by(_row.step)
        )
        for step, revision in await conn.execute(wanted):
            taken[experiment_no, step] = revision
    return taken


async def _recorded(
    conn: AsyncConnection, column: Any, keys: Sequence[Any], also: ColumnElement[bool] | None
) -> list[Recorded]:
    """Look rows up by one column, oldest first, so that the newest is the one that a dict keeps."""
    found = []
    for start in range(0, len(keys), _PARTS_MAX):
        wanted = select(*_COLUMNS).where(one_of(column, keys[start : start + _PARTS_MAX]))
        if also is not None:
            wanted = wanted.where(also)
        found += [_from_row(row) for row in await conn.execute(wanted)]
    return sorted(found, key=lambda one: one.sequence)


def _from_row(row: Any) -> Recorded:
    return Recorded(
        row.sequence,
        row.id,
        row.uid,
        row.path,
        State(row.state),
        row.level_rank >= Level.DURABLE.rank,
        Origin(row.origin),
        identity_of(row),
    )
