"""Ends the work of this process before its n-th operation on a file system, or leaves one fsync out.

    with Interrupter(at=7, strike=disk.cut) as watched: protocol.act(stage)

Operations are the calls that change a file system, and the named fail points between them. `strike` is
what happens before the one that is `at`: a power cut, or a SIGKILL to this process itself.
"""

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, Self

from ckptd import failpoint
from ckptd.worker import kernel

CALLS = (
    "mkdir", "rmdir", "unlink", "rename", "link", "symlink", "ftruncate", "posix_fallocate", "fchmod",
    "write", "pwrite", "pwritev", "fsync", "fdatasync",
)  # fmt: skip
KERNEL = ("renameat2", "fallocate", "sync_file_range")
WRAPPERS = {"fsync_file", "fsync_directory", "sync_directory"}  # who calls these is the one who syncs


class Interrupted(BaseException):
    """Nothing of this process may go on; like death, it is no Exception."""


class Interrupter:
    """Watches everything that a block does to file systems. Not for two blocks at once."""

    def __init__(
        self, at: int | None = None, strike: Callable[[], None] | None = None, *, skip: Collection[int] = ()
    ) -> None:
        """Strike before operation `at` (counted from 0); leave the fsyncs with the numbers `skip` out."""
        self.operations: list[str] = []
        self.syncs: list[str] = []  # who asked for the n-th fsync: "publish._write_manifest"
        self.struck = False
        self._at, self._strike, self._skip = at, strike, skip
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for owner, names in ((os, CALLS), (kernel, KERNEL), (failpoint, ("hit",))):
            for name in names:
                self._before.append((owner, name, getattr(owner, name)))
                setattr(owner, name, self._watched(name, getattr(owner, name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        for owner, name, before in self._before:
            setattr(owner, name, before)
        # Whatever comes out after the strike is what the dead would have met.
        return self.struck and error is not None

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **more: Any) -> Any:
            if self.struck:
                return call(*given, **more)
            label = f"point {given[0]}" if name == "hit" else name
            if label == "point ":
                return None
            with self._lock:
                number = len(self.operations)
                self.operations.append(label)
            if number == self._at:
                self.struck = True
                assert self._strike is not None
                self._strike()
                raise Interrupted
            if name in {"fsync", "fdatasync"} and self._left_out():
                return None
            return call(*given, **more)

        return watched

    def _left_out(self) -> bool:
        who = _caller()
        self._seen[who] += 1
        self.syncs.append(f"{who} #{self._seen[who]}")
        return len(self.syncs) - 1 in self._skip


def _caller() -> str:
    frame = sys._getframe(3)
    while frame.f_back is not None and frame.f_code.co_name in WRAPPERS:
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename).removesuffix('.py')}.{frame.f_code.co_name}"
