"""Retiring many at once: a few statements for a batch, so that the one writer is soon free for saves again."""

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.checkpoint_rows import get_many
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.model import State, check_transition

RETENTION_UID = -1  # in the trail: the rules did it, nobody did

_row = schema.checkpoint.c
_own_tag = schema.checkpoint_tag.c


async def bury(tx: Tx, why: Mapping[str, str]) -> None:
    """Make checkpoints TRASHED, each under its own id in the trash, with a reason for each. NotFound is no answer here:
    ids that are none are left out.

    Emits checkpoint.trashed for each, and leaves an entry for each in the trail. The caller has made sure, in this
    transaction, that none of them is the newest good one: `latest` does not change by it.
    """
    found = await get_many(tx.conn, list(why))
    if not found:
        return
    for one in found.values():
        check_transition(one.state, State.TRASHED)
    now = tx.clock.now()
    gone = update(schema.checkpoint).where(one_of(_row.id, found))
    await tx.conn.execute(gone.values(state=State.TRASHED, is_good=False, trash=_row.id, trashed_at=now))
    deeds = [
        {"at": now, "uid": RETENTION_UID, "pid": 0, "verb": "retention", "subject": one, "note": why[one]}
        for one in found
    ]
    await tx.conn.execute(insert(schema.audit), deeds)
    for one in found.values():
        data = {"project": one.project, "name": one.experiment, "step": one.step, "path": one.path}
        told = {**data, "size_bytes": one.size_bytes, "why": why[one.id]}
        tx.tell("checkpoint.trashed", told, experiment=one.experiment_id, checkpoint=one.id)


async def good_count(conn: AsyncConnection, experiment_id: str, sequence_max: int) -> int:
    """Count the good checkpoints of an experiment among those that had arrived by then."""
    no = select(schema.experiment.c.no).where(schema.experiment.c.id == experiment_id).scalar_subquery()
    wanted = select(func.count()).where(_row.experiment_no == no, _row.is_good, _row.sequence <= sequence_max)
    return int((await conn.execute(wanted)).scalar_one())


async def bearing(conn: AsyncConnection, checkpoint_ids: Sequence[str], tags: Collection[str]) -> set[str]:
    """Return those of the checkpoints that bear one of the tags themselves."""
    wanted = (
        select(_row.id)
        .join(schema.checkpoint_tag, _own_tag.checkpoint_no == _row.sequence)
        .where(one_of(_row.id, checkpoint_ids), one_of(_own_tag.tag, tags))
    )
    return set((await conn.execute(wanted)).scalars())
