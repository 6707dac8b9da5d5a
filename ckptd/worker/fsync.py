"""fsync, and what its failure means: the only code under a storage root that calls it."""

import errno
import os
from collections import OrderedDict
from collections.abc import Callable

from ckptd import failpoint
from ckptd.errors import DiskFault
from ckptd.worker import kernel
from ckptd.worker.fault import coded

_FAILED_MAX = 4096

# Files and directories whose fsync failed: (dev, ino, mtime_ns). A write, or another name in the
# directory, changes the last, another inode all three.
_failed: OrderedDict[tuple[int, int, int], None] = OrderedDict()


class FsyncFailed(DiskFault):
    """fsync failed: what was written may be lost although the page cache still shows it."""


class FailedEarlier(FsyncFailed):
    """Nothing has changed since an fsync failed, so it was not called again."""


def fsync_file(fd: int, point: str = "") -> None:
    """Make a file's bytes durable. FsyncFailed is final: write the bytes again to a new inode.

    After a failed fsync the kernel marks the lost pages clean, and a second fsync of the same file
    succeeds although the bytes are gone. So a failure is remembered by inode, and only a write to
    it (which moves its mtime) or another inode lets fsync be called again.
    """
    key = _never_failed(fd, "an earlier fsync of this file failed; its bytes may be lost")
    try:
        os.fsync(fd)
        failpoint.hit(point)
    except OSError as error:
        _remember(key)
        raise _fsync_error(error) from error


def fsync_directory(fd: int, point: str = "", change: Callable[[int], None] | None = None) -> None:
    """Make the names in a directory durable. EINVAL (the file system can't) passes, EIO never.

    FsyncFailed is final for the names that are there now, as it is for a file's bytes: whoever made
    one takes it back and makes it again, which lets fsync be called again. For names that were there
    before, `change` changes the directory, so that its entries are written again: without it one bad
    moment of a disk would end a root for good.
    """
    why = "an earlier fsync of this directory failed; names in it may be lost"
    try:
        key = _never_failed(fd, why)
    except FailedEarlier as earlier:
        if change is None:
            raise
        try:
            change(fd)
        except OSError:
            raise earlier from None  # we may not write there, or there is still no space
        key = _never_failed(fd, why)
    try:
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        failpoint.hit(point)
    except OSError as error:
        _remember(key)
        raise _fsync_error(error) from error


def _never_failed(fd: int, otherwise: str) -> tuple[int, int, int]:
    facts = os.fstat(fd)
    key = (facts.st_dev, facts.st_ino, facts.st_mtime_ns)
    if key in _failed:
        raise FailedEarlier(otherwise, errno="EIO")
    return key


def _remember(key: tuple[int, int, int]) -> None:
    _failed[key] = None
    while len(_failed) > _FAILED_MAX:
        _failed.popitem(last=False)


def _fsync_error(error: OSError) -> Exception:
    if error.errno == errno.EIO:
        return FsyncFailed(f"fsync: {error.strerror}", errno="EIO")
    return coded(error) or error


def start_writeback(fd: int, offset: int, size_bytes: int) -> None:
    """Let a range go to the disk in the background. Promises nothing; FsyncFailed as from fsync."""
    _writeback(fd, (offset, size_bytes), kernel.SYNC_WRITE)


def await_writeback(fd: int, offset: int, size_bytes: int) -> None:
    """Wait until a range has gone to the disk's own cache. Still needs fsync; FsyncFailed as from it."""
    _writeback(fd, (offset, size_bytes), kernel.SYNC_WAIT_BEFORE | kernel.SYNC_WRITE | kernel.SYNC_WAIT_AFTER)


def _writeback(fd: int, span: tuple[int, int], flags: int) -> None:
    key = _never_failed(fd, "an earlier fsync of this file failed; its bytes may be lost")
    try:
        kernel.sync_file_range(fd, *span, flags)
    except OSError as error:
        # A failed writeback is told to a descriptor once: fsync might not say it again, so we remember.
        _remember(key)
        raise _fsync_error(error) from error
