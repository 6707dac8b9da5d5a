"""Memory that the process has freed goes back to the kernel, at once or now and then.

Pages of long lists pass through each thread that reads the catalog, and glibc gives each thread a heap of its own.
What was freed below something that stays is kept there for as long as the process lives: so a daemon would hold
the most that it ever needed, in each thread, and grow for hours.
"""

import ctypes
import time

import anyio
import anyio.to_thread
import structlog

log = structlog.get_logger()

EVERY_S = 60.0  # an idle daemon has few wake-ups to spend
HEAPS_MAX = 2  # not eight for each core: threads here wait for SQLite, not for malloc
MAPPED_FROM_BYTES = (
    128 << 10
)  # a block of this size is a mapping of its own; else glibc raises that to 32 MiB by and by
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of glibc

_libc = ctypes.CDLL(None)
_TRIM = getattr(_libc, "malloc_trim", None)  # glibc's alone


def bound() -> None:
    """Let all threads share a few heaps, and large blocks go back when they are freed. To be called before there are threads."""
    if _TRIM is None:
        return  # another C library, whose numbers mean something else
    for option, value in ((_M_ARENA_MAX, HEAPS_MAX), (_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)):
        if not _libc.mallopt(option, value):
            log.debug("memory.unbound", option=option, value=value)


async def run() -> None:
    """Give back what is free, again and again until cancelled, in a thread."""
    while True:
        await anyio.sleep(EVERY_S)
        await anyio.to_thread.run_sync(give_back)


def give_back() -> None:
    """Return what is free to the kernel, of all heaps. Blocks for some milliseconds, without the interpreter's lock."""
    if _TRIM is None:
        return
    begun_s = time.monotonic()
    given = _TRIM(ctypes.c_size_t(0))
    log.debug("memory.given_back", given=bool(given), ms=round((time.monotonic() - begun_s) * 1000, 1))
