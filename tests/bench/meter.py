"""CPU time and memory of whole process trees, from /proc."""

import os
import threading
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SAMPLE_S = 0.05


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name (index 0 is the state); empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def tree(root: int) -> list[int]:
    """Return `root` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _stat(int(entry))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def cpu_s(roots: list[int]) -> float:
    """CPU seconds, user and system, of the trees under `roots`, reaped children included."""
    pids = {pid for root in roots for pid in tree(root)}
    ticks = 0
    for pid in pids:
        fields = _stat(pid)
        if fields:
            ticks += sum(int(field) for field in fields[11:15])
    return ticks / TICKS_PER_S


def memory_bytes() -> int:
    """Memory in use that can't be given back: anonymous and shared pages of the whole machine.

    A page that two processes share (a memfd, /dev/shm) counts once, one nobody maps counts too,
    the page cache does not.
    """
    kilobytes = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in {"AnonPages", "Shmem"}:
            kilobytes += int(value.split()[0])
    return kilobytes << 10


class Peak:
    """Follows `memory_bytes()` in a thread and keeps the highest."""

    def __init__(self) -> None:
        """Start at what is in use now."""
        self.base_bytes = self.highest_bytes = memory_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.highest_bytes = max(self.highest_bytes, memory_bytes())

    def stop(self) -> int:
        """Return the highest growth over the start."""
        self._stop.set()
        self._thread.join()
        return self.highest_bytes - self.base_bytes
