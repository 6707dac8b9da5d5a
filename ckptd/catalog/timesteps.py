"""Wall clocks are set: what is measured by one across restarts is moved along, so that nothing ends early or never.

Graces of the trash and leases of readers must outlive the daemon, so they are wall times. When the wall
clock and the monotonic one part by more than slewing explains, those times are moved by the difference
before anybody compares them with the new clock. Everything else that lasts is measured by the monotonic
clock, and what has an order has a sequence.
"""

from datetime import datetime, timedelta

import anyio
from sqlalchemy import BigInteger, type_coerce, update

from ckptd.catalog import schema
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.model import State

STEP_S = 30.0  # since the last look; more than any clock is slewed, less than any grace that matters

_checkpoint = schema.checkpoint.c
_lease = schema.lease.c


class WallClock:
    """Where the wall clock should be by now, from where it was at the last look.

    owed   by how much it was set, and nothing was moved along yet; whoever moves it holds `turn`
    known  whether what an earlier daemon left was looked through
    """

    def __init__(self, clock: Clock) -> None:
        """Trust the clock as it is."""
        self.owed = timedelta(0)
        self.known = False
        self.turn = anyio.Lock()
        self._clock = clock
        self._at = clock.now()
        self._at_s = clock.monotonic_s()

    def look(self) -> timedelta:
        """Look once more; return what is owed now."""
        at, at_s = self._clock.now(), self._clock.monotonic_s()
        by = (at - self._at) - timedelta(seconds=at_s - self._at_s)
        self._at, self._at_s = at, at_s
        if abs(by) > timedelta(seconds=STEP_S):
            self.owed += by
        return self.owed


async def shift(tx: Tx, by: timedelta) -> None:
    """Move the times that graces and leases are counted from by what the clock was set."""
    microseconds = by // timedelta(microseconds=1)
    moved = type_coerce(_checkpoint.trashed_at, BigInteger) + microseconds
    await tx.conn.execute(update(schema.checkpoint).where(_checkpoint.state == State.TRASHED).values(trashed_at=moved))
    await tx.conn.execute(update(schema.lease).values(until=type_coerce(_lease.until, BigInteger) + microseconds))
    used = type_coerce(schema.cached_use.c.until, BigInteger) + microseconds
    await tx.conn.execute(update(schema.cached_use).values(until=used))


async def clamp(tx: Tx, now: datetime) -> None:
    """Let graces that would begin in the future begin now: the clock was set back while no daemon looked."""
    future = (_checkpoint.state == State.TRASHED, _checkpoint.trashed_at > now)
    await tx.conn.execute(update(schema.checkpoint).where(*future).values(trashed_at=now))
