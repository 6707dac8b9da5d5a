"""Freed memory goes back to the kernel."""

import sys
from pathlib import Path

import pytest

from ckptd.intake import heap

MIB = 1 << 20


def held_bytes() -> int:
    """Anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


@pytest.mark.skipif(not hasattr(heap._libc, "malloc_trim"), reason="the C library gives nothing back when asked")
def test_what_was_freed_below_something_that_stays_goes_back_to_the_kernel() -> None:
    pages = [bytes(60_000) for _ in range(1000)]  # below the size from which each would be a mapping of its own
    last = bytes(60_000)
    most = held_bytes()
    pages.clear()
    heap.give_back()
    assert held_bytes() < most - 40 * MIB
    assert sys.getsizeof(last) > 60_000
