"""The audit trail: who did what, before and after. Rows are only ever added."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.tx import Tx


@dataclass(frozen=True, slots=True, kw_only=True)
class Deed:
    """Something that was done, to be recorded."""

    uid: int
    pid: int
    verb: str  # as the wire op or the rule that did it: "pin", "retention", ...
    subject: str  # id of what it was done to; a root's path, a project's name where there is none
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One recorded deed; `id` rises with time."""

    id: int
    at: datetime
    deed: Deed


_audit = schema.audit.c


async def record(tx: Tx, deed: Deed) -> None:
    """Add one entry in the transaction that does the deed."""
    await tx.conn.execute(insert(schema.audit).values(at=tx.clock.now(), **asdict(deed)))


async def page(
    conn: AsyncConnection,
    *,
    limit: int = 100,
    after: int | None = None,
    subject: str | None = None,
    uid: int | None = None,
) -> tuple[list[Entry], int | None]:
    """Newest first: entries with an id below `after`, and the cursor of the next page."""
    wanted = select(schema.audit).order_by(_audit.no.desc()).limit(limit + 1)
    if after is not None:
        wanted = wanted.where(_audit.no < after)
    if subject is not None:
        wanted = wanted.where(_audit.subject == subject)
    if uid is not None:
        wanted = wanted.where(_audit.uid == uid)
    found = []
    for row in await conn.execute(wanted):
        deed = Deed(
            uid=row.uid,
            pid=row.pid,
            verb=row.verb,
            subject=row.subject,
            before=row.before,
            after=row.after,
            note=row.note,
        )
        found.append(Entry(row.no, row.at, deed))
    return found[:limit], found[limit - 1].id if len(found) > limit else None
