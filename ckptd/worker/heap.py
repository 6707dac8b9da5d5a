"""Memory of a process, daemon or worker: few heaps, what is free goes back to the kernel, what was imported is settled.

glibc gives each thread a heap of its own. What was freed below something that stays is kept there for as long as
the process lives: so it would hold the most that it ever needed, in each thread, and grow for hours.
"""

import ctypes
import gc
import sys
import threading
import time

HEAPS_MAX = 2  # not eight for each core: threads here wait for disks and databases, not for malloc
# A block of this size is a mapping of its own. glibc would raise that to 32 MiB by and by.
MAPPED_FROM_BYTES = 128 << 10
# More than Python's table of interned strings takes in before it is made anew: two thirds of 2 ** 16 slots, where what
# the daemon imports leaves it.
INTERNED = 1 << 16
SELDOM_S = 60.0
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of glibc

_libc = ctypes.CDLL(None)
TRIM = getattr(_libc, "malloc_trim", None)  # glibc's alone


def bound() -> bool:
    """Let all threads share a few heaps; say whether the C library does so. To be called before there are threads."""
    if TRIM is None:
        return False  # another C library, whose numbers mean something else
    shared = _libc.mallopt(_M_ARENA_MAX, HEAPS_MAX)
    mapped = _libc.mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
    return bool(shared and mapped)


def give_back() -> bool:
    """Return what nobody refers to any more, and what is free, to the kernel; say whether it was anything.

    Blocks for some milliseconds, the collector's with the GIL: 7 to 9 in a daemon at rest, 50 under load. A task that
    failed hangs in a cycle with its traceback, and Python keeps what it freed last on lists of its own: at rest
    nothing would ever end either, and what else is allocated meanwhile comes to lie in between.
    """
    gc.collect()
    return TRIM is not None and bool(TRIM(ctypes.c_size_t(0)))


class Seldom:
    """Gives back at the first call, and at most each SELDOM_S after it. For those without a timer; any thread may call."""

    def __init__(self) -> None:
        """Nothing was given back yet."""
        self._next_s = 0.0
        self._turn = threading.Lock()

    def give_back(self) -> bool:
        """Give back when it is time for it; say whether it was anything. Blocks as heap.give_back does."""
        now_s = time.monotonic()
        with self._turn:
            if now_s < self._next_s:
                return False
            self._next_s = now_s + SELDOM_S
        return give_back()


def settle() -> None:
    """Take now what imports cost for good, and have the collector pass over them: to be called when all was imported.

    A full collection looks at each object that lives, and nothing else runs meanwhile. The 95,000 of the daemon's
    modules are 30 to 60 ms in which no trainer is answered, each few seconds under load.

    Each path interns its parts, and a slot of that table is not used again when its string is gone: after half an hour
    of load it was made anew, for three times the strings that live, and a daemon grew by a megabyte. So that comes first.
    """
    for number in range(INTERNED):
        sys.intern(f"ckptd interned {number}")
    gc.freeze()
