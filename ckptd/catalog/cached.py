"""Rows of what was fetched back from an archive and is kept on a local disk: how large, used when, in use by whom."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx

_row = schema.cached.c
_use = schema.cached_use.c


@dataclass(frozen=True, slots=True)
class Cached:
    """One entry. `used` is its place in the order of use, the newest the highest; `in_use` while a reader holds it."""

    key: str
    size_bytes: int
    fetched_at: datetime
    used: int
    used_at: datetime
    in_use: bool


async def entries(conn: AsyncConnection, now: datetime) -> list[Cached]:
    """Return all of them, the longest unused first."""
    holds = select(_use.key).where(_use.until > now)
    held = set((await conn.execute(holds)).scalars())
    rows = await conn.execute(select(schema.cached).order_by(_row.used))
    return [Cached(r.key, r.size_bytes, r.fetched_at, r.used, r.used_at, r.key in held) for r in rows]


async def used_bytes(conn: AsyncConnection) -> int:
    """Return the bytes of all of them."""
    return int((await conn.execute(select(func.coalesce(func.sum(_row.size_bytes), 0)))).scalar_one())


async def add(tx: Tx, key: str, size_bytes: int) -> None:
    """Write down what lies there whole by now; one that is known stays as it is."""
    if (await tx.conn.execute(select(_row.key).where(_row.key == key))).first() is None:
        now = tx.clock.now()
        used = await _next(tx)
        values = {"key": key, "size_bytes": size_bytes, "fetched_at": now, "used": used, "used_at": now}
        await tx.conn.execute(insert(schema.cached).values(values))


async def use(tx: Tx, key: str, holder: str, for_s: float) -> bool:
    """Hold an entry for a reader, and make it the newest used; False when there is none. A holder's hold is renewed."""
    now = tx.clock.now()
    found = await tx.conn.execute(
        update(schema.cached).where(_row.key == key).values(used=await _next(tx), used_at=now)
    )
    if found.rowcount == 0:
        return False
    mine = (_use.key == key, _use.holder == holder)
    until = now + timedelta(seconds=for_s)
    renewed = await tx.conn.execute(update(schema.cached_use).where(*mine).values(until=until))
    if renewed.rowcount == 0:
        await tx.conn.execute(insert(schema.cached_use).values(key=key, holder=holder, until=until))
    return True


async def release(tx: Tx, key: str, holder: str) -> None:
    """A reader is done; none is fine."""
    await tx.conn.execute(delete(schema.cached_use).where(_use.key == key, _use.holder == holder))


async def forget(tx: Tx, keys: Sequence[str], *, lost: bool = False) -> list[str]:
    """Forget entries whose files are about to go; return those that nobody holds by now: only they went.

    lost  their files are gone already, whoever holds them
    """
    now = tx.clock.now()
    held = (
        set()
        if lost
        else set((await tx.conn.execute(select(_use.key).where(one_of(_use.key, keys), _use.until > now))).scalars())
    )
    gone = [key for key in keys if key not in held]
    await tx.conn.execute(delete(schema.cached_use).where(one_of(_use.key, gone)))
    await tx.conn.execute(delete(schema.cached).where(one_of(_row.key, gone)))
    return gone


async def _next(tx: Tx) -> int:
    return int((await tx.conn.execute(select(func.coalesce(func.max(_row.used), 0)))).scalar_one()) + 1
