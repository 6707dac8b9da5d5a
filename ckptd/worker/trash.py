"""Retiring in three verbs: into the trash by rename, back out of it, or gone for good. A fourth says what is there."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckptd.clock import Clock, SystemClock
from ckptd.errors import BadPath, Missing, SourceChanged
from ckptd.worker import beneath, durable
from ckptd.worker.context import Context
from ckptd.worker.formats.ckptd_dir import named_in
from ckptd.worker.fsync import fsync_directory
from ckptd.worker.members import members
from ckptd.worker.owner import acting_as
from ckptd.worker.protocol import Done, Purge, Restore, Trash
from ckptd.worker.trashlist import NAMES_MAX, TrashList, TrashListed

TRASH = ".ckptd-trash"


def trash(request: Trash, _context: Context) -> Done:
    """Move `path` into the trash, durably. `count` is 0 when another request had done so, a moment ago or long ago.

    SourceChanged  it is not what `identity` says any more: it stays
    Missing        it is neither at its path nor in the trash
    BadPath        it lies on another file system than the root, or is the root
    """
    try:
        return _trash(request)
    except FileNotFoundError:
        # It went between our look and our move: another request for the same thing took it there, or somebody
        # took it away. A second look tells, for it can't go twice.
        return _trash(request)


def _trash(request: Trash) -> Done:
    with _opened(request.root) as root_fd, _trash_at(root_fd, request.trash) as bin_fd:
        parts = _below(request.root, request.path)
        with _parent(root_fd, parts) as parent_fd:
            # The path first, then the trash: what another request moves between the two looks, the second one sees.
            facts = None if parent_fd is None else _facts(parent_fd, parts[-1])
            binned = _facts(bin_fd, request.trash)
            if parent_fd is not None and facts is not None:
                try:
                    _check(parent_fd, parts[-1], facts, request)
                except SourceChanged:
                    # Who writes into an old name takes nothing from us that lies in the trash already.
                    if not _is_in_bin(bin_fd, binned, request):
                        raise
                else:
                    durable.move((parent_fd, parts[-1]), (bin_fd, request.trash), (facts.st_dev, facts.st_ino))
                    return Done(1)
            elif not _is_in_bin(bin_fd, binned, request):
                raise Missing(f"{request.path!r} is not there", path=request.path)
            fsync_directory(bin_fd)
            if parent_fd is not None:
                fsync_directory(parent_fd)
    return Done(0)


def restore(request: Restore, _context: Context) -> Done:
    """Move it back, durably. `count` is 0 when the trash has nothing and the path has it: done by another.

    Exists   the path is taken; nothing moves
    Missing  the trash does not hold it, and the path nothing, or something else; nothing is touched
    """
    try:
        return _restore(request)
    except FileNotFoundError:  # as above
        return _restore(request)


def _restore(request: Restore) -> Done:
    with _opened(request.root) as root_fd, _trash_at(root_fd, request.trash) as bin_fd:
        parts = _below(request.root, request.path)
        binned = _facts(bin_fd, request.trash)
        if binned is None:
            with _parent(root_fd, parts) as there_fd:
                if there_fd is None or not _is_back(there_fd, parts[-1], request):
                    raise Missing(f"{request.trash!r} is not in the trash", path=request.path)
                fsync_directory(there_fd)
                fsync_directory(bin_fd)
            return Done(0)
        with acting_as(request.owner, request.path):
            parent_fd = durable.make_dir_chain(root_fd, parts[:-1])
        try:
            durable.move((bin_fd, request.trash), (parent_fd, parts[-1]), (binned.st_dev, binned.st_ino))
        finally:
            os.close(parent_fd)
    return Done(1)


def purge(request: Purge, context: Context) -> Done:
    """Unlink what the trash holds under this name; `count` is how many entries went, 0 when it was gone."""
    with _opened(request.root) as root_fd, _trash_at(root_fd, request.trash) as bin_fd:
        return Done(durable.remove_tree(bin_fd, request.trash, context.alive))


def listed(request: TrashList, context: Context, clock: Clock | None = None) -> TrashListed:
    """Name what the trash holds; how long something has been there its change time tells, which a rename sets.

    Anybody may have put anything there: names that are no text, or no end of them.
    """
    before_ns = int(((clock or SystemClock()).now().timestamp() - request.older_s) * 1e9)
    found = []
    with (
        _opened(request.root) as root_fd,
        suppress(FileNotFoundError),
        _directory(root_fd, (TRASH,)) as bin_fd,
        os.scandir(bin_fd) as entries,
    ):
        for entry in entries:
            context.alive()
            with suppress(FileNotFoundError):  # unlinked meanwhile
                if entry.stat(follow_symlinks=False).st_ctime_ns <= before_ns:
                    found.append(ascii(entry.name)[1:-1])
            if len(found) == NAMES_MAX:
                break
    return TrashListed(sorted(found))


def _check(parent_fd: int, name: str, facts: os.stat_result, request: Trash | Restore) -> None:
    """Refuse what is not the recorded thing any more.

    The same inode may hold another checkpoint: trainers write into old names. So a file's size and
    time must be equal too, and a foreign directory must hold no file newer than its record. Our
    own directories (they have a manifest) hold what we wrote; what a person added goes along.

    A device number may be another after each mount, so it decides nothing. But where it is another,
    an equal inode number alone says less: then our manifest must name the checkpoint, and a foreign
    directory must be as it was in its size too.
    """
    recorded = request.identity
    if facts.st_ino != recorded.ino:
        raise SourceChanged(f"{name!r} is another file than the recorded one")
    if isinstance(request, Trash) and request.named and not _names(parent_fd, name, facts, request.checkpoint):
        raise SourceChanged(f"{name!r} does not say that it is checkpoint {request.checkpoint}")
    if not stat.S_ISDIR(facts.st_mode):
        if (facts.st_size, facts.st_mtime_ns) != (recorded.size_bytes, recorded.mtime_ns):
            raise SourceChanged(f"{name!r} was written to since it was recorded")
        return
    remounted = facts.st_dev != recorded.dev
    with _directory(parent_fd, (name,)) as fd:
        if _facts(fd, durable.MANIFEST) is not None:
            if remounted and named_in(fd) != request.checkpoint:
                raise SourceChanged(f"{name!r} is on another file system and does not say that it is the recorded one")
            return
        found = members(fd)
    newer = [member.path for member in found if member.mtime_ns > recorded.mtime_ns]
    if newer:
        raise SourceChanged(f"{newer[0]!r} in {name!r} was written since it was recorded")
    if remounted and sum(member.size_bytes for member in found) != recorded.size_bytes:
        raise SourceChanged(f"{name!r} is on another file system and not as long as it was")


def _is_in_bin(bin_fd: int, binned: os.stat_result | None, request: Trash) -> bool:
    """Say whether what has the name in the trash is what an earlier request moved there.

    Where inode numbers change with each mount, too, its manifest tells.
    """
    if binned is None:
        return False
    if binned.st_ino == request.identity.ino:
        return True
    return bool(request.checkpoint) and _names(bin_fd, request.trash, binned, request.checkpoint)


def _names(at: int, name: str, facts: os.stat_result, checkpoint: str) -> bool:
    """Whether it is a directory whose manifest names this checkpoint."""
    if not stat.S_ISDIR(facts.st_mode):
        return False
    with _directory(at, (name,)) as fd:
        return named_in(fd) == checkpoint


def _is_back(parent_fd: int, name: str, request: Restore) -> bool:
    """Say whether what lies at the path is the checkpoint itself, when the trash has nothing of it.

    A manifest decides alone: inode numbers are given out again, and a directory that was written after
    somebody emptied the trash may well have the old one.
    """
    facts = _facts(parent_fd, name)
    if facts is None:
        return False
    if stat.S_ISDIR(facts.st_mode):
        with _directory(parent_fd, (name,)) as fd:
            named = named_in(fd)
        if named is not None:
            return named == request.checkpoint
    try:
        _check(parent_fd, name, facts, request)
    except SourceChanged:
        return False
    return True


def _below(root: str, path: str) -> tuple[str, ...]:
    parts = beneath.parts_below(root, path)
    if not parts or TRASH in parts:
        raise BadPath(f"{path!r} is the root, or the trash")
    return parts


def _facts(directory_fd: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


@contextmanager
def _opened(root: str) -> Iterator[int]:
    fd = beneath.open_root(root)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _directory(at: int, parts: tuple[str, ...]) -> Iterator[int]:
    fd = beneath.open_directory(at, parts, one_mount=True)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _parent(root_fd: int, parts: tuple[str, ...]) -> Iterator[int | None]:
    """Open the directory that the last part lies in; None when there is none."""
    fd = None
    with suppress(FileNotFoundError):
        fd = beneath.open_directory(root_fd, parts[:-1], one_mount=True)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


@contextmanager
def _trash_at(root_fd: int, name: str) -> Iterator[int]:
    """Open the trash of a root, made when missing; `name` must be one plain name in it."""
    if len(beneath.parts_of(name)) != 1:
        raise BadPath(f"{name!r} is not a plain name")
    fd = durable.make_dir_chain(root_fd, (TRASH,))
    try:
        yield fd
    finally:
        os.close(fd)
