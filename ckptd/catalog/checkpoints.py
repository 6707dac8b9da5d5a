"""Rows of checkpoints, and the only functions that move one along its ladder and its states.

Each `mark_*` reads the row, checks the transition against model.STATE_TRANSITIONS, writes, and
emits the matching event in the same transaction. A level only rises, except where a docstring says
so, and then the event says it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from ckptd.catalog import harm, schema, segments
from ckptd.catalog.checkpoint_rows import (
    BY_ID,
    arena_of,
    files,
    free_revision,
    from_row,
    get,
    get_many,
    identity,
    identity_of,
    newest_good,
    one,
    state_of,
    uid_of,
    whole,
)
from ckptd.catalog.columns import split_float
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.errors import Bug, NotFound
from ckptd.model import Checkpoint, Damage, FileEntry, Identity, Level, Origin, State, check_transition

# Reading and moving are one noun to callers: these come from the file beside this one.
__all__ = [
    "arena_of",
    "files",
    "get",
    "get_many",
    "identity",
    "newest_good",
    "state_of",
    "uid_of",
    "whole",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCheckpoint:
    """A hand-off as it enters the catalog."""

    id: str
    experiment_id: str
    origin: Origin
    root_id: int | None
    level: Level = Level.STAGED  # NONE for a file that is not known to be whole yet
    step: int | None = None
    epoch: float | None = None
    revision: int | None = None  # None: the next of its step
    segment: int | None = None  # None: the experiment's present one
    path: str = ""
    size_bytes: int = 0
    format: str = "safetensors"
    created_at: datetime | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    parent_id: str | None = None
    update_best: bool = True
    arena: str | None = None  # id of the arena that holds its bytes


@dataclass(frozen=True, slots=True)
class Staged:
    """Answer of `stage`: `existed` when the id was known, and then nothing was changed."""

    checkpoint: Checkpoint
    existed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Durable:
    """What publish or digest found under the final name. Step and epoch only where nobody had said one."""

    path: str
    files: Sequence[FileEntry]
    identity: Identity
    size_bytes: int
    format: str | None = None
    manifest_sha256: str = ""
    step: int | None = None
    epoch: float | None = None
    adopted: bool = False  # an earlier publish had written it
    veto: str | None = None  # a hook's: it is kept as safely as any, and is neither latest nor best
    took_ms: dict[str, float] = field(default_factory=dict)  # what was measured: write_ms, hash_ms


_row = schema.checkpoint.c
_SHOWN = {field.name for field in fields(Checkpoint)}  # columns that readers see under the same name


async def stage(tx: Tx, new: NewCheckpoint) -> Staged:
    """Enter a hand-off: PENDING, with its revision and its sequence. Idempotent by id.

    NotFound  no such experiment
    Emits checkpoint.staged (level STAGED) or checkpoint.found (level NONE).
    """
    known = (await tx.conn.execute(BY_ID, {"wanted": new.id})).one_or_none()
    if known is not None:
        return Staged(from_row(known), existed=True)
    experiment = (
        await tx.conn.execute(select(schema.experiment).where(schema.experiment.c.id == new.experiment_id))
    ).one_or_none()
    if experiment is None:
        raise NotFound(f"there is no experiment {new.experiment_id}")
    now = tx.clock.now()
    sequence = await tx.add(
        schema.checkpoint,
        **_as_handed_over(new),
        uid=experiment.uid,
        project_no=experiment.project_no,
        experiment_no=experiment.no,
        segment=await segments.of_save(tx, experiment, new.segment),
        revision=await free_revision(tx.conn, experiment.no, new.step, new.revision),
        created_at=new.created_at or now,
        staged_at=now,
    )
    await _add_metric_rows(tx, sequence, experiment.no, new.metrics)
    if new.tags:
        rows = [{"checkpoint_no": sequence, "tag": tag} for tag in sorted(set(new.tags))]
        await tx.conn.execute(insert(schema.checkpoint_tag), rows)
    staged = await get(tx.conn, new.id)
    if new.level is Level.NONE:
        _tell(tx, "checkpoint.found", staged, origin=str(new.origin), format=new.format)
    else:
        _tell(tx, "checkpoint.staged", staged, revision=staged.revision)
    return Staged(staged, existed=False)


async def set_arena(tx: Tx, checkpoint_id: str, arena: str | None) -> None:
    """Note which arena holds a hot copy, or that none does any more. NotFound."""
    await _set(tx, checkpoint_id, {"arena": arena})


async def set_target(tx: Tx, checkpoint_id: str, path: str, root_id: int | None = None) -> None:
    """Note the final name before anything is written under it. NotFound; Bug unless PENDING."""
    row = await one(tx.conn, checkpoint_id)
    if row.state != State.PENDING:
        raise Bug(f"checkpoint {checkpoint_id} is {row.state}: its target is settled")
    await _set(tx, checkpoint_id, {**_place(path), "root_no": row.root_no if root_id is None else root_id})


async def set_identity(tx: Tx, checkpoint_id: str, found: Identity, manifest_sha256: str | None = None) -> None:
    """Note which inode holds the same bytes now, after a repair wrote them (and a manifest) again. NotFound."""
    manifest = {} if manifest_sha256 is None else {"manifest_sha256": manifest_sha256}
    await _set(tx, checkpoint_id, {**_identity_values(found), **manifest})


async def mark_durable(tx: Tx, checkpoint_id: str, durable: Durable) -> Checkpoint:
    """PENDING -> LIVE, level DURABLE, with files and identity. Emits checkpoint.published.

    Repeating it with the same files is one mark; Bug when the files differ.
    """
    row = await one(tx.conn, checkpoint_id)
    if row.state == State.LIVE:
        recorded = [(file.path, file.sha256) for file in await files(tx.conn, checkpoint_id)]
        if recorded != [(file.path, file.sha256) for file in durable.files]:
            raise Bug(f"checkpoint {checkpoint_id} is durable already, with other files")
        return from_row(row)
    entries = [
        {
            "checkpoint_no": row.sequence,
            "position": position,
            "path": file.path,
            "size_bytes": file.size_bytes,
            "sha256": file.sha256,
            "xxh3": file.xxh3,
        }
        for position, file in enumerate(durable.files)
    ]
    if entries:
        await tx.conn.execute(insert(schema.file), entries)
    values = {
        **_place(durable.path),
        **_identity_values(durable.identity),
        "size_bytes": durable.size_bytes,
        "format": durable.format or row.format,
        "manifest_sha256": durable.manifest_sha256,
        "veto": durable.veto,
        "durable_at": tx.clock.now(),
        "error": None,
        "epoch": durable.epoch if row.epoch is None else row.epoch,
    }
    if row.step is None and durable.step is not None:
        revision = await free_revision(tx.conn, row.experiment_no, durable.step, None)
        values |= {"step": durable.step, "revision": revision}
    moved = await _move(tx, row, State.LIVE, Level.DURABLE, values)
    told = {"revision": moved.revision, "adopted": durable.adopted, "veto": moved.veto}
    _tell(tx, "checkpoint.published", moved, **told, **durable.took_ms)
    return moved


async def mark_verified(tx: Tx, checkpoint_id: str) -> Checkpoint:
    """LIVE (or CORRUPT, after a repair) -> LIVE, level VERIFIED. Emits checkpoint.verified; Bug unless durable."""
    row = await one(tx.conn, checkpoint_id)
    if row.state not in {State.LIVE, State.CORRUPT} or row.level_rank < Level.DURABLE.rank:
        raise Bug(f"checkpoint {checkpoint_id} is {row.state} and {row.level}: it can't be verified")
    level = Level.TIERED if row.level == Level.TIERED else Level.VERIFIED
    now = tx.clock.now()
    values = {"verified_at": now, "checked_at": now, "error": None}
    moved = await _move(tx, row, State.LIVE, level, values)
    _tell(tx, "checkpoint.verified", moved)
    return moved


async def mark_corrupt(tx: Tx, checkpoint_id: str, damage: Sequence[Damage]) -> Checkpoint:
    """-> CORRUPT, with the damage as `error`. Emits checkpoint.corrupt.

    The level stays what it was: it says what was reached, the state that it no longer counts.
    """
    row = await one(tx.conn, checkpoint_id)
    found = harm.to_wire(damage)
    error = harm.error(row.path, found)
    moved = await _move(tx, row, State.CORRUPT, None, {"error": error, "checked_at": tx.clock.now()})
    _tell(tx, "checkpoint.corrupt", moved, error=error, damage=found)
    return moved


async def mark_missing(tx: Tx, checkpoint_id: str, detail: str = "") -> Checkpoint:
    """-> MISSING, out of the trash too: its files are gone, and not by us. Emits checkpoint.missing, once.

    Damage that was known of them stays with the row: the same bytes are no better when they come back.
    """
    row = await one(tx.conn, checkpoint_id)
    if row.state == State.MISSING:
        return from_row(row)
    known = harm.known(row)
    error = {"code": "missing", "message": detail or f"{row.path} is gone", **({"damage": known} if known else {})}
    moved = await _move(tx, row, State.MISSING, None, {"error": error, "trash": None, "trashed_at": None})
    _tell(tx, "checkpoint.missing", moved, error=error)
    return moved


async def mark_failed(tx: Tx, checkpoint_id: str, error: dict[str, Any]) -> Checkpoint:
    """PENDING -> FAILED with a wire error. Emits checkpoint.failed."""
    moved = await _move(tx, await one(tx.conn, checkpoint_id), State.FAILED, None, {"error": error})
    _tell(tx, "checkpoint.failed", moved, error=error)
    return moved


async def mark_pending(tx: Tx, checkpoint_id: str) -> Checkpoint:
    """FAILED -> PENDING: it is tried again. Emits nothing: the job does."""
    return await _move(tx, await one(tx.conn, checkpoint_id), State.PENDING, None, {"error": None})


async def mark_replaced(tx: Tx, checkpoint_id: str, by: str | None = None) -> Checkpoint:
    """PENDING -> REPLACED: dropped before durable for a newer save. Emits checkpoint.replaced."""
    moved = await _move(tx, await one(tx.conn, checkpoint_id), State.REPLACED, None, {"arena": None})
    _tell(tx, "checkpoint.replaced", moved, by=by)
    return moved


async def mark_trashed(tx: Tx, checkpoint_id: str, trash: str, why: str) -> Checkpoint:
    """-> TRASHED under the trash name `trash`. Emits checkpoint.trashed."""
    values = {"trash": trash, "trashed_at": tx.clock.now()}
    moved = await _move(tx, await one(tx.conn, checkpoint_id), State.TRASHED, None, values)
    _tell(tx, "checkpoint.trashed", moved, why=why)
    return moved


async def mark_dropped(tx: Tx, checkpoint_id: str) -> Checkpoint:
    """-> DROPPED: unlinked for good. Emits checkpoint.dropped."""
    row = await one(tx.conn, checkpoint_id)
    moved = await _move(tx, row, State.DROPPED, None, {"dropped_at": tx.clock.now(), "arena": None})
    _tell(tx, "checkpoint.dropped", moved, why=f"it was {row.state}")
    return moved


async def mark_restored(tx: Tx, checkpoint_id: str, path: str, found: Identity) -> Checkpoint:
    """TRASHED or MISSING -> LIVE; CORRUPT where it was known to be damaged. Emits checkpoint.restored.

    The level falls back to DURABLE unless `found` means the recorded bytes: what came from elsewhere
    must be read again before it counts as verified. What lay in the trash is what was moved there: its
    damage came along whatever `found` says.
    """
    row = await one(tx.conn, checkpoint_id)
    recorded = identity_of(row)
    same = recorded is not None and recorded.means(found)
    known = harm.known(row) if same or row.state == State.TRASHED else []
    state, error = (State.CORRUPT, harm.error(path, known)) if known else (State.LIVE, None)
    values = {**_place(path), **_identity_values(found), "trash": None, "trashed_at": None, "error": error}
    moved = await _move(tx, row, state, None if same else Level.DURABLE, values)
    _tell(tx, "checkpoint.restored", moved, state=str(state))
    return moved


async def add_metrics(tx: Tx, checkpoint_id: str, metrics: dict[str, float]) -> Checkpoint:
    """Attach late metrics (validation ends after the save); a name given again is replaced."""
    row = await one(tx.conn, checkpoint_id)
    if metrics:
        stored = schema.checkpoint_metric.c
        again = delete(schema.checkpoint_metric).where(
            stored.checkpoint_no == row.sequence, one_of(stored.name, metrics)
        )
        await tx.conn.execute(again)
        await _add_metric_rows(tx, row.sequence, row.experiment_no, metrics)
        await _set(tx, checkpoint_id, {"metrics": {**row.metrics, **metrics}})
    return await get(tx.conn, checkpoint_id)


async def lift_veto(tx: Tx, checkpoint_id: str, uid: int, note: str) -> Checkpoint:
    """It counts from now on, as if no hook had objected. Emits checkpoint.unvetoed."""
    row = await one(tx.conn, checkpoint_id)
    moved = await _move(tx, row, State(row.state), None, {"veto": None})
    _tell(tx, "checkpoint.unvetoed", moved, veto=row.veto, uid=uid, note=note)
    return moved


async def _set(tx: Tx, checkpoint_id: str, values: dict[str, Any]) -> None:
    changed = await tx.conn.execute(update(schema.checkpoint).where(_row.id == checkpoint_id).values(values))
    if changed.rowcount == 0:
        raise NotFound(f"there is no checkpoint {checkpoint_id}")


async def _move(tx: Tx, row: Row[Any], state: State, level: Level | None, values: dict[str, Any]) -> Checkpoint:
    """Write a transition; level None keeps the level. Tells when the experiment's newest good one changes by it."""
    check_transition(State(row.state), state)
    level = Level(row.level) if level is None else level
    good = state is State.LIVE and level.rank >= Level.VERIFIED.rank and values.get("veto", row.veto) is None
    before = await newest_good(tx.conn, row.experiment_id) if good != row.is_good else None
    await _set(tx, row.id, {**values, "state": state, "level": level, "level_rank": level.rank, "is_good": good})
    shown = {name: value for name, value in values.items() if name in _SHOWN}
    moved = replace(from_row(row), **shown, state=state, level=level)
    if good != row.is_good:
        after = await newest_good(tx.conn, row.experiment_id) if not good else _newer(before, moved)
        if after is not None and (before is None or before.id != after.id):
            _tell(tx, "latest.changed", after)
    return moved


def _newer(one: Checkpoint | None, other: Checkpoint) -> Checkpoint:
    """Return the newer of two good ones, in the order of `newest_good`; no step comes before all steps."""
    ages = [(of.segment, -1 if of.step is None else of.step, of.revision, of.sequence) for of in (one or other, other)]
    return other if one is None or ages[1] > ages[0] else one


async def _add_metric_rows(tx: Tx, sequence: int, experiment_no: int, metrics: dict[str, float]) -> None:
    rows = []
    for name, number in metrics.items():
        value, special = split_float(number)
        about = {"checkpoint_no": sequence, "experiment_no": experiment_no, "name": name}
        rows.append({**about, "value": value, "special": special})
    if rows:
        await tx.conn.execute(insert(schema.checkpoint_metric), rows)


def _as_handed_over(new: NewCheckpoint) -> dict[str, Any]:
    return {
        "id": new.id,
        "root_no": new.root_id,
        "state": State.PENDING,
        "level": new.level,
        "level_rank": new.level.rank,
        "is_good": False,
        "origin": new.origin,
        **_place(new.path),
        "step": new.step,
        "epoch": new.epoch,
        "size_bytes": new.size_bytes,
        "format": new.format,
        "metrics": new.metrics,
        "note": new.note,
        "meta": new.meta,
        "tags": sorted(set(new.tags)),
        "parent_id": new.parent_id,
        "update_best": new.update_best,
        "arena": new.arena,
        "manifest_sha256": "",
    }


def _place(path: str) -> dict[str, str]:
    return {"path": path, "path_key": schema.path_key(path) if path else ""}


def _identity_values(found: Identity) -> dict[str, int]:
    times = {"mtime_ns": found.mtime_ns, "ctime_ns": found.ctime_ns}
    return {"dev": found.dev, "ino": found.ino, "inode_size_bytes": found.size_bytes, **times}


def _tell(tx: Tx, name: str, about: Checkpoint, **more: Any) -> None:
    data = {"project": about.project, "name": about.experiment, "step": about.step, "path": about.path}
    data |= {"size_bytes": about.size_bytes, **more}
    tx.tell(name, data, experiment=about.experiment_id, checkpoint=about.id)
