"""The only code of ckptd that makes, renames and removes under a storage root; fsync.py is its other half.

Everything works on (directory descriptor, name), so that a directory swapped for a symlink between
two steps changes nothing. What must hold after a power cut is proved at each order that matters.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ckptd import failpoint
from ckptd.errors import BadPath, DiskFault, Exists, NotFound, SourceChanged
from ckptd.worker import beneath, kernel
from ckptd.worker.fsync import fsync_directory, fsync_file
from ckptd.worker.owner import go_with

TEMPORARY = ".ckptd-tmp-"
MANIFEST = "manifest.json"
_STEM_CHARS_MAX = 60  # of a final name inside a temporary one: 240 bytes at worst; NAME_MAX is 255
_DEPTH_MAX = 256  # directories below one that is removed; each holds a descriptor meanwhile
_NO_FLAGS = frozenset({errno.ENOSYS, errno.EINVAL})  # renameat2 flags: old kernels, NFS, some FUSE

UMASK = os.umask(0o077)  # there is no way to read it without setting it; once, before any thread
os.umask(UMASK)


def make_root(root: str) -> int:
    """Open a root; when it is missing it is made with its parents, and their names are durable.

    Each name is durable before the next is made, so of an earlier try that was killed only the last
    directory that is there may have a name that is not: it is fsynced again.
    """
    missing = []
    path = root.rstrip("/")
    while path and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    _sync_name(path)
    for each in reversed(missing):
        above = beneath.open_root(os.path.dirname(each))
        try:
            _make_durably(above, os.path.basename(each))
        finally:
            os.close(above)
    return beneath.open_root(root)


def _sync_name(path: str) -> None:
    """Make the name of a directory durable, unless we can't have made it: it is "/", or a foreign place."""
    try:
        above = beneath.open_root(os.path.dirname(path) or "/")
    except (PermissionError, NotFound):
        return
    try:
        if os.path.lexists(path) and os.fstat(above).st_dev == os.stat(path).st_dev:
            fsync_directory(above, "", _change)
    finally:
        os.close(above)


def _change(fd: int) -> None:
    """Make and remove a name, so that the kernel has the directory to write again. OSError when we may not."""
    name = f"{TEMPORARY}{os.urandom(8).hex()}"
    os.mkdir(name, 0o700, dir_fd=fd)
    os.rmdir(name, dir_fd=fd)


def _make_durably(above: int, name: str) -> None:
    """Make a directory unless it is there, and fsync its name; one that we made goes when that fails."""
    made = True
    try:
        os.mkdir(name, dir_fd=above)
    except FileExistsError:
        made = False
    try:
        fsync_directory(above, "", _change)
    except BaseException:
        if made:
            with suppress(OSError):  # somebody else works in it already
                os.rmdir(name, dir_fd=above)
        raise


def make_dir_chain(root_fd: int, parts: tuple[str, ...]) -> int:
    """Open the directory `parts` below a root, made where missing, every name on the way durable.

    The whole chain is fsynced, not only what was made now: a process killed between its mkdir and
    its fsync leaves a directory that exists and yet may vanish in a power cut, with all that is
    published in it later. An fsync of a clean directory costs next to nothing.
    """
    at = beneath.open_directory(root_fd, ())
    try:
        for part in parts:
            _make_durably(at, part)
            above, at = at, beneath.open_directory(at, (part,))
            os.close(above)
    except BaseException:
        os.close(at)
        raise
    return at


@dataclass(slots=True)
class TemporaryDirectory:
    """A directory beside its final name, 0700 and locked while we write into it.

    The lock tells a sweep that its writer lives, however old its times are; it ends with us.
    """

    parent_fd: int
    name: str
    fd: int

    @classmethod
    def create(cls, parent_fd: int, final: str, checkpoint: str) -> "TemporaryDirectory":
        """Make `.<final>.ckptd-tmp-<checkpoint>-<random>` in `parent_fd`, which the caller keeps open."""
        name = f".{final[:_STEM_CHARS_MAX]}{TEMPORARY}{checkpoint}-{os.urandom(4).hex()}"
        os.mkdir(name, 0o700, dir_fd=parent_fd)
        fd = beneath.open_directory(parent_fd, (name,))
        try_lock(fd)
        return cls(parent_fd, name, fd)

    def publish(self, final: str) -> None:
        """Give the directory its final name. Exists: the name is taken, and stays as it was.

        On return the name is durable. Before the rename everything below is (files, then the
        directories that name them, then this one), so at every instant a power cut leaves either
        no final name or one that holds every byte. FsyncFailed or OSError: the final name is gone
        again, for it was never promised.
        """
        os.fchmod(self.fd, 0o777 & ~UMASK)
        fsync_directory(self.fd, "dir.fsynced")
        rename_noreplace((self.parent_fd, self.name), (self.parent_fd, final))
        try:
            failpoint.hit("publish.renamed")
            fsync_directory(self.parent_fd, "parent.fsynced")
        except BaseException:
            rename_noreplace((self.parent_fd, final), (self.parent_fd, self.name))
            raise

    def discard(self) -> None:
        """Remove the directory and all in it; what can't be removed is left to the sweep.

        fsync of the parent comes first: after a taken-back publish the disk may still hold the
        final name, and its files may go only once that name is durably the temporary one. When
        this fsync fails nothing is removed: whichever name a power cut leaves, it is whole.
        """
        with suppress(OSError, DiskFault):
            fsync_directory(self.parent_fd)
            remove_tree(self.parent_fd, self.name)

    def close(self) -> None:
        """Let go of the directory (and of its lock)."""
        os.close(self.fd)


def try_lock(fd: int) -> bool:
    """Lock a directory for this descriptor; False when another holds it.

    File systems that can't lock directories (NFS) answer True: there only age protects.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in {errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
            raise
    return True


def rename_noreplace(old: tuple[int, str], new: tuple[int, str]) -> None:
    """Rename (directory fd, name) to (directory fd, name) unless that exists: Exists. Not durable yet.

    Without the kernel's flag: a file gets its new name by link, which never replaces. A directory
    is renamed after a look; in the window between the two only an empty directory could be
    replaced, for rename refuses one that holds anything.
    """
    try:
        kernel.renameat2(old, new, kernel.RENAME_NOREPLACE)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise Exists(f"{new[1]!r} exists already") from error
        if error.errno not in _NO_FLAGS:
            raise
        _rename_by_hand(old, new)


def _rename_by_hand(old: tuple[int, str], new: tuple[int, str]) -> None:
    facts = os.stat(old[1], dir_fd=old[0], follow_symlinks=False)
    try:
        if not stat.S_ISDIR(facts.st_mode):
            os.link(old[1], new[1], src_dir_fd=old[0], dst_dir_fd=new[0], follow_symlinks=False)
            os.unlink(old[1], dir_fd=old[0])
            return
        with suppress(FileNotFoundError):
            os.stat(new[1], dir_fd=new[0], follow_symlinks=False)
            raise Exists(f"{new[1]!r} exists already")
        os.rename(old[1], new[1], src_dir_fd=old[0], dst_dir_fd=new[0])
    except OSError as error:
        if error.errno in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
            raise Exists(f"{new[1]!r} exists already") from error
        raise


def replace_file(directory_fd: int, name: str, text: bytes) -> None:
    """Give a small file these bytes, atomically and durably. FsyncFailed: the old one stands.

    The bytes are fsynced under another name before the rename, the directory after it, so at every
    instant a power cut leaves the old file or the new one, and each is whole. One writer at a time:
    what a dead one left under the other name is removed first.
    """
    with _beside(directory_fd, name, text) as (fd, temporary):
        go_with(directory_fd, fd)
        failpoint.hit("amend.written")
        fsync_file(fd, "amend.fsynced")
        os.rename(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    failpoint.hit("amend.renamed")
    fsync_directory(directory_fd, "amend.dir_fsynced")


def write_mark(root_fd: int, name: str, text: bytes) -> None:
    """Give a root its mark, as replace_file does it: durable before anything is published under it.

    FsyncFailed: it is gone again, for a name whose fsync failed lasts only when it is made anew.
    """
    with _beside(root_fd, name, text) as (fd, temporary):
        failpoint.hit("mark.written")
        fsync_file(fd, "mark.fsynced")
        os.rename(temporary, name, src_dir_fd=root_fd, dst_dir_fd=root_fd)
    try:
        failpoint.hit("mark.renamed")
        fsync_directory(root_fd, "mark.dir_fsynced", _change)
    except BaseException:
        os.unlink(name, dir_fd=root_fd)
        raise


@contextmanager
def _beside(directory_fd: int, name: str, text: bytes) -> Iterator[tuple[int, str]]:
    """Write a file under another name than `name`, for the block to give it that; it goes when the block fails."""
    temporary = f".{name[:_STEM_CHARS_MAX]}{TEMPORARY}replaces"
    with suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=directory_fd)
    fd = beneath.open_beneath(directory_fd, (temporary,), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o666)
    try:
        rest = memoryview(text)
        while rest:
            rest = rest[os.write(fd, rest) :]
        yield fd, temporary
    except BaseException:
        os.unlink(temporary, dir_fd=directory_fd)
        raise
    finally:
        os.close(fd)


def replace_symlink(directory_fd: int, name: str, target: str) -> None:
    """Make the symlink `name` point to `target`, atomically and durably.

    Exists  `name` is there and is no symlink; it stays
    A reader sees the old target or the new one at every instant: the new link is made beside the
    old and the two are exchanged. What comes out of the exchange is looked at before it is
    removed, so that a file put there in the last moment goes back to its place.
    """
    temporary = f".{name[:_STEM_CHARS_MAX]}{TEMPORARY}{os.urandom(4).hex()}"
    os.symlink(target, temporary, dir_fd=directory_fd)
    here, there = (directory_fd, temporary), (directory_fd, name)
    try:
        if not _is_symlink(directory_fd, name):
            rename_noreplace(here, there)
        else:
            _exchange(here, there)
    except BaseException:
        os.unlink(temporary, dir_fd=directory_fd)
        raise
    failpoint.hit("link.made")
    fsync_directory(directory_fd)


def _exchange(fresh: tuple[int, str], old: tuple[int, str]) -> None:
    try:
        kernel.renameat2(fresh, old, kernel.RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in _NO_FLAGS:
            raise
        os.rename(fresh[1], old[1], src_dir_fd=fresh[0], dst_dir_fd=old[0])
        return
    if not _is_symlink(*fresh):
        kernel.renameat2(fresh, old, kernel.RENAME_EXCHANGE)
        raise Exists(f"{old[1]!r} is no symlink")
    os.unlink(fresh[1], dir_fd=fresh[0])


def remove_symlink(directory_fd: int, name: str) -> bool:
    """Remove a symlink, durably; False when nothing is there. Exists when it is something else."""
    try:
        facts = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        fsync_directory(directory_fd)  # who removed it may have died before its fsync
        return False
    if not stat.S_ISLNK(facts.st_mode):
        raise Exists(f"{name!r} is no symlink")
    os.unlink(name, dir_fd=directory_fd)
    fsync_directory(directory_fd)
    return True


def _is_symlink(directory_fd: int, name: str) -> bool:
    try:
        facts = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISLNK(facts.st_mode)


def move(old: tuple[int, str], new: tuple[int, str], inode: tuple[int, int]) -> None:
    """Move the file or directory with this (dev, ino) to a free name on the same mount, durably.

    SourceChanged  another one took the name meanwhile: it is moved back
    The new name is fsynced before the old one: on a file system that splits a rename, a power cut
    then leaves two names, never none.
    """
    rename_noreplace(old, new)
    facts = os.stat(new[1], dir_fd=new[0], follow_symlinks=False)
    if (facts.st_dev, facts.st_ino) != inode:
        rename_noreplace(new, old)
        raise SourceChanged(f"{old[1]!r} was replaced while it was moved")
    failpoint.hit("retain.trashed")
    fsync_directory(new[0])
    fsync_directory(old[0], "retain.trash_fsynced")


def remove_tree(parent_fd: int, name: str, beat: Callable[[], None] = lambda: None) -> int:
    """Remove `name` for good and return how many entries went; 0 when it was not there.

    No symlink is followed (it is removed itself) and no mount is crossed (BadPath). A manifest goes
    first, and durably: half of a removed checkpoint never looks like a whole one. On return the
    removal is durable.
    """
    try:
        facts = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    except FileNotFoundError:
        fsync_directory(parent_fd)  # who removed it may have died before its fsync
        return 0
    if not stat.S_ISDIR(facts.st_mode):
        _unlink(parent_fd, name, beat)
        fsync_directory(parent_fd)
        return 1
    fd = beneath.open_directory(parent_fd, (name,), one_mount=True)
    try:
        with suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(MANIFEST, dir_fd=fd)
        fsync_directory(fd)  # with no manifest there as well: who unlinked it may have died right then
        count = _empty(fd, 0, beat)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent_fd)
    fsync_directory(parent_fd)
    return count + 1


def _empty(fd: int, depth: int, beat: Callable[[], None]) -> int:
    if depth > _DEPTH_MAX:
        raise BadPath(f"more than {_DEPTH_MAX} directories deep")
    count = 0
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        if is_directory:
            below = beneath.open_directory(fd, (name,), one_mount=True)
            try:
                count += _empty(below, depth + 1, beat)
            finally:
                os.close(below)
            os.rmdir(name, dir_fd=fd)
        else:
            _unlink(fd, name, beat)
        count += 1
    return count


def _unlink(fd: int, name: str, beat: Callable[[], None]) -> None:
    beat()
    failpoint.hit("retain.unlink")
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=fd)
