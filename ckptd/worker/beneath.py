"""Paths below a root, opened so that neither a symlink nor ".." can lead out of it.

A root itself is the operator's word: its own path may hold symlinks. Below it nothing is followed.
"""

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ckptd.errors import BadPath, NotFound
from ckptd.worker import kernel

_RESOLVE = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS
_RACES_MAX = 64  # EAGAIN: somewhere in the tree a rename went by; each try is a fresh walk
_NO_OPENAT2 = frozenset({errno.ENOSYS, errno.EPERM})  # old kernel; old container filter
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NONBLOCK  # a FIFO opens at once and is then refused by its type


def parts_below(root: str, path: str) -> tuple[str, ...]:
    """Split `path` into its names below `root`; () when it is the root. BadPath when it leaves it."""
    if "\0" in path or "\0" in root or not root.startswith("/"):
        raise BadPath(f"{path!r} is no path")
    prefix = root.rstrip("/") + "/"
    if path.rstrip("/") + "/" == prefix:
        return ()
    if not path.startswith(prefix):
        raise BadPath(f"{path!r} is not below {root!r}")
    return parts_of(path[len(prefix) :])


def parts_of(relative: str) -> tuple[str, ...]:
    """Split a relative path into its names. BadPath when it is empty, absolute, or has "." or ".."."""
    parts = tuple(relative.rstrip("/").split("/"))
    if any(part in {"", ".", ".."} or "\0" in part for part in parts):
        raise BadPath(f"{relative!r} is not a plain relative path")
    return parts


class _Held(threading.local):
    """The root that this thread's verb was let in to."""

    root = ""
    fd = -1


_held = _Held()


@contextmanager
def held(root: str, fd: int) -> Iterator[None]:
    """Make open_root of this thread open the directory behind `fd` for `root`, whatever has its path by then."""
    _held.root, _held.fd = root, fd
    try:
        yield
    finally:
        _held.root, _held.fd = "", -1


def open_root(root: str) -> int:
    """Open a root directory for reading. NotFound when it is not there."""
    if root == _held.root:
        return open_directory(_held.fd, ())
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"root {root!r} does not exist") from error


def open_beneath(root_fd: int, parts: tuple[str, ...], flags: int, *, mode: int = 0, one_mount: bool = False) -> int:
    """Open `parts` below `root_fd`; () opens the root again. The descriptor closes on exec.

    one_mount  refuse to leave the root's file system
    BadPath    a symlink, or (one_mount) a mount point lies on the way
    OSError    anything else the kernel says
    """
    path = "/".join(parts) or "."
    resolve = _RESOLVE | (kernel.RESOLVE_NO_XDEV if one_mount else 0)
    for _ in range(_RACES_MAX):
        try:
            return kernel.openat2(root_fd, path, flags | os.O_NOFOLLOW, mode=mode, resolve=resolve)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                continue
            if error.errno in _NO_OPENAT2:
                return _walk(root_fd, parts or (".",), (flags, mode), one_mount=one_mount)
            raise _explained(error, path) from error
    raise BadPath(f"{path!r} kept changing while it was opened")


def open_directory(root_fd: int, parts: tuple[str, ...], *, one_mount: bool = False) -> int:
    """Open a directory below `root_fd`; errors as open_beneath."""
    return open_beneath(root_fd, parts, DIRECTORY_FLAGS, one_mount=one_mount)


def open_file(root_fd: int, path: str, flags: int = READ) -> int:
    """Open the regular file at the relative `path` below a directory, for reading unless told otherwise.

    BadPath  a symlink on the way, or not a regular file (a FIFO or device is never waited for)
    """
    fd = open_beneath(root_fd, parts_of(path), flags)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise BadPath(f"{path!r} is not a regular file")


def _walk(root_fd: int, parts: tuple[str, ...], how: tuple[int, int], *, one_mount: bool) -> int:
    """Open name by name. Each step is relative to a descriptor, so a swapped parent changes nothing."""
    flags, mode = how
    device = os.fstat(root_fd).st_dev
    at = os.dup(root_fd)
    try:
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            step = flags if last else os.O_PATH | os.O_DIRECTORY
            try:
                found = os.open(part, step | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=at)
            except OSError as error:
                raise _explained(error, "/".join(parts)) from error
            os.close(at)
            at = found
            if one_mount:
                _check_device(at, device, parts)
    except BaseException:
        os.close(at)
        raise
    return at


def _check_device(fd: int, device: int, parts: tuple[str, ...]) -> None:
    if os.fstat(fd).st_dev != device:
        raise BadPath(f"{'/'.join(parts)!r} lies on another file system")


def _explained(error: OSError, path: str) -> Exception:
    if error.errno == errno.ELOOP:
        return BadPath(f"a symlink lies on the way to {path!r}")
    if error.errno == errno.EXDEV:
        return BadPath(f"{path!r} leaves its root or its file system")
    return OSError(error.errno, os.strerror(error.errno or 0), path)
