"""A checkpoint's own tags, after it was saved."""

from collections.abc import Iterable

from sqlalchemy import delete, insert, update

from ckptd.catalog import schema
from ckptd.catalog.checkpoint_rows import one
from ckptd.catalog.tx import Tx
from ckptd.errors import BadRequest

TAGS_MAX = 256  # of one checkpoint

_tag = schema.checkpoint_tag.c
_row = schema.checkpoint.c


async def change(tx: Tx, checkpoint_id: str, add: Iterable[str], remove: Iterable[str]) -> tuple[tuple[str, ...], bool]:
    """Add and remove tags; return the sorted rest, and whether that is another one. NotFound; BadRequest for too many.

    Emits checkpoint.tagged when it is.
    """
    row = await one(tx.conn, checkpoint_id)
    tags = tuple(sorted((set(row.tags) | set(add)) - set(remove)))
    if tags == tuple(sorted(row.tags)):
        return tags, False
    if len(tags) > TAGS_MAX:
        raise BadRequest(f"checkpoint {checkpoint_id} would have {len(tags)} tags, {TAGS_MAX} at most")
    await tx.conn.execute(delete(schema.checkpoint_tag).where(_tag.checkpoint_no == row.sequence))
    if tags:
        await tx.conn.execute(
            insert(schema.checkpoint_tag), [{"checkpoint_no": row.sequence, "tag": tag} for tag in tags]
        )
    await tx.conn.execute(update(schema.checkpoint).where(_row.sequence == row.sequence).values(tags=list(tags)))
    about = {"project": row.project, "name": row.experiment, "step": row.step, "path": row.path}
    data = {**about, "size_bytes": row.size_bytes, "tags": list(tags)}
    tx.tell("checkpoint.tagged", data, experiment=row.experiment_id, checkpoint=row.id)
    return tags, True
