"""The files of a directory checkpoint, and the identity that stands for all of them."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from ckptd.errors import BadPath
from ckptd.worker.beneath import DIRECTORY_FLAGS
from ckptd.worker.protocol import IdentityRecord

FILES_MAX = 100_000  # files of one checkpoint; a sharded one of 10,000 ranks stays far below
DEPTH_MAX = 16  # directories below a checkpoint's own


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file, `path` relative to the checkpoint and "/"-separated."""

    path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


def is_utf8(name: str) -> bool:
    """Say whether a name from the kernel is text; one that is not can't travel in a frame."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def members(fd: int, *, prefix: str = "", depth: int = 0) -> list[Member]:
    """List every regular file below the open directory `fd`, sorted by path.

    Links, FIFOs and devices are not members and never opened; other file systems are not entered.
    A file that vanishes meanwhile is left out: its directory's time tells.
    BadPath  more than FILES_MAX files, deeper than DEPTH_MAX, or a name that is not UTF-8
    """
    found: list[Member] = []
    device = os.fstat(fd).st_dev
    _collect(fd, prefix, depth, device, found)
    found.sort(key=lambda member: member.path)
    return found


def _collect(fd: int, prefix: str, depth: int, device: int, found: list[Member]) -> None:
    if depth > DEPTH_MAX:
        raise BadPath(f"more than {DEPTH_MAX} directories deep at {prefix!r}")
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_symlink():
                continue
            if not is_utf8(entry.name):
                raise BadPath(f"a name in {prefix!r} is not UTF-8")
            try:
                facts = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(facts.st_mode):
                found.append(Member(prefix + entry.name, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
            elif stat.S_ISDIR(facts.st_mode) and facts.st_dev == device:
                _enter(fd, entry.name, f"{prefix}{entry.name}/", depth, found)
            if len(found) > FILES_MAX:
                raise BadPath(f"more than {FILES_MAX} files")


def _enter(fd: int, name: str, prefix: str, depth: int, found: list[Member]) -> None:
    try:
        below = os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
    except (FileNotFoundError, NotADirectoryError):
        return  # gone, or swapped for a link, since it was listed
    try:
        _collect(below, prefix, depth + 1, os.fstat(below).st_dev, found)
    finally:
        os.close(below)


def identity(own: os.stat_result, files: Iterable[Member] = ()) -> IdentityRecord:
    """Stand for a file (`own` alone) or for a directory and all its members.

    A directory's size is the sum of its members', its times are the newest among it and them, so
    that any write, rename, creation or removal below it makes another identity.
    """
    if stat.S_ISREG(own.st_mode):
        return IdentityRecord(own.st_dev, own.st_ino, own.st_size, own.st_mtime_ns, own.st_ctime_ns)
    size_bytes, mtime_ns, ctime_ns = 0, own.st_mtime_ns, own.st_ctime_ns
    for member in files:
        size_bytes += member.size_bytes
        mtime_ns = max(mtime_ns, member.mtime_ns)
        ctime_ns = max(ctime_ns, member.ctime_ns)
    return IdentityRecord(own.st_dev, own.st_ino, size_bytes, mtime_ns, ctime_ns)
