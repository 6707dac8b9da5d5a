"""The real daemon with a wall clock that a file sets: SOAK_CLOCK names it, it holds seconds to add.

Freed memory goes back to the kernel sooner than once a minute, so that a rest of seconds shows what is in use. What
malloc says of it then lies beside the clock's file, with SQLite's share: what a process holds may grow by gaps that
nothing fits into, what it uses by caches that fill.

    python -P run_daemon.py [what `python -m ckptd.daemon` takes]

Monotonic time, and the wall clock of every other process, are left alone: so it is on a machine whose
clock somebody sets.
"""

import _sqlite3
import ctypes
import json
import os
import runpy
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ckptd import clock
from ckptd.intake import trimming
from ckptd.worker import heap

LOOK_S = 0.2
GIVEN_BACK_S = 2.0
IN_USE = ".in_use"  # behind the name of the clock's file
_FIGURES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


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


def sqlite_bytes() -> int:
    """What SQLite has allocated in this process, caches and compiled statements; 0 where it does not count."""
    library = ctypes.CDLL(_sqlite3.__file__)  # its symbols, and those of the library that it is linked to
    if not hasattr(library, "sqlite3_memory_used"):
        return 0
    library.sqlite3_memory_used.restype = ctypes.c_int64
    return int(library.sqlite3_memory_used())


class Info(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIGURES)


def telling(path: Path) -> None:
    """Have each `heap.give_back` leave what is in use, large mappings included, in this file."""
    look, give_back = ctypes.CDLL(None).mallinfo2, heap.give_back
    look.restype = Info

    def told() -> bool:
        given = give_back()
        found = look()
        said = {
            "in_use_bytes": found.uordblks + found.hblkhd,
            "sqlite_bytes": sqlite_bytes(),
        }
        beside = path.with_name(path.name + ".new")
        beside.write_text(json.dumps(said), encoding="ascii")
        beside.rename(path)
        return given

    heap.give_back = told


if __name__ == "__main__":
    steps = Set(os.environ["SOAK_CLOCK"])
    # A bound method is no descriptor: every clock that asks gets this one's time.
    clock.SystemClock.now = steps.now  # type: ignore[method-assign,assignment]
    trimming.EVERY_S = GIVEN_BACK_S
    if hasattr(ctypes.CDLL(None), "mallinfo2"):
        telling(Path(os.environ["SOAK_CLOCK"] + IN_USE))
    sys.argv[0] = "ckptd.daemon"
    runpy.run_module("ckptd.daemon", run_name="__main__", alter_sys=True)
