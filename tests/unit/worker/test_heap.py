"""Freed memory goes back to the kernel; what was imported costs no more later than at the start."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptd.supervisor.unit import ENVIRON as MEMORY
from ckptd.worker import heap

MIB = 1 << 20
ENVIRON = os.environ | MEMORY
IS_GLIBC = pytest.mark.skipif(heap.TRIM is None, reason="the C library gives nothing back when asked")
THREADS = """
import ctypes, sys, threading
from ckptd.worker import heap
if sys.argv[1] == "bound":
    assert heap.bound()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
together = threading.Barrier(6)
def use():
    kept = [libc.malloc(5000) for _ in range(100)]
    together.wait()
    for each in kept:
        libc.free(each)
threads = [threading.Thread(target=use) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
said = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, said)
libc.fclose(said)
"""
STRINGS = """
import re, sys
from pathlib import Path
from ckptd import daemon
from ckptd.worker import heap
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
assert heap.bound()
if sys.argv[1] == "settled":
    heap.settle()
before = held()
for number in range(500_000):
    sys.intern(f"of a path {number}")
print(held() - before)
"""


def held_bytes() -> int:
    """Anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


@IS_GLIBC
def test_what_was_freed_below_something_that_stays_goes_back_to_the_kernel() -> None:
    pages = [b"x" * 60_000 for _ in range(1000)]  # below the size from which each would be a mapping of its own
    last = bytes(60_000)
    most = held_bytes()
    pages.clear()
    assert heap.give_back()
    assert held_bytes() < most - 40 * MIB
    assert sys.getsizeof(last) > 60_000


@IS_GLIBC
def test_what_hangs_in_a_cycle_goes_back_too() -> None:
    """At rest too little is allocated for the collector to come by itself."""

    class Holder:
        def __init__(self) -> None:
            self.itself, self.pages = self, [b"x" * 60_000 for _ in range(1000)]

    gc.disable()
    try:
        holder = Holder()
        most = held_bytes()
        del holder
        assert heap.give_back()
        assert held_bytes() < most - 40 * MIB
    finally:
        gc.enable()


def test_a_worker_gives_back_at_the_first_call_and_then_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    times_s = iter((100.0, 101.0, 100.0 + heap.SELDOM_S - 0.1, 100.0 + heap.SELDOM_S, 101.0 + heap.SELDOM_S))
    monkeypatch.setattr(heap, "time", SimpleNamespace(monotonic=lambda: next(times_s)))
    monkeypatch.setattr(heap, "give_back", lambda: True)
    seldom = heap.Seldom()
    assert [seldom.give_back() for _ in range(5)] == [True, False, False, True, False]


@IS_GLIBC
def test_threads_share_a_few_heaps(tmp_path: Path) -> None:
    def heaps(how: str) -> int:
        said = tmp_path / how
        subprocess.run([sys.executable, "-c", THREADS, how, str(said)], check=True, timeout=60)
        return said.read_text().count("<heap nr=")

    assert heaps("unbound") > heap.HEAPS_MAX
    assert heaps("bound") <= heap.HEAPS_MAX


def test_a_daemon_that_serves_has_its_modules_out_of_the_collectors_way(tmp_path: Path) -> None:
    """A full collection looks at what came since alone: none of it holds up the loop for tens of milliseconds."""
    script = (
        "import gc, sys\n"
        "from ckptd import daemon\n"
        "async def run(*_): print(gc.get_freeze_count(), len(gc.get_objects()))\n"
        "daemon.run = run\n"
        "sys.exit(daemon.main(['--state-dir', sys.argv[1], '--socket', sys.argv[1] + '/sock']))\n"
    )
    said = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=True, timeout=60)
    frozen, left = map(int, said.stdout.split())
    assert frozen > 50_000
    assert left < frozen / 10


@IS_GLIBC
def test_strings_that_come_and_go_cost_a_settled_daemon_nothing() -> None:
    """Unsettled, Python's table of interned strings is made anew, and larger, by and by."""

    def grown_kib(how: str) -> int:
        command = [sys.executable, "-c", STRINGS, how]
        return int(subprocess.run(command, capture_output=True, check=True, timeout=60, env=ENVIRON).stdout)

    assert grown_kib("unsettled") > 512
    assert grown_kib("settled") < 256
