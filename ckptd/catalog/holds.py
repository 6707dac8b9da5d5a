"""What keeps a checkpoint: a person's pin, a reader's lease (with expiry), a branch that starts from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.checkpoint_rows import one
from ckptd.catalog.history import HERE
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.errors import NotFound
from ckptd.model import State


@dataclass(frozen=True, slots=True)
class Hold:
    """One reason why a checkpoint stays."""

    checkpoint_id: str
    kind: str  # "pin", "lease", "parent"
    by: str  # "uid 1000", the lease's holder, or the child experiment's id
    note: str = ""
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Marked:
    """What people said of a checkpoint that keeps it, or may by a rule."""

    pinned: bool
    tags: tuple[str, ...]


_checkpoint = schema.checkpoint.c
_pin = schema.pin.c
_lease = schema.lease.c
_child = schema.checkpoint.alias("child")
_GONE = (State.DROPPED, State.REPLACED, State.FAILED)


async def pin(tx: Tx, checkpoint_id: str, uid: int, note: str = "") -> None:
    """Hold a checkpoint until it is unpinned; pinning again replaces the note. Emits checkpoint.pinned.

    NotFound  there is none, or it lies in the trash (only a restore takes it out of there), or is gone for good
    """
    row = await one(tx.conn, checkpoint_id)
    if row.state == State.TRASHED:
        raise NotFound(
            f"checkpoint {row.id} is in the trash, where a pin keeps nothing",
            hint="`ckpt restore ID` brings it back, and pins it",
            state=str(row.state),
        )
    if row.state == State.DROPPED:
        raise NotFound(f"checkpoint {row.id} is dropped: nothing of it is left to keep", state=str(row.state))
    await tx.conn.execute(delete(schema.pin).where(_pin.checkpoint_no == row.sequence))
    await tx.conn.execute(
        insert(schema.pin).values(checkpoint_no=row.sequence, uid=uid, note=note, pinned_at=tx.clock.now())
    )
    tx.tell(
        "checkpoint.pinned", {**_about(row), "note": note, "uid": uid}, experiment=row.experiment_id, checkpoint=row.id
    )


async def unpin(tx: Tx, checkpoint_id: str, uid: int) -> bool:
    """Lift the pin for the user `uid`; False when there was none. NotFound. Emits checkpoint.unpinned."""
    row = await one(tx.conn, checkpoint_id)
    gone = await tx.conn.execute(delete(schema.pin).where(_pin.checkpoint_no == row.sequence))
    if gone.rowcount == 0:
        return False
    tx.tell("checkpoint.unpinned", {**_about(row), "uid": uid}, experiment=row.experiment_id, checkpoint=row.id)
    return True


async def marked(conn: AsyncConnection, checkpoint_ids: Sequence[str]) -> dict[str, Marked]:
    """Return which of these checkpoints (a batch of them) a person pinned or tagged."""
    if not checkpoint_ids:
        return {}
    wanted = (
        select(_checkpoint.id, _checkpoint.tags, _pin.checkpoint_no)
        .join_from(schema.checkpoint, schema.pin, isouter=True)
        .where(one_of(_checkpoint.id, checkpoint_ids))
    )
    found = {row.id: Marked(row.checkpoint_no is not None, tuple(row.tags)) for row in await conn.execute(wanted)}
    return {id_: one for id_, one in found.items() if one.pinned or one.tags}


async def carry(tx: Tx, from_id: str, to_id: str) -> None:
    """Move a pin, as it was made, to another checkpoint; nothing when there is none, or that one has its own.

    Emits checkpoint.unpinned and then checkpoint.pinned, in the name of who pinned it. NotFound.
    """
    row, heir = await one(tx.conn, from_id), await one(tx.conn, to_id)
    wanted = select(schema.pin).where(_pin.checkpoint_no.in_((row.sequence, heir.sequence)))
    pins = {found.checkpoint_no: found for found in await tx.conn.execute(wanted)}
    mine = pins.get(row.sequence)
    if mine is None or heir.sequence in pins:
        return
    await tx.conn.execute(
        update(schema.pin).where(_pin.checkpoint_no == row.sequence).values(checkpoint_no=heir.sequence)
    )
    uid, note = mine.uid, mine.note
    tx.tell("checkpoint.unpinned", {**_about(row), "uid": uid}, experiment=row.experiment_id, checkpoint=row.id)
    data = {**_about(heir), "note": note, "uid": uid}
    tx.tell("checkpoint.pinned", data, experiment=heir.experiment_id, checkpoint=heir.id)


async def lease(tx: Tx, checkpoint_id: str, holder: str, for_s: float) -> datetime:
    """Hold a checkpoint for a reader until the returned time; the same holder's lease is renewed. NotFound."""
    row = await one(tx.conn, checkpoint_id)
    until = tx.clock.now() + timedelta(seconds=for_s)
    mine = (_lease.checkpoint_no == row.sequence, _lease.holder == holder)
    renewed = await tx.conn.execute(update(schema.lease).where(*mine).values(until=until))
    if renewed.rowcount == 0:
        await tx.conn.execute(insert(schema.lease).values(checkpoint_no=row.sequence, holder=holder, until=until))
    return until


async def release(tx: Tx, checkpoint_id: str, holder: str) -> None:
    """Give a reader's lease back; none is fine. NotFound."""
    row = await one(tx.conn, checkpoint_id)
    await tx.conn.execute(delete(schema.lease).where(_lease.checkpoint_no == row.sequence, _lease.holder == holder))


async def release_all(tx: Tx, holder: str) -> None:
    """Give back every lease of a holder, whose connection is gone."""
    await tx.conn.execute(delete(schema.lease).where(_lease.holder == holder))


async def of_checkpoint(conn: AsyncConnection, checkpoint_id: str, now: datetime) -> list[Hold]:
    """Return everything that holds one checkpoint at `now`. NotFound."""
    row = await one(conn, checkpoint_id)
    return await _found(conn, _checkpoint.sequence == row.sequence, now)


async def of_experiment(conn: AsyncConnection, experiment_id: str, now: datetime) -> list[Hold]:
    """Return everything that holds what one experiment has on disk, or on its way there, at `now`."""
    no = select(schema.experiment.c.no).where(schema.experiment.c.id == experiment_id).scalar_subquery()
    # The states are said for the index: else each save's plan would read all that was ever dropped.
    return await _found(conn, and_(_checkpoint.experiment_no == no, _checkpoint.state.in_(HERE)), now)


async def of_checkpoints(conn: AsyncConnection, checkpoint_ids: Sequence[str], now: datetime) -> list[Hold]:
    """Return everything that holds these checkpoints (a page of them) at `now`."""
    return await _found(conn, one_of(_checkpoint.id, checkpoint_ids), now)


async def expire(tx: Tx, now: datetime) -> int:
    """Forget leases that ended before `now`; return how many."""
    return int((await tx.conn.execute(delete(schema.lease).where(_lease.until <= now))).rowcount)


async def _found(conn: AsyncConnection, which: ColumnElement[bool], now: datetime) -> list[Hold]:
    pins = select(_checkpoint.id, _pin.uid, _pin.note).join_from(schema.pin, schema.checkpoint).where(which)
    held = [Hold(row.id, "pin", f"uid {row.uid}", row.note) for row in await conn.execute(pins)]
    leases = (
        select(_checkpoint.id, _lease.holder, _lease.until)
        .join_from(schema.lease, schema.checkpoint)
        .where(which, _lease.until > now)
    )
    held += [Hold(row.id, "lease", row.holder, until=row.until) for row in await conn.execute(leases)]
    for branches in _branches(which):
        held += [Hold(row.parent, "parent", row.child) for row in await conn.execute(branches)]
    return held


def _branches(which: ColumnElement[bool]) -> tuple[Any, Any]:
    """A branch is another experiment that began at the checkpoint, or one of whose checkpoints came from it."""
    experiment = schema.experiment.c
    begun = select(_checkpoint.id.label("parent"), experiment.id.label("child")).join_from(
        schema.checkpoint, schema.experiment, experiment.parent_id == _checkpoint.id
    )
    came = (
        select(_checkpoint.id.label("parent"), experiment.id.label("child"))
        .distinct()
        .join_from(schema.checkpoint, _child, _child.c.parent_id == _checkpoint.id)
        .join(schema.experiment, experiment.no == _child.c.experiment_no)
        .where(_child.c.experiment_no != _checkpoint.experiment_no, _child.c.state.not_in(_GONE))
    )
    return begun.where(which), came.where(which)


def _about(row: Any) -> dict[str, Any]:
    return {
        "project": row.project,
        "name": row.experiment,
        "step": row.step,
        "path": row.path,
        "size_bytes": row.size_bytes,
    }
