"""Files where they lie: made durable, and their digests taken, without moving or changing them."""

import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from ckptd.errors import BadPath, Refused, SourceChanged
from ckptd.worker import beneath
from ckptd.worker.context import Context
from ckptd.worker.fsync import await_writeback, fsync_directory, fsync_file
from ckptd.worker.hashing import FileDigest, HashThread, read_into
from ckptd.worker.members import Member, identity, members
from ckptd.worker.protocol import Digest, Digested, FileRecord, IdentityRecord

SLICE_BYTES = 64 << 20  # some seconds' work for the slowest disk of a node


def run(request: Digest, context: Context) -> Digested:
    """Fsync what `path` holds and the names that lead to it, and digest every regular file.

    SourceChanged  anything was written, renamed, added or removed meanwhile: ask again later
    Missing        it is gone
    FsyncFailed    its writer's bytes may be lost; final for these files
    """
    parts = beneath.parts_below(request.root, request.path)
    root_fd = beneath.open_root(request.root)
    try:
        fd = beneath.open_beneath(root_fd, parts, beneath.READ)
        try:
            before = _look(fd)
            taken = _digest(fd, context)
            _sync_names(root_fd, parts[:-1])
            if _look(fd) != before or _look_again(root_fd, parts) != before:
                raise SourceChanged(f"{request.path!r} changed while it was read")
        finally:
            os.close(fd)
    finally:
        os.close(root_fd)
    return Digested(taken, before.identity, sum(record.size_bytes for record in taken))


class _Look(NamedTuple):
    """What a path held at one moment. Each file counts: clocks are coarse, and sums may agree by chance."""

    identity: IdentityRecord
    files: list[Member]


def _look(fd: int) -> _Look:
    own = os.fstat(fd)
    if stat.S_ISREG(own.st_mode):
        return _Look(identity(own), [])
    if stat.S_ISDIR(own.st_mode):
        files = members(fd)
        return _Look(identity(own, files), files)
    raise BadPath("neither a regular file nor a directory")


def _look_again(root_fd: int, parts: tuple[str, ...]) -> _Look | None:
    """Look by name: a file renamed over the one we read leaves our descriptor as it was."""
    try:
        fd = beneath.open_beneath(root_fd, parts, beneath.READ)
    except (FileNotFoundError, NotADirectoryError, Refused):
        return None
    try:
        return _look(fd)
    finally:
        os.close(fd)


def _digest(fd: int, context: Context) -> list[FileRecord]:
    taken: list[tuple[str, FileDigest]] = []
    with HashThread() as hasher:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            taken.append(("", _digest_file(fd, hasher, context.alive)))
        else:
            paths = [member.path for member in members(fd)]
            taken.extend((path, _digest_member(fd, path, hasher, context.alive)) for path in paths)
            _sync_tree(fd, paths)
    return [digest.record(path) for path, digest in taken]


def _digest_member(directory_fd: int, path: str, hasher: HashThread, alive: Callable[[], None]) -> FileDigest:
    try:
        fd = beneath.open_file(directory_fd, path)
    except (FileNotFoundError, BadPath) as error:
        raise SourceChanged(f"{path!r} went away while its directory was read") from error
    try:
        return _digest_file(fd, hasher, alive)
    finally:
        os.close(fd)


def _digest_file(fd: int, hasher: HashThread, alive: Callable[[], None]) -> FileDigest:
    """Fsync first: what is read afterwards is what went to the disk, or the identity changes.

    Its writer may have left gigabytes in the page cache, and one fsync of them says nothing for minutes:
    they go to the disk slice by slice, each with a sign of life, and the fsync finds little to do.
    """
    size_bytes = os.fstat(fd).st_size
    for offset in range(0, size_bytes, SLICE_BYTES) if size_bytes > SLICE_BYTES else ():
        await_writeback(fd, offset, SLICE_BYTES)
        alive()
    fsync_file(fd, "digest.fsynced")
    digest = FileDigest()
    for _ in read_into(lambda buffer, offset: os.preadv(fd, [buffer], offset), size_bytes, hasher, digest):
        alive()
    return digest


def _sync_tree(fd: int, paths: list[str]) -> None:
    """Make the names below a directory durable, and its own entries last."""
    below = {parts[:n] for parts in map(beneath.parts_of, paths) for n in range(1, len(parts))}
    for parts in [*sorted(below, reverse=True), ()]:
        at = beneath.open_directory(fd, parts)
        try:
            fsync_directory(at)
        finally:
            os.close(at)


def _sync_names(root_fd: int, above: tuple[str, ...]) -> None:
    """Make the names on the way from the root durable: they are as new as what they lead to."""
    for count in range(len(above), -1, -1):
        at = beneath.open_directory(root_fd, above[:count])
        try:
            fsync_directory(at)
        finally:
            os.close(at)
