"""One write transaction as its function sees it: the connection, and what to say after the commit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Table, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import events
from ckptd.catalog import schema
from ckptd.clock import Clock
from ckptd.errors import Bug
from ckptd.events import Event

# Rows in one INSERT of events: each number of them is a statement of its own, which the connection keeps.
_A_FEW = {"insertmanyvalues_page_size": 16}


@dataclass(slots=True)
class Tx:
    """A transaction on the one writing connection. Valid only inside the function it is handed to.

    What `emit` and `after` collect is told only when the transaction is on the disk; a function
    that fails, or a commit that fails, tells nothing.
    """

    conn: AsyncConnection
    clock: Clock
    events: list[Event] = field(default_factory=list)
    callbacks: list[Callable[[], None]] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        """Write `event` into the log with this transaction and publish it after the commit. Bug when undeclared."""
        events.check(event)
        self.events.append(event)

    def tell(
        self, name: str, data: Mapping[str, Any] | None = None, *, experiment: str = "", checkpoint: str = ""
    ) -> None:
        """Emit an event that happens now."""
        self.emit(Event(name, self.clock.now(), experiment, checkpoint, data or {}))

    def after(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the event loop after the commit; it must not block or raise."""
        self.callbacks.append(callback)

    async def add(self, table: Table, **values: Any) -> int:
        """Insert one row; return its number."""
        key = (await self.conn.execute(insert(table).values(values))).inserted_primary_key
        if key is None:
            raise Bug(f"table {table.name} numbers no rows")
        return int(key[0])

    async def log_events(self) -> None:
        """Write the collected events into the log; each gets its number. For the writer, once, at the end."""
        if not self.events:
            return
        rows = [
            {
                "at": event.at,
                "name": event.name,
                "experiment_id": event.experiment or None,
                "checkpoint_id": event.checkpoint or None,
                "data": dict(event.data),
            }
            for event in self.events
        ]
        if len(rows) > 1 and self.conn.dialect.name == "sqlite":
            # One statement numbers its rows in their order; only RETURNING may list them in another.
            adding = insert(schema.event_log).returning(schema.event_log.c.sequence).execution_options(**_A_FEW)
            numbers = sorted((await self.conn.execute(adding, rows)).scalars())
        else:
            numbers = [await self.add(schema.event_log, **row) for row in rows]
        self.events[:] = [replace(event, seq=number) for event, number in zip(self.events, numbers, strict=True)]
