"""A FUSE file system that passes everything on to a directory, and falls asleep in the operations it is told to.

    python run_sleepy_disk.py BACKING MOUNTPOINT CONTROL     runs until it is unmounted

While CONTROL holds names of operations ("getattr read flush"), those do not return; emptied, they go on.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mfusepy

LOOK_S = 0.02


class Sleepy(mfusepy.Operations):
    """Every path is below the backing directory."""

    use_ns = True

    def __init__(self, backing: str, control: Path) -> None:
        self._backing = backing
        self._control = control

    def nap(self, operation: str) -> None:
        """Return once this operation is not on the list."""
        while operation in self._control.read_text().split():
            time.sleep(LOOK_S)

    def _at(self, path: str) -> str:
        return self._backing + path

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._at(path))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino", "st_blocks")
        times = {f"st_{kind}time": getattr(found, f"st_{kind}time_ns") for kind in "amc"}
        return {**{name: getattr(found, name) for name in names}, **times}

    def readdir(self, path: str, fh: int) -> Any:
        with os.scandir(self._at(path)) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        return [(name, {"st_mode": facts.st_mode, "st_ino": facts.st_ino}, 0) for name, facts in found]

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._at(path))
        return {name: getattr(found, name) for name in ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize")}

    def open(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags & ~(os.O_DIRECT | os.O_NOFOLLOW))

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._at(path), length)
        return 0

    def flush(self, path: str, fh: int) -> int:
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._at(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._at(path))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._at(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._at(old), self._at(new))
        return 0

    def link(self, target: str, source: str) -> int:
        os.link(self._at(source), self._at(target), follow_symlinks=False)
        return 0

    def symlink(self, target: str, source: str) -> int:
        os.symlink(source, self._at(target))
        return 0

    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._at(path), mode)
        return 0

    def utimens(self, path: str, times: Any = None) -> int:
        return 0


def _napping(operation: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Sleepy, *given: Any) -> Any:
        self.nap(operation)
        return work(self, *given)

    return call


for _name, _work in list(vars(Sleepy).items()):
    if callable(_work) and not _name.startswith("_") and _name != "nap":
        setattr(Sleepy, _name, _napping(_name, _work))


class Mount(mfusepy.FUSE):  # type: ignore[misc]
    """The library forgets what renameat2 was told: a file system that does not know its flags must say so."""

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
        if flags:
            raise mfusepy.FuseOSError(errno.EINVAL)
        return int(self.rename_fuse_2(old, new))


def main() -> None:
    backing, mountpoint, control = sys.argv[1:]
    # No cache of the kernel's own: every look must come here, as on a network file system whose server may be gone.
    options = {"attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0, "use_ino": True}
    Mount(Sleepy(backing, Path(control)), mountpoint, foreground=True, nothreads=False, **options)


if __name__ == "__main__":
    main()
