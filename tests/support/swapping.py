"""A name that leads elsewhere from one moment to the next, under whoever walks along it."""

import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptd.worker import kernel


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[list[int]]:
    """Another thread exchanges two names as fast as it can: an atomic swap of a directory for a symlink and back."""
    stop, swaps, rng = threading.Event(), [0], random.Random(1)
    at = os.open(one.parent, os.O_RDONLY)

    def run() -> None:
        while not stop.is_set():
            with suppress(FileNotFoundError):
                kernel.renameat2((at, one.name), (at, other.name), kernel.RENAME_EXCHANGE)
                swaps[0] += 1
            time.sleep(rng.random() * 0.0002)  # else both threads take turns, and each look finds the same name

    thread = threading.Thread(target=run)
    thread.start()
    begun_s = time.monotonic()
    # On a busy machine the whole could be over before the first.
    while not swaps[0] and time.monotonic() - begun_s < 30:
        time.sleep(0.001)
    try:
        yield swaps
    finally:
        stop.set()
        thread.join()
        os.close(at)
    assert swaps[0] > 0


def turns(rounds: int, got: list[int]) -> Iterator[int]:
    """So many, and on until one got through: the thread that swaps may stand still with the names the wrong way round."""
    until_s = time.monotonic() + 60
    for turn in itertools.count():
        if turn >= rounds:
            if got or time.monotonic() > until_s:
                return
            time.sleep(0.001)
        yield turn
