"""What the daemon needs no more is freed now and then, and goes back to the kernel (worker/heap.py says why that has to be told)."""

import time
from collections.abc import Callable

import anyio
import anyio.to_thread
import structlog

from ckptd.worker import heap

log = structlog.get_logger()

EVERY_S = 60.0  # an idle daemon has few wake-ups to spend


async def run(free: Callable[[], None]) -> None:
    """Call `free` and give back what is free, again and again until cancelled, the latter in a thread."""
    while True:
        await anyio.sleep(EVERY_S)
        free()
        begun_s = time.monotonic()
        given = await anyio.to_thread.run_sync(heap.give_back)
        log.debug("memory.given_back", given=given, ms=round((time.monotonic() - begun_s) * 1000, 1))
