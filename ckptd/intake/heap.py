"""Memory that the process has freed goes back to the kernel now and then.

Pages of long lists pass through each thread that reads the catalog, and each has a heap of its own
in the C library. What was freed below something that stays is kept there for as long as the process lives:
so a daemon would hold the most that it ever needed, in each thread, and seem to grow for hours.
"""

import ctypes
import time

import anyio
import anyio.to_thread
import structlog

log = structlog.get_logger()

EVERY_S = 60.0  # an idle daemon has few wake-ups to spend

_libc = ctypes.CDLL(None)
_TRIM = getattr(_libc, "malloc_trim", None)  # glibc's alone


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
