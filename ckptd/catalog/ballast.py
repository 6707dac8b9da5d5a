"""A reserve of disk space beside the catalog: on a full disk even a DELETE needs pages to write.

The file is filled when the catalog opens, emptied when a write meets a full disk (the write is then
tried once more: retention can record what it removes), and filled again later, when there is room.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

import anyio.to_thread

# Filling must leave at least as much again, or the reserve itself would fill the disk.
ROOM_FACTOR = 2

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Ballast:
    """The reserve of one catalog. Its methods may touch the state directory's disk, in a thread."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Name the file; nothing is written yet. `size_bytes` 0: no reserve."""
        self.size_bytes = size_bytes
        self.whole = size_bytes == 0
        self._path = path

    async def fill(self) -> bool:
        """Reserve the space if there is room; say whether the reserve is whole."""
        self.whole = await anyio.to_thread.run_sync(self._fill)
        return self.whole

    async def release(self) -> bool:
        """Give the space back; False when there was none to give."""
        self.whole = self.size_bytes == 0
        return await anyio.to_thread.run_sync(self._release)

    def _fill(self) -> bool:
        if self.size_bytes == 0:
            return True
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(fd).st_blocks * 512 >= self.size_bytes:
                return True
            disk = os.fstatvfs(fd)
            if disk.f_bavail * disk.f_frsize < self.size_bytes * ROOM_FACTOR:
                return False
            os.posix_fallocate(fd, 0, self.size_bytes)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            os.ftruncate(fd, 0)
            return False
        else:
            return True
        finally:
            os.close(fd)

    def _release(self) -> bool:
        with suppress(FileNotFoundError):
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                held = os.fstat(fd).st_blocks > 0
                os.ftruncate(fd, 0)
                os.fsync(fd)  # blocks are free for others only once the truncation is on the disk
                return held
            finally:
                os.close(fd)
        return False
