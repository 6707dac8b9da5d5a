"""What the file system under a root is, can do, and has left."""

import errno
import fcntl
import mmap
import os

from ckptd.errors import NotFound
from ckptd.worker import kernel
from ckptd.worker.context import Context
from ckptd.worker.protocol import Usage, Used

# f_type as statfs(2) and the kernel's magic.h list them.
_NAMES = {
    0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x01021994: "tmpfs", 0x6969: "nfs", 0xFF534D42: "cifs",
    0xFE534D42: "smb2", 0x65735546: "fuse", 0x794C7630: "overlay", 0x2FC12FC1: "zfs", 0xF2F52010: "f2fs",
    0x0BD00BD0: "lustre", 0x47504653: "gpfs", 0x19830326: "beegfs", 0x00C36400: "ceph", 0xCA451A4E: "bcachefs",
    0x01021997: "9p", 0x6A656A63: "virtiofs", 0x4D44: "vfat", 0x2011BAB0: "exfat", 0x858458F6: "ramfs",
    0x5346544E: "ntfs", 0x52654973: "reiserfs", 0x3153464A: "jfs", 0x5346414F: "afs", 0xAAD7AAEA: "panfs",
}  # fmt: skip
_BLOCK = 4096
_probed: dict[int, tuple[bool, bool]] = {}  # st_dev -> (direct_io, leases); a mount does not change its mind


def run(request: Usage, _context: Context) -> Used:
    """Measure the file system that `root` is on, or will be on once it is made."""
    fd = _open_nearest(request.root)
    try:
        facts = os.fstatvfs(fd)
        magic = kernel.filesystem_magic(fd)
        direct_io, leases = _probe(fd)
        unwritable = _unwritable(fd, read_only=bool(facts.f_flag & os.ST_RDONLY))
    finally:
        os.close(fd)
    return Used(
        total_bytes=facts.f_blocks * facts.f_frsize,
        free_bytes=facts.f_bavail * facts.f_frsize,
        filesystem=_NAMES.get(magic, f"{magic:#x}"),
        direct_io=direct_io,
        leases=leases,
        unwritable=unwritable,
    )


def _open_nearest(root: str) -> int:
    path = root
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            above = os.path.dirname(path.rstrip("/"))
            if not above:
                raise NotFound(f"nothing of {root!r} exists") from error
            path = above


def _unwritable(directory_fd: int, *, read_only: bool) -> str:
    if read_only:
        return "the file system is mounted read-only"
    # By the descriptor, so that it is this directory, and by the effective uid: that is who will write.
    allowed = os.access(f"/proc/self/fd/{directory_fd}", os.W_OK | os.X_OK, effective_ids=True)
    return "" if allowed else f"uid {os.geteuid()} may not write there"


def _probe(directory_fd: int) -> tuple[bool, bool]:
    """Try O_DIRECT and a lease on a file without a name: it leaves nothing behind, whatever happens.

    Where such files, or writing, are not to be had, both are taken as missing: neither is needed.
    """
    device = os.fstat(directory_fd).st_dev
    if device not in _probed:
        try:
            _probed[device] = (_writes_direct(directory_fd), _grants_leases(directory_fd))
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO}:
                return False, False  # says nothing about tomorrow
            _probed[device] = (False, False)
    return _probed[device]


def _nameless(directory_fd: int, flags: int) -> int:
    return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | flags, 0o600, dir_fd=directory_fd)


def _writes_direct(directory_fd: int) -> bool:
    try:
        fd = _nameless(directory_fd, os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    try:
        with mmap.mmap(-1, _BLOCK) as block:
            return os.pwrite(fd, block, 0) == _BLOCK
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(fd)


def _grants_leases(directory_fd: int) -> bool:
    """A write lease needs no second opening, and nobody else can have this file open."""
    fd = _nameless(directory_fd, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)
