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
