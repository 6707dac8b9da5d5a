"""Time, injected. The only module that reads a clock; tests hand in their own."""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Wall time for people and ordering hints; monotonic time for every duration."""

    def now(self) -> datetime:
        """Timezone-aware UTC wall time."""

    def monotonic_s(self) -> float:
        """Seconds that never go backwards."""


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        """Timezone-aware UTC wall time."""
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary point, never going backwards."""
        return time.monotonic()


async def tick(period_s: float) -> None:
    """Sleep until the loop's next whole multiple of `period_s`, so that all who look as often share one wake-up."""
    import anyio  # noqa: PLC0415 - the CLI reads clocks too, and starts without an event loop

    await anyio.sleep(to_tick_s(period_s))


def to_tick_s(period_s: float) -> float:
    """Return the seconds to the loop's next whole multiple of `period_s`, for a wait that something else may end."""
    import anyio  # noqa: PLC0415 - as above

    left_s = period_s - anyio.current_time() % period_s
    # Timers may end a little early: that was this tick, not the one before it.
    return left_s if left_s > period_s / 10 else left_s + period_s
