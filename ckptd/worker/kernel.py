"""System calls that Python has no function for. Thin: numbers in, OSError out.

ctypes lets go of the GIL for the length of a call, so a slow one stops no other thread.
"""

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_MACHINE = os.uname().machine
_RENAMEAT2 = {"x86_64": 316, "ppc64le": 357, "s390x": 347}.get(_MACHINE, 276)
_IOPRIO_SET = {"x86_64": 251, "ppc64le": 273, "s390x": 282}.get(_MACHINE, 30)
_SETGROUPS = {"x86_64": 116, "ppc64le": 81, "s390x": 206}.get(_MACHINE, 159)
_OPENAT2 = 437  # the same on every machine, as all calls since 2019

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 1, 2, 4, 8
SYNC_WAIT_BEFORE, SYNC_WRITE, SYNC_WAIT_AFTER = 1, 2, 4
MADV_POPULATE_READ = 22

_IOPRIO_WHO_PROCESS = 1
_PR_SET_PDEATHSIG = 1
_IOPRIO_IDLE = 3 << 13
_HOW = struct.Struct("=QQQ")
_STATFS_BYTES = 256
_NO_ID = 0xFFFFFFFF


def _checked(result: int, path: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends: a stopped one hears nothing else."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def openat2(directory: int, path: str, flags: int, *, mode: int = 0, resolve: int) -> int:
    """Open `path` below `directory` under RESOLVE_* rules. OSError EAGAIN: a rename raced, try again."""
    how = _HOW.pack(flags | os.O_CLOEXEC, mode, resolve)
    return _checked(_syscall(_OPENAT2, directory, os.fsencode(path), how, ctypes.c_size_t(len(how))), path)


def renameat2(old: tuple[int, str], new: tuple[int, str], flags: int) -> None:
    """Rename (directory fd, name) to (directory fd, name). OSError ENOSYS or EINVAL: not on this file system."""
    (old_fd, old_name), (new_fd, new_name) = old, new
    _checked(
        _syscall(_RENAMEAT2, old_fd, os.fsencode(old_name), new_fd, os.fsencode(new_name), ctypes.c_uint(flags)),
        new_name,
    )


def fallocate(fd: int, size_bytes: int) -> bool:
    """Reserve space for `size_bytes` and make that the file's size. False: this file system can't.

    Not posix_fallocate: where a file system can't, the C library would write a byte into every block.
    """
    result = _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes))
    if result < 0 and ctypes.get_errno() in {errno.EOPNOTSUPP, errno.ENOSYS}:
        return False
    _checked(result)
    return True


def sync_file_range(fd: int, offset: int, size_bytes: int, flags: int) -> bool:
    """Start or await writeback of a range. False: not on this file. No durability: that is fsync's.

    An OSError here is a failed writeback, seen once by this descriptor: as final as a failed fsync.
    """
    result = _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(size_bytes), ctypes.c_uint(flags))
    if result < 0 and ctypes.get_errno() in {errno.ESPIPE, errno.ENOSYS, errno.EINVAL}:
        return False
    _checked(result)
    return True


def idle_io() -> bool:
    """Put this thread, and all that it starts, into the idle I/O class. False: the kernel has none."""
    return bool(_syscall(_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE) == 0)


def touch_files_as(uid: int, gid: int) -> None:
    """Have file systems take this thread, and what it starts, for this user. OSError EPERM: it may not be.

    To what the process itself is it can always come back. The calls answer with what was there before, and with no
    error: asked again for an id that nobody has, they tell.
    """
    for change, wanted in ((_libc.setfsgid, gid), (_libc.setfsuid, uid)):
        change(ctypes.c_uint32(wanted))
        if change(ctypes.c_uint32(_NO_ID)) & _NO_ID != wanted:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def take_groups(groups: Sequence[int]) -> None:
    """Set this thread's groups. OSError: they are as before.

    The system call and not setgroups(3), which the C library carries to every thread of the process.
    """
    listed = (ctypes.c_uint32 * len(groups))(*groups)
    _checked(_syscall(_SETGROUPS, ctypes.c_size_t(len(groups)), listed))


def filesystem_magic(fd: int) -> int:
    """Return f_type of the file system under `fd`, as statfs(2) lists them."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    _checked(_libc.fstatfs(fd, buffer))
    width = 4 if _MACHINE == "s390x" else 8
    return int.from_bytes(buffer.raw[:width], "little" if _MACHINE != "s390x" else "big") & 0xFFFFFFFF
