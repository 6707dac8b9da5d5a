"""Reading checkpoints: the one SELECT, and what its rows become."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Select, bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.keys import one_of
from ckptd.errors import NotFound
from ckptd.model import Checkpoint, FileEntry, Identity, Level, Origin, State

_row = schema.checkpoint.c
_PARTS_MAX = 500  # ids in one statement; SQLite takes 32,766 parameters, MySQL's packets are smaller

# One join for all statements made from it: each that joins for itself keeps its own list of all 121 columns for as
# long as the statement is in SQLAlchemy's cache, which doubles what each shape of question keeps.
_JOINED = schema.checkpoint.join(schema.experiment).join(schema.project).outerjoin(schema.root)
SELECT: Select[Any] = select(
    schema.checkpoint,
    schema.experiment.c.id.label("experiment_id"),
    schema.experiment.c.name.label("experiment"),
    schema.project.c.name.label("project"),
    schema.root.c.path.label("root"),
).select_from(_JOINED)
BY_ID = SELECT.where(_row.id == bindparam("wanted"))

# Built once: each save asks these, and building a statement costs as much as running it.
# What was taken out, or is on the move, counts as no file of it (catalog/strips.py).
_FILES = (
    select(schema.file)
    .where(schema.file.c.checkpoint_no == bindparam("no"), ~schema.file.c.stripped)
    .order_by(schema.file.c.position)
)
_STATE = select(_row.state).where(_row.id == bindparam("wanted"))
_NEWEST_FIRST = (_row.segment.desc(), _row.step.desc(), _row.revision.desc(), _row.sequence.desc())
_NEWEST_GOOD = (
    SELECT.where(
        _row.experiment_no
        == select(schema.experiment.c.no).where(schema.experiment.c.id == bindparam("wanted")).scalar_subquery(),
        _row.is_good,
    )
    .order_by(*_NEWEST_FIRST)
    .limit(1)
)
# For many experiments at once; of each the index has it in one seek.
_NEWEST_GOOD_ID = (
    select(_row.id)
    .where(_row.experiment_no == schema.experiment.c.no, _row.is_good)
    .order_by(*_NEWEST_FIRST)
    .limit(1)
    .correlate(schema.experiment)
    .scalar_subquery()
)


async def get(conn: AsyncConnection, checkpoint_id: str) -> Checkpoint:
    """Return one checkpoint. NotFound."""
    return from_row(await one(conn, checkpoint_id))


async def get_many(conn: AsyncConnection, checkpoint_ids: Sequence[str]) -> dict[str, Checkpoint]:
    """Return those of the ids that exist."""
    found: dict[str, Checkpoint] = {}
    for start in range(0, len(checkpoint_ids), _PARTS_MAX):
        part = checkpoint_ids[start : start + _PARTS_MAX]
        for row in await conn.execute(SELECT.where(one_of(_row.id, part))):
            found[row.id] = from_row(row)
    return found


async def uid_of(conn: AsyncConnection, checkpoint_id: str) -> int:
    """Whose checkpoint it is. NotFound."""
    return int((await one(conn, checkpoint_id)).uid)


async def files(conn: AsyncConnection, checkpoint_id: str) -> tuple[FileEntry, ...]:
    """Return the files of a checkpoint in manifest order; empty before it is durable. NotFound."""
    return await _files(conn, (await one(conn, checkpoint_id)).sequence)


async def whole(
    conn: AsyncConnection, checkpoint_id: str
) -> tuple[Checkpoint, tuple[FileEntry, ...], Identity | None, str]:
    """Return a checkpoint, its files, its identity and its manifest's SHA-256: what reading it back needs. NotFound."""
    row = await one(conn, checkpoint_id)
    return from_row(row), await _files(conn, row.sequence), identity_of(row), row.manifest_sha256


async def state_of(conn: AsyncConnection, checkpoint_id: str) -> State:
    """Return a checkpoint's state alone. NotFound."""
    state = (await conn.execute(_STATE, {"wanted": checkpoint_id})).scalar_one_or_none()
    if state is None:
        raise NotFound(f"there is no checkpoint {checkpoint_id}")
    return State(state)


async def _files(conn: AsyncConnection, sequence: int) -> tuple[FileEntry, ...]:
    rows = await conn.execute(_FILES, {"no": sequence})
    return tuple(FileEntry(row.path, row.size_bytes, row.sha256, row.xxh3) for row in rows)


async def identity(conn: AsyncConnection, checkpoint_id: str) -> Identity | None:
    """Which bytes are meant; None before it is durable. NotFound."""
    return identity_of(await one(conn, checkpoint_id))


async def identity_and_state(conn: AsyncConnection, checkpoint_id: str) -> tuple[Identity | None, State]:
    """Which bytes are meant (None: nothing any more), and the state. NotFound."""
    row = await one(conn, checkpoint_id)
    return identity_of(row), State(row.state)


async def arena_of(conn: AsyncConnection, checkpoint_id: str) -> str | None:
    """Id of the arena that holds a hot copy. NotFound."""
    arena: str | None = (await one(conn, checkpoint_id)).arena
    return arena


async def newest_good(conn: AsyncConnection, experiment_id: str) -> Checkpoint | None:
    """Return the good checkpoint with the highest (step, revision, sequence) of the newest segment that has one."""
    row = (await conn.execute(_NEWEST_GOOD, {"wanted": experiment_id})).one_or_none()
    return None if row is None else from_row(row)


async def newest_good_ids(conn: AsyncConnection, experiment_ids: Sequence[str]) -> set[str]:
    """Return what `newest_good` would for each of these experiments (those of a page), by id alone."""
    wanted = select(_NEWEST_GOOD_ID).where(one_of(schema.experiment.c.id, experiment_ids))
    return {found for found in (await conn.execute(wanted)).scalars() if found is not None}


async def free_revision(conn: AsyncConnection, experiment_no: int, step: int | None, told: int | None) -> int:
    """Return the revision of one more save of a step: `told` if nobody has it. It is never an overwrite."""
    if step is None:
        return 1
    wanted = select(_row.revision).where(_row.experiment_no == experiment_no, _row.step == step)
    taken = set((await conn.execute(wanted)).scalars())
    if told is not None and told not in taken:
        return told
    return max(taken, default=0) + 1


def from_row(row: Row[Any]) -> Checkpoint:
    """Turn a row of SELECT into the noun."""
    return Checkpoint(
        id=row.id,
        experiment_id=row.experiment_id,
        project=row.project,
        experiment=row.experiment,
        state=State(row.state),
        level=Level(row.level),
        origin=Origin(row.origin),
        root=row.root or "",
        path=row.path,
        step=row.step,
        epoch=row.epoch,
        revision=row.revision,
        size_bytes=row.size_bytes,
        format=row.format,
        created_at=row.created_at,
        staged_at=row.staged_at,
        durable_at=row.durable_at,
        verified_at=row.verified_at,
        trashed_at=row.trashed_at,
        metrics=row.metrics,
        note=row.note,
        meta=row.meta,
        tags=tuple(row.tags),
        parent_id=row.parent_id,
        update_best=row.update_best,
        error=row.error,
        sequence=row.sequence,
        segment=row.segment,
        veto=row.veto,
    )


def identity_of(row: Any) -> Identity | None:
    """Return the identity in a row that has its five columns."""
    if row.ino is None:
        return None
    return Identity(row.dev, row.ino, row.inode_size_bytes, row.mtime_ns, row.ctime_ns)


async def one(conn: AsyncConnection, checkpoint_id: str) -> Row[Any]:
    """Return the row of one checkpoint, as SELECT has it. NotFound."""
    row: Row[Any] | None = (await conn.execute(BY_ID, {"wanted": checkpoint_id})).one_or_none()
    if row is None:
        raise NotFound(f"there is no checkpoint {checkpoint_id}")
    return row
