"""What the walk through a heap says of a process whose heap is known."""

import os
import platform
import subprocess
import sys

import pytest

from ckptd.supervisor.unit import ENVIRON
from ckptd.worker import heap as own
from tests.soak import heap

COUNT = 2000
HOLDER = f"""
import sys
class Pin(bytes): pass
kept, between = [], []
for _ in range({COUNT}):
    between.append(bytes(6000))
    kept.append(Pin(1000))
between.clear()
from ckptd.worker import heap
assert heap.bound() and heap.give_back()
print("here", flush=True)
sys.stdin.read()
"""
pytestmark = [
    pytest.mark.skipif(own.TRIM is None or platform.machine() != "x86_64", reason="another malloc, or another layout"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root is told which pages are the kernel's page of zeros"),
]


def test_small_things_between_large_ones_that_are_gone_are_named_with_the_pages_that_they_hold():
    command = [sys.executable, "-c", HOLDER]
    environ = os.environ | ENVIRON
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout.readline() == b"here\n"
        found = heap.look(process.pid)
        process.stdin.close()
    assert process.returncode == 0
    pins = found.holders["Pin"]
    assert COUNT / 2 < pins.count <= COUNT, "the others lie in pages that are more than half in use"
    assert pins.gap_bytes > pins.count * heap.PAGE_BYTES / 2
    largest = heap.render(found, 1).splitlines()[-1]
    assert f"{pins.count} of Pin" in largest
    assert found.used_bytes < found.resident_bytes
