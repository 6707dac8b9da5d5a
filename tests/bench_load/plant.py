"""The node that carries the load: production settings, no fail points, and a gauge on all its processes."""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.support.onlooker import Onlooker

SAMPLE_S = 0.25
CONNECTIONS_MAX = 2048  # one user plays a thousand; the limit of one uid is 256 otherwise
CONFIG = """\
[arenas]
bytes_max = {arena_bytes}
[intake]
connections_per_uid_max = {connections_max}
{more}
"""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Plant(Onlooker):
    """A node as a user runs it."""

    prefix: tuple[str, ...] = ("env", "-u", "CKPTD_FAIL")
    timing: dict[str, float] = field(default_factory=dict)

    def configure(self, more: str | None = None) -> None:
        """Write the configuration: defaults, but for the number of connections of one user."""
        self.more = self.more if more is None else more
        text = CONFIG.format(arena_bytes=self.arena_bytes, connections_max=CONNECTIONS_MAX, more=self.more)
        (self.dir / "toml").write_text(text)

    def carriers(self) -> list[int]:
        """The daemon and its workers: everything below the supervisor."""
        return self.family()


@contextmanager
def planted(folder: Path | None = None, *, more: str = "") -> Iterator[Plant]:
    """A plant that is not started yet, in a directory of its own; every process of it ends with the block."""
    directory = Path(tempfile.mkdtemp(prefix="ck", dir=folder))
    plant = Plant(directory, more=more)
    plant.state.mkdir()
    try:
        yield plant
    finally:
        plant.clean_up()
        shutil.rmtree(directory, ignore_errors=True)


@dataclass
class Spent:
    """What processes used between two looks."""

    wall_s: float
    cpu_s: float
    wakeups: int


class Gauge:
    """with Gauge(plant) as gauge: the most memory, WAL and descriptors that were seen meanwhile."""

    def __init__(self, plant: Plant) -> None:
        self._plant = plant
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.rss_bytes = 0
        self.wal_bytes = 0
        self.samples = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        self.rss_bytes = max(self.rss_bytes, rss_bytes(self._plant.carriers()))
        with contextlib.suppress(FileNotFoundError):
            wal = (self._plant.state / "catalog.sqlite-wal").stat().st_size
            self.wal_bytes = max(self.wal_bytes, wal)
        self.samples += 1


def rss_bytes(pids: list[int]) -> int:
    """Resident bytes of all these processes; what two of them map counts twice."""
    return sum(_status_kib(pid, "VmRSS:") for pid in pids) << 10


def _status_kib(pid: int, field_name: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0  # ended between the listing and the look
    return int((text.partition(field_name)[2].split() or ["0"])[0])


def descriptors(pids: list[int]) -> int:
    """Open descriptors of all these processes."""
    found = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            found += len(os.listdir(f"/proc/{pid}/fd"))
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _used(pids: list[int]) -> tuple[float, int]:
    """CPU seconds and wake-ups (voluntary switches of every thread) of the processes so far."""
    used_s, wakeups = 0.0, 0
    for pid in pids:
        used_s += cpu_s(pid)
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/task/{task}/status").read_text()
                wakeups += int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return used_s, wakeups


def spent(pids: list[int], over_s: float, over: Callable[[], bool] | None = None) -> Spent:
    """What the processes use in the next `over_s` seconds, or until `over` says so; nobody asks them anything meanwhile."""
    before, begun_s = _used(pids), time.monotonic()
    if over is None:
        time.sleep(over_s)
    else:
        while time.monotonic() - begun_s < over_s and not over():
            time.sleep(SAMPLE_S)
    after, wall_s = _used(pids), time.monotonic() - begun_s
    return Spent(wall_s, after[0] - before[0], after[1] - before[1])
