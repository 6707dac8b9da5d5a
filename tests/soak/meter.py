"""Memory, descriptors and threads of every process of ckptd, again and again while a soak runs."""

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

FIELDS = {"RssAnon:": "anon", "RssFile:": "file", "RssShmem:": "shmem"}
ROLES = {
    "run_node.py": "supervisor",
    "run_daemon.py": "daemon",
    "ckptd.daemon": "daemon",
    "ckptd.worker": "worker",
    "ckptd.worker.parser": "parser",
    "ckptd.hooks.host": "host",
}
PASSING = frozenset({"parser", "host", "other"})  # come when something is asked of them, and go


@dataclass(frozen=True)
class Sample:
    """All processes at one moment; `arenas_bytes` counts each arena once, whoever maps it.

    anon_by_role  supervisor, daemon, worker: the processes that live on; and those that come and go
    descriptors_by_role  likewise
    """

    at_s: float
    processes: int
    rss_bytes: int
    anon_bytes: int
    arenas_bytes: int
    descriptors: int  # without those of arenas
    threads: int
    in_use_bytes: int = 0  # of the daemon, as malloc says; 0 where it does not
    sqlite_bytes: int = 0  # of them, SQLite's; likewise
    anon_by_role: dict[str, int] = field(default_factory=dict)
    descriptors_by_role: dict[str, int] = field(default_factory=dict)

    @property
    def lasting_bytes(self) -> int:
        """Anonymous memory of the processes that live as long as the node."""
        return sum(size for role, size in self.anon_by_role.items() if role not in PASSING)


def role_of(pid: int) -> str:
    """What a process of ckptd is there for, by its command line."""
    words = [os.path.basename(word) for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]
    return next((ROLES[word] for word in words if word in ROLES), "other")


def memory_by_role(pids: list[int]) -> dict[str, int]:
    """Resident bytes by role and kind: "daemon anon", "worker file"; of these processes now."""
    found: Counter[str] = Counter()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                name, _, value = line.partition("\t")
                if name in FIELDS:
                    found[f"{role_of(pid)} {FIELDS[name]}"] += int(value.split()[0]) << 10
    return dict(found)


def sample(pids: list[int], began_s: float) -> Sample:
    """Look at these processes; one that ends meanwhile counts for what was seen of it."""
    totals = dict.fromkeys(FIELDS.values(), 0)
    roles: Counter[str] = Counter()
    descriptors: Counter[str] = Counter()
    threads = 0
    arenas: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                name, _, value = line.partition("\t")
                if name in FIELDS:
                    totals[FIELDS[name]] += int(value.split()[0]) << 10
                if name == "RssAnon:":
                    roles[role_of(pid)] += int(value.split()[0]) << 10
                elif name == "Threads:":
                    threads += int(value)
            descriptors[role_of(pid)] += _descriptors(pid, arenas)
    return Sample(
        at_s=time.monotonic() - began_s,
        processes=len(pids),
        rss_bytes=sum(totals.values()),
        anon_bytes=totals["anon"],
        arenas_bytes=sum(arenas.values()),
        descriptors=descriptors.total(),
        threads=threads,
        anon_by_role=dict(roles),
        descriptors_by_role=dict(descriptors),
    )


def _descriptors(pid: int, arenas: dict[int, int]) -> int:
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        with contextlib.suppress(OSError):
            if "memfd:ckptd-arena" in os.readlink(path):
                facts = os.stat(path)
                arenas[facts.st_ino] = facts.st_blocks * 512
            else:
                found += 1
    return found


class Meter:
    """with Meter(pids, every_s) as meter: meter.samples"""

    def __init__(self, pids: Callable[[], list[int]], every_s: float) -> None:
        self._pids, self._every_s = pids, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.began_s = time.monotonic()
        self.samples: list[Sample] = []

    def now(self) -> Sample:
        """Look at once."""
        return sample(self._pids(), self.began_s)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            self.samples.append(self.now())

    def plain(self) -> list[dict[str, Any]]:
        """The samples, for a file."""
        return [asdict(one) for one in self.samples]
