"""Memory that the daemon has freed goes back to the kernel now and then (worker/heap.py says why it has to be told)."""

import time

import anyio
import anyio.to_thread
import structlog

from ckptd.worker import heap

log = structlog.get_logger()

EVERY_S = 60.0  # an idle daemon has few wake-ups to spend


async def run() -> None:
    """Give back what is free, again and again until cancelled, in a thread."""
    while True:
        await anyio.sleep(EVERY_S)
        begun_s = time.monotonic()
        given = await anyio.to_thread.run_sync(heap.give_back)
        log.debug("memory.given_back", given=given, ms=round((time.monotonic() - begun_s) * 1000, 1))
