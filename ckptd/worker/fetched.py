"""What was fetched back from an archive, on a local disk: <root>/<key's first two digits>/<key>, whole or absent.

    begin   an empty directory with a temporary name, beside the final one      killed: the sweep removes it
    (whoever fetches fills it)
    keep    every file's size and SHA-256 compared, fsynced, then renamed       killed: absent, or whole
    drop    renamed to a temporary name, then removed                           killed: the sweep removes the rest

The catalog's row comes after `keep` and goes before `drop`, so a row always has its files; files without a
row are dropped at the next start.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ckptd import failpoint
from ckptd.errors import BadPath, Exists, Missing, SourceChanged
from ckptd.worker import beneath, durable
from ckptd.worker.context import Context
from ckptd.worker.fetching import FetchBegin, FetchDrop, FetchedList, Fetching, FetchKeep, Kept
from ckptd.worker.fsync import fsync_directory, fsync_file
from ckptd.worker.members import members
from ckptd.worker.protocol import Done, FileRecord

READ_BYTES = 1 << 20
SHELF_CHARS = 2
_DIGITS = frozenset("0123456789abcdef")
_KEY_CHARS = 32


def place(root: str, key: str) -> str:
    """Return the final name. BadPath when the key is not 32 hex digits."""
    return os.path.join(root, key[:SHELF_CHARS], _checked(key))


def begin(request: FetchBegin, _context: Context) -> Fetching:
    """Make the directory to fill. What an earlier fetch of the same left is not in its way, and is swept."""
    with _shelf(request.root, request.key) as shelf_fd:
        made = durable.TemporaryDirectory.create(shelf_fd, request.key, request.key)
        made.close()
    return Fetching(path=os.path.join(request.root, request.key[:SHELF_CHARS], made.name))


def keep(request: FetchKeep, context: Context) -> Done:
    """Compare, fsync, rename. `count` is 0 when the final name was there already: then that one stays.

    SourceChanged  a file differs from what the archive promised, or is one too many: nothing is kept
    Missing        a file is not there
    """
    name = os.path.basename(request.path)
    with _shelf(request.root, request.key) as shelf_fd:
        fd = beneath.open_directory(shelf_fd, (name,), one_mount=True)
        temporary = durable.TemporaryDirectory(shelf_fd, name, fd)
        try:
            kept = False
            try:
                _compare(fd, request.files, context)
                failpoint.hit("fetch.compared")
                temporary.publish(request.key)
                kept = True
            except Exists:
                return Done(0)
            finally:
                if not kept:
                    temporary.discard()
        finally:
            temporary.close()
    return Done(1)


def drop(request: FetchDrop, context: Context) -> Done:
    """Remove one, or a directory that was begun; `count` is how many entries went, 0 when it was not there."""
    with _shelf(request.root, request.key) as shelf_fd:
        name = os.path.basename(request.path) if request.path else request.key
        if name == request.key:
            gone = f".{request.key}{durable.TEMPORARY}{request.key}-{os.urandom(4).hex()}"
            try:
                durable.rename_noreplace((shelf_fd, name), (shelf_fd, gone))
            except FileNotFoundError:
                return Done(0)  # should a power cut bring it back, it is whole and has no row: the next start drops it
            failpoint.hit("fetch.dropped")
            fsync_directory(shelf_fd)
            name = gone
        elif not name.startswith(f".{request.key}{durable.TEMPORARY}"):
            raise BadPath(f"{request.path!r} is no directory of a fetch")
        return Done(durable.remove_tree(shelf_fd, name, context.alive))


def listed(request: FetchedList, context: Context) -> Kept:
    """Name everything that is kept; what has another name is not ours to name."""
    keys = []
    root_fd = durable.make_root(request.root)
    try:
        with os.scandir(root_fd) as shelves:
            names = sorted(entry.name for entry in shelves if entry.is_dir(follow_symlinks=False))
        for shelf in names:
            if len(shelf) != SHELF_CHARS or not _DIGITS.issuperset(shelf):
                continue
            context.alive()
            shelf_fd = beneath.open_directory(root_fd, (shelf,), one_mount=True)
            try:
                keys += sorted(name for name in os.listdir(shelf_fd) if _is_key(name) and name.startswith(shelf))
            finally:
                os.close(shelf_fd)
    finally:
        os.close(root_fd)
    return Kept(keys=keys)


def _compare(fd: int, files: list[FileRecord], context: Context) -> None:
    wanted = {file.path: file for file in files}
    found = {member.path for member in members(fd)}
    if found - wanted.keys():
        raise SourceChanged(f"{min(found - wanted.keys())!r} was fetched, and is not part of it")
    directories = {os.path.dirname(path) for path in wanted}
    for path, file in wanted.items():
        if path not in found:
            raise Missing(f"{path!r} was not fetched", path=path)
        file_fd = beneath.open_file(fd, path)
        try:
            size_bytes, sha256 = _digest(file_fd, context)
            if (size_bytes, sha256) != (file.size_bytes, file.sha256):
                raise SourceChanged(f"{path!r} was fetched with other bytes than the archive promised")
            fsync_file(file_fd)
        finally:
            os.close(file_fd)
    for directory in sorted(directories - {""}, key=len, reverse=True):
        inner_fd = beneath.open_directory(fd, beneath.parts_of(directory))
        try:
            fsync_directory(inner_fd)
        finally:
            os.close(inner_fd)


def _digest(fd: int, context: Context) -> tuple[int, str]:
    sha256, size_bytes = hashlib.sha256(), 0
    while chunk := os.pread(fd, READ_BYTES, size_bytes):
        sha256.update(chunk)
        size_bytes += len(chunk)
        context.alive()
    return size_bytes, sha256.hexdigest()


@contextmanager
def _shelf(root: str, key: str) -> Iterator[int]:
    root_fd = durable.make_root(root)
    try:
        shelf_fd = durable.make_dir_chain(root_fd, (_checked(key)[:SHELF_CHARS],))
    finally:
        os.close(root_fd)
    try:
        yield shelf_fd
    finally:
        os.close(shelf_fd)


def _is_key(name: str) -> bool:
    return len(name) == _KEY_CHARS and _DIGITS.issuperset(name)


def _checked(key: str) -> str:
    if not _is_key(key):
        raise BadPath(f"{key!r} is no key: {_KEY_CHARS} hex digits")
    return key
