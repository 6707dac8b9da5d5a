"""The spool: where a client leaves what no daemon took. Its names, and how they become durable.

    <state_dir>/spool/<checkpoint id>.arena            an arena's image (control.py), state COMMITTED
    <state_dir>/spool/<checkpoint id>.offer            a `submit` request as JSON: a file waits at its path
    <state_dir>/spool/<anything>.tmp-<pid>             being written; belongs to that process, which has it locked

A name without ".tmp-" is whole: it is written under the temporary name, fsynced, renamed, and the
directory fsynced, in this order. So a reader may take every such name, and remove it once what it
holds is durable elsewhere. Temporary names of dead processes may be removed by anyone. Whether one is
dead its pid alone can't say, for it may be a number of another pid namespace (a container): the lock can.
"""

import errno
import fcntl
import json
import os
import re
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple

from ckptd_client.control import PAGE, round_up

ARENA_SUFFIX = ".arena"
OFFER_SUFFIX = ".offer"
OFFER_BYTES_MAX = 1 << 20
CHUNK_BYTES = 8 << 20  # one write; also how soon an abandoned write notices
OPEN_TRIES = 3  # a file of our own that is swept before it is locked is made again

_NAME = re.compile(r"([0-9a-f]{32})(\.arena|\.offer)")
_TEMPORARY = re.compile(r"[0-9a-f]{32}\.(?:arena|offer)\.tmp-(\d+)")


class SpoolFull(OSError):
    """The spool's own limit, or the room left on its file system, does not allow this image."""


class Spooled(NamedTuple):
    """One whole entry: `kind` is "arena" or "offer"."""

    checkpoint: str
    kind: str
    path: str


def arena_path(spool: str, checkpoint: str) -> str:
    """Return the final name of a checkpoint's image."""
    return os.path.join(spool, checkpoint + ARENA_SUFFIX)


def offer_path(spool: str, checkpoint: str) -> str:
    """Return the final name of a checkpoint's offer."""
    return os.path.join(spool, checkpoint + OFFER_SUFFIX)


def entries(spool: str) -> Iterator[Spooled]:
    """Yield the whole entries of a spool, oldest first; temporary and foreign names are skipped.

    Blocks for one directory listing. OSError when the directory can't be read; a missing one is empty.
    """
    found = []
    try:
        with os.scandir(spool) as listing:
            for entry in listing:
                match = _NAME.fullmatch(entry.name)
                if match and entry.is_file(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, match[1], match[2][1:], entry.path))
    except FileNotFoundError:
        return
    for _, checkpoint, kind, path in sorted(found):
        yield Spooled(checkpoint, kind, path)


def abandoned(spool: str) -> Iterator[str]:
    """Yield temporary files whose writer is gone; each may be removed until the next one is asked for."""
    try:
        with os.scandir(spool) as listing:
            for entry in listing:
                match = _TEMPORARY.fullmatch(entry.name)
                if match and not os.path.exists(f"/proc/{match[1]}"):
                    # Locked while its remover is at work: a writer that begins right now sees that its name is gone.
                    with _unwritten(entry.path) as is_free:
                        if is_free:
                            yield entry.path
    except FileNotFoundError:
        return


@contextmanager
def _unwritten(path: str) -> Iterator[bool]:
    """Lock a file, for as long as the block lasts, and say whether that could be done: a writer has its own locked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        yield error.errno == errno.ELOOP  # nobody writes a symlink; of what else can't be opened nobody knows
        return
    try:
        try:
            _lock(fd, fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def _lock(fd: int, how: int = 0) -> None:
    """Take the lock of an open file. BlockingIOError with LOCK_NB; where there are no locks the pid has to do."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
            raise


def used_bytes(spool: str) -> int:
    """Return the bytes that the spool's files hold; 0 when there is no spool."""
    try:
        with os.scandir(spool) as listing:
            return sum(_size(entry) for entry in listing)
    except FileNotFoundError:
        return 0


def check_room(spool: str, size_bytes: int, spool_bytes_max: int) -> None:
    """SpoolFull when `size_bytes` more would pass the spool's limit or fill its file system.

    One part in twenty of the file system stays free: a full disk hurts more than a lost save.
    """
    held = used_bytes(spool)
    if held + size_bytes > spool_bytes_max:
        message = f"the spool holds {held} bytes; {size_bytes} more would pass its limit of {spool_bytes_max}"
        raise SpoolFull(errno.EDQUOT, message, spool)
    disk = os.statvfs(spool)
    if disk.f_bavail * disk.f_frsize - size_bytes < disk.f_blocks * disk.f_frsize // 20:
        raise SpoolFull(errno.ENOSPC, f"no room for {size_bytes} bytes on the file system", spool)


def write_arena(
    spool: str,
    checkpoint: str,
    image: memoryview,
    *,
    check: Optional[Callable[[], None]] = None,
    owner_uid: Optional[int] = None,
) -> str:
    """Write a committed arena image durably; return its final name.

    image  starts at the control page and ends after the descriptor, rounded up to whole pages by
           the caller; page-aligned memory is written with O_DIRECT where the file system has it
    check  is called once every byte is written and before the name becomes final; what it raises
           ends the write: for images that another process might have changed meanwhile
    owner_uid  whose save it is, when root writes it for somebody: the reader takes it for its owner's

    Blocks for as long as the disk takes. OSError when it can't be written: nothing stays behind.
    """
    if len(image) % PAGE:
        message = f"image of {len(image)} bytes is not a multiple of {PAGE}"
        raise ValueError(message)
    return _write(arena_path(spool, checkpoint), image, direct=True, check=check, owner_uid=owner_uid)


def write_offer(spool: str, checkpoint: str, request: Dict[str, Any]) -> str:
    """Write a `submit` request durably; return its final name. OSError when that fails."""
    body = json.dumps(request, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > OFFER_BYTES_MAX:
        message = f"offer of {len(body)} bytes, {OFFER_BYTES_MAX} at most"
        raise ValueError(message)
    return _write(offer_path(spool, checkpoint), memoryview(body), direct=False)


def image_bytes(descriptor_offset: int, descriptor_size_bytes: int) -> int:
    """Return the length of the image to write: whole pages up to the descriptor's end."""
    return round_up(descriptor_offset + descriptor_size_bytes)


def _write(
    final: str,
    body: memoryview,
    *,
    direct: bool,
    check: Optional[Callable[[], None]] = None,
    owner_uid: Optional[int] = None,
) -> str:
    """Temporary name, fsync, rename, fsync of the directory.

    Proof of the order: the rename is issued after fsync has returned, so the final name can only
    ever lead to whole bytes; the directory's fsync makes the name itself survive a power cut. The
    file is open, and so locked, until it has its final name: nobody takes it for a dead writer's.
    """
    temporary = f"{final}.tmp-{os.getpid()}"
    try:
        fd, aligned = _open_locked(temporary, direct=direct)
        try:
            if owner_uid is not None and owner_uid != os.getuid():
                os.fchown(fd, owner_uid, -1)
            if body:
                os.posix_fallocate(fd, 0, len(body))  # a full disk is met before the first byte
            _write_all(fd, body, direct=aligned)
            os.fsync(fd)
            if check is not None:
                check()
            os.rename(temporary, final)
        finally:
            os.close(fd)
    except BaseException:
        _forget(temporary)
        raise
    sync_directory(os.path.dirname(final))
    return final


def _open_locked(path: str, *, direct: bool) -> Tuple[int, bool]:
    """Open a new file that nobody sweeps: it is locked, and had its name still when it was."""
    for _ in range(OPEN_TRIES):
        fd, aligned = _open(path, direct=direct)
        try:
            _lock(fd)  # only a sweeper ever holds it, for as long as one removal takes
            if os.fstat(fd).st_nlink:
                return fd, aligned
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise OSError(errno.EAGAIN, f"was removed {OPEN_TRIES} times while it was made", path)


def _open(path: str, *, direct: bool) -> Tuple[int, bool]:
    """Open a new file, with O_DIRECT where asked for and possible."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
    return os.open(path, flags, 0o600), False


def _write_all(fd: int, body: memoryview, *, direct: bool) -> None:
    at = 0
    while at < len(body):
        try:
            at += os.write(fd, body[at : at + CHUNK_BYTES])
        except OSError as error:
            # Opening with O_DIRECT may succeed where writing with it does not (unaligned memory,
            # some FUSE file systems): go on through the page cache.
            if not direct or error.errno != errno.EINVAL:
                raise
            _clear_direct(fd)
            direct = False
            continue
        if direct and at % PAGE:
            _clear_direct(fd)  # a short write left an offset that O_DIRECT does not take
            direct = False


def _clear_direct(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def sync_directory(path: str) -> None:
    """Make the names in a spool durable, whoever gave them. Blocks; OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _forget(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # taken by the daemon between listing and looking
        return 0


def read_offer(path: str) -> Optional[Dict[str, Any]]:
    """Read an offer back; None when it is not one (foreign, damaged, too large)."""
    with open(path, "rb") as offer:
        body = offer.read(OFFER_BYTES_MAX + 1)
    if len(body) > OFFER_BYTES_MAX:
        return None
    try:
        request = json.loads(body)
    except ValueError:
        return None
    return request if isinstance(request, dict) else None
