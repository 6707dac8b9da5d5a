"""Wall clocks are set: what is measured by one across restarts is moved along, so that nothing ends early or never.

Graces of the trash and leases of readers must outlive the daemon, so they are wall times. When the wall
clock and the monotonic one part by more than slewing explains, those times are moved by the difference,
in the next transaction and before anything else in it. A transaction itself goes by a clock that nobody
sets (`Steady`). So whatever is committed is stamped by the clock as it was at a look, and every step found
by a later look moves it along.

Moved, because something compares them with now: `checkpoint.trashed_at` of what is in the trash,
`strip.at`, `lease.until`, `cached_use.until`, `experiment.heartbeat_at` of what runs, `job.queued_at` of
what waits. Not moved:

    job.not_before     a wait of minutes; claim() ends one that is longer than any (jobs.py)
    job.lease_until    for people: leases of jobs are measured by the monotonic clock
    checkpoint.created_at, metric.at  said by the trainer, and of its manifests; what seems to be saved in
                       the future is kept, and rules about time compare saves with one another
    all other times    shown, and counted from by nobody; what has an order has a sequence
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import BigInteger, type_coerce, update

from ckptd.catalog import schema, striptable
from ckptd.catalog.strips import StripState
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.model import ExperimentStatus, JobState, State

log = structlog.get_logger()

STEP_S = 30.0  # since the last look; more than any clock is slewed, less than any grace that matters

# The longest that a reader is ever given; what ends later was written by a clock that was ahead.
LEASE_S_MAX = 3600.0
USE_S_MAX = 6 * 3600.0

# Until when something is held.
_UNTIL = (
    (schema.lease, schema.lease.c.until, LEASE_S_MAX),
    (schema.cached_use, schema.cached_use.c.until, USE_S_MAX),
)

# Since when something is so, in the rows that are waited for: a catalog is full of those that are not.
_SINCE = (
    (schema.checkpoint, schema.checkpoint.c.trashed_at, schema.checkpoint.c.state == State.TRASHED),
    (striptable.strip, striptable.strip.c.at, striptable.strip.c.state.in_(set(StripState) - {StripState.GONE})),
    (schema.experiment, schema.experiment.c.heartbeat_at, schema.experiment.c.status == ExperimentStatus.RUNNING),
    (schema.job, schema.job.c.queued_at, schema.job.c.state == JobState.QUEUED),
)


@dataclass(frozen=True, slots=True)
class Steady:
    """A clock that goes on from one look at another, wherever that is set to since."""

    clock: Clock
    at: datetime
    at_s: float

    def now(self) -> datetime:
        """Timezone-aware UTC wall time, as if nobody had set it since the look."""
        return self.at + timedelta(seconds=self.clock.monotonic_s() - self.at_s)

    def monotonic_s(self) -> float:
        """Seconds that never go backwards."""
        return self.clock.monotonic_s()


class WallClock:
    """Where the wall clock was at the last look, and what is owed to it.

    steady  what goes on from there
    owed    by how much it was set, and nothing was moved along yet
    known   whether what an earlier daemon left was looked through
    """

    def __init__(self, clock: Clock) -> None:
        """Trust the clock as it is."""
        self.steady = Steady(clock, clock.now(), clock.monotonic_s())
        self.owed = timedelta(0)
        self.known = False
        self._clock = clock

    def look(self) -> timedelta:
        """Look once more; return what is owed now."""
        was, self.steady = self.steady, Steady(self._clock, self._clock.now(), self._clock.monotonic_s())
        by = (self.steady.at - was.at) - timedelta(seconds=self.steady.at_s - was.at_s)
        if abs(by) > timedelta(seconds=STEP_S):
            log.warning("clock.stepped", by_s=by.total_seconds())
            self.owed += by
        return self.owed

    def settle(self, by: timedelta) -> None:
        """Everything was moved along by so much, and that is on the disk; a step found meanwhile is owed still."""
        self.owed -= by


async def shift(tx: Tx, by: timedelta) -> None:
    """Move every time that something is counted from or to by what the clock was set."""
    microseconds = by // timedelta(microseconds=1)
    for table, column, waited_for in _SINCE:
        moved = {column.name: type_coerce(column, BigInteger) + microseconds}
        await tx.conn.execute(update(table).where(waited_for).values(moved))
    for table, column, _ in _UNTIL:
        await tx.conn.execute(update(table).values({column.name: type_coerce(column, BigInteger) + microseconds}))
    # What an earlier daemon wrote by the right clock, before this machine began with a wrong one, is too far now.
    await clamp(tx, tx.clock.now())


async def clamp(tx: Tx, now: datetime) -> None:
    """Let nothing have begun after now, nor be held longer than a reader may: a clock was set, and no daemon saw it."""
    for table, column, waited_for in _SINCE:
        await tx.conn.execute(update(table).where(waited_for, column > now).values({column.name: now}))
    for table, column, longest_s in _UNTIL:
        latest = now + timedelta(seconds=longest_s)
        await tx.conn.execute(update(table).where(column > latest).values({column.name: latest}))
