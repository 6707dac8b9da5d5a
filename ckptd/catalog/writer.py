"""The one writer: transactions of many callers, committed together, failing alone.

Who comes while a commit is under way waits in a queue. The first of the queue then runs the
functions of all who wait, each behind a savepoint, and commits once: 32 trainers that hand off at
the same moment cost one fsync. There is no writer task: the work is done by whoever waits first.

A wall clock that was set is accounted for before any of them stamps a row (timesteps.py).
"""

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import anyio
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import failpoint
from ckptd.catalog import faults, timesteps
from ckptd.catalog.ballast import Ballast
from ckptd.catalog.edition import Edition
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.errors import Busy, CkptdError
from ckptd.events import Event

T = TypeVar("T")

log = structlog.get_logger()

WRITERS_MAX = 1024  # callers that may wait; beyond it a caller is told to come back
BATCH_MAX = 64  # functions that share one commit; bounds how long the first of them waits
RETRY_AFTER_S = 0.5
# One after the other, never one in another: the same name each time. A new one each time is a new statement each time,
# and pushes those that are needed again out of what the connection keeps compiled.
_SAVEPOINT = "SAVEPOINT one_of_batch"
_UNDONE, _RELEASED = "ROLLBACK TO SAVEPOINT one_of_batch", "RELEASE SAVEPOINT one_of_batch"


@dataclass(slots=True, eq=False)
class _Pending:
    """One caller's function and what became of it."""

    fn: Callable[[Tx], Awaitable[Any]]
    done: anyio.Event = field(default_factory=anyio.Event)
    begun: bool = False
    tx: Tx | None = None
    result: Any = None
    error: BaseException | None = None


class Trouble(NamedTuple):
    """Why commits fail, and since when; the first that changed something and succeeded ends it."""

    error: CkptdError
    since: datetime


@dataclass(slots=True, kw_only=True)
class Writer:
    """Owner of the one connection that writes."""

    conn: AsyncConnection
    clock: Clock
    publish: Callable[[Event], None]
    ballast: Ballast
    where: str
    path: Path | None
    wall: timesteps.WallClock = field(init=False)
    edition: Edition = field(default_factory=Edition)
    commits: int = 0
    trouble: Trouble | None = None
    _waiting: deque[_Pending] = field(default_factory=deque)
    _lock: anyio.Lock = field(default_factory=anyio.Lock)

    def __post_init__(self) -> None:
        """Nothing is owed to the clock yet."""
        self.wall = timesteps.WallClock(self.clock)

    async def run(self, fn: Callable[[Tx], Awaitable[T]]) -> T:
        """Run one function as a transaction; see Catalog.write."""
        if len(self._waiting) >= WRITERS_MAX:
            raise Busy(f"{WRITERS_MAX} writes wait for the catalog already", retry_after_s=RETRY_AFTER_S)
        mine = _Pending(fn)
        self._waiting.append(mine)
        try:
            async with self._lock:
                if not mine.done.is_set():
                    with anyio.CancelScope(shield=True):
                        await self._commit_waiting()
        except BaseException:
            await self._leave(mine)  # noqa: ASYNC102  it shields itself
            raise
        if mine.error is not None:
            raise mine.error
        return mine.result  # type: ignore[no-any-return]

    async def exclusive(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work` on the writing connection outside of any transaction (WAL truncation, upkeep)."""
        async with self._lock:
            with anyio.CancelScope(shield=True):
                result = await work(self.conn)
        return result

    async def _leave(self, mine: _Pending) -> None:
        """Cancelled while waiting: what has not begun is withdrawn, what has begun runs to its end."""
        if not mine.begun:
            self._waiting.remove(mine)
            return
        with anyio.CancelScope(shield=True):
            await mine.done.wait()

    async def _commit_waiting(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(BATCH_MAX, len(self._waiting)))]
        for pending in batch:
            pending.begun = True
        try:
            await self._attempt(batch)
        except Exception as error:  # noqa: BLE001  the outcome of every caller in the batch, each raises it
            if faults.is_disk_full(error) and await self._ease():
                await self._second_attempt(batch)
            else:
                self._fail(batch, error)
        except BaseException:
            self._fail(batch, Busy("the write was interrupted; nothing of it was kept"))
            raise
        finally:
            for pending in batch:
                pending.done.set()
        self._tell(batch)

    async def _ease(self) -> bool:
        """Give the reserve to the disk; say whether there was any."""
        try:
            if not await self.ballast.release():
                return False
        except OSError as error:  # a disk that fails in more than one way: the commit's own error tells of it
            log.warning("catalog.reserve_stuck", path=self.where, error=str(error))
            return False
        log.warning("catalog.reserve_released", path=self.where, bytes=self.ballast.size_bytes, why="the disk is full")
        return True

    async def _second_attempt(self, batch: list[_Pending]) -> None:
        try:
            await self._attempt(batch)
        except Exception as error:  # noqa: BLE001  as above
            self._fail(batch, error)

    def _fail(self, batch: list[_Pending], error: Exception) -> None:
        known = faults.explain(error, self.where)
        if known is not None:
            known.__cause__ = error
            if self.trouble is None or type(self.trouble.error) is not type(known):
                self.trouble = Trouble(known, self.clock.now())
                self.publish(Event("catalog.failed", self.clock.now(), data={"error": known.to_wire()}))
        for pending in batch:
            pending.error = pending.error or known or error

    async def _attempt(self, batch: list[_Pending]) -> None:
        """Run a batch in one transaction. An error that comes out of here has undone all of it.

        A step of the clock is applied first, outside of every savepoint, and is owed until the commit: once, whatever
        fails. A step that is made after the look moves what is stamped here too, in the next transaction: `clock`
        knows nothing of it.
        """
        transaction = await self.conn.begin()
        changes = await self._changes()
        try:
            stepped = self.wall.look()
            clock = self.wall.steady  # kept: others may look while this waits for its statements
            if stepped:
                await timesteps.shift(Tx(self.conn, clock), stepped)
            if len(batch) == 1:
                await self._run(batch[0], clock)
            else:
                for pending in batch:
                    await self._run_in_savepoint(pending, clock)
            failpoint.hit("catalog.commit")
            await transaction.commit()
            self.wall.settle(stepped)
        except BaseException:
            await transaction.rollback()  # noqa: ASYNC102  run() shields the whole batch
            raise
        finally:
            self.edition.bump()
        self.commits += 1
        if self.trouble is not None and await self._changes() != changes:
            self.trouble = None  # a commit of nothing writes nothing, and proves nothing
        failpoint.hit("catalog.committed")

    async def _changes(self) -> int:
        """Rows changed so far on this connection; another database than SQLite does not say, and is believed."""
        driver = (await self.conn.get_raw_connection()).driver_connection
        return int(getattr(driver, "total_changes", self.commits))

    async def _run_in_savepoint(self, pending: _Pending, clock: Clock) -> None:
        await self.conn.exec_driver_sql(_SAVEPOINT)
        try:
            await self._run(pending, clock)
        except Exception as error:
            if faults.ends_transaction(error):
                raise
            pending.error = error
            await self.conn.exec_driver_sql(_UNDONE)
        await self.conn.exec_driver_sql(_RELEASED)

    async def _run(self, pending: _Pending, clock: Clock) -> None:
        pending.error = None
        pending.tx = tx = Tx(self.conn, clock)
        pending.result = await pending.fn(tx)
        await tx.log_events()

    def _tell(self, batch: list[_Pending]) -> None:
        """Everything below is true now: publish in the order of the transactions."""
        for pending in batch:
            if pending.error is None and pending.tx is not None:
                for event in pending.tx.events:
                    self.publish(event)
                for callback in pending.tx.callbacks:
                    callback()
