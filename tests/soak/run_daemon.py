"""The real daemon with a wall clock that a file sets: SOAK_CLOCK names it, it holds seconds to add.

Freed memory goes back to the kernel sooner than once a minute, so that a rest of seconds shows what is in use.

    python -P run_daemon.py [what `python -m ckptd.daemon` takes]

Monotonic time, and the wall clock of every other process, are left alone: so it is on a machine whose
clock somebody sets.
"""

import os
import runpy
import sys
import time
from datetime import UTC, datetime, timedelta

from ckptd import clock
from ckptd.intake import trimming

LOOK_S = 0.2
GIVEN_BACK_S = 2.0


class Set:
    """The seconds in the file, read anew every LOOK_S."""

    def __init__(self, path: str) -> None:
        self._path, self._seconds, self._until_s = path, 0.0, 0.0

    def now(self) -> datetime:
        """Aware UTC wall time."""
        if time.monotonic() >= self._until_s:
            self._until_s = time.monotonic() + LOOK_S
            with open(self._path, encoding="ascii") as file:
                self._seconds = float(file.read() or "0")
        return datetime.now(UTC) + timedelta(seconds=self._seconds)


if __name__ == "__main__":
    steps = Set(os.environ["SOAK_CLOCK"])
    # A bound method is no descriptor: every clock that asks gets this one's time.
    clock.SystemClock.now = steps.now  # type: ignore[method-assign,assignment]
    trimming.EVERY_S = GIVEN_BACK_S
    sys.argv[0] = "ckptd.daemon"
    runpy.run_module("ckptd.daemon", run_name="__main__", alter_sys=True)
