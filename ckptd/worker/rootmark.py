"""Is this the root that it was? A small file in the root itself says so: `.ckptd-root`.

A path says nothing of the disk that is mounted there: where none is, there is a directory all the same, and
what is written, retired or given up for gone in it belongs to another disk than the catalog speaks of. So a
managed root carries a mark, and the catalog its id and the device where it was last seen.

    the mark's id is the recorded one       it is right, on whatever device
    it stands in the recorded one's place   as well: written anew here, and the daemon died before it knew
    no mark, on the recorded device         somebody emptied the root: go on; the next publish writes a new one
    no mark, on another device              RootDegraded: its disk is not mounted
    another id                              RootDegraded: another root lies in its place
    nothing is recorded                     the mark that lies there holds; where none is, a publish makes one

A new mark never has the old id. Where two directories share a device (a bind mount that is away, a root moved
aside) the wrong one may be taken for an emptied root; when the other comes back it is another root by its id,
and nothing under it is touched before a person decides.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from ckptd.errors import BadPath, NotFound, RootDegraded
from ckptd.model import is_id, new_id
from ckptd.worker import beneath, durable
from ckptd.worker.context import Context
from ckptd.worker.owner import acting_as
from ckptd.worker.protocol import Publish, Request, RootMark, Scan

NAME = ".ckptd-root"
BYTES_MAX = 4096
_writing = threading.Lock()  # of two first publishes side by side one makes the mark, the other finds it


class _Mark(msgspec.Struct, frozen=True):
    """The file. `instead_of` is the id that was recorded when this one was written, "" when none was."""

    root: str
    v: int = 1
    instead_of: str = ""


@contextmanager
def checked(request: Request, context: Context) -> Iterator[None]:
    """Let a verb work under its root once that is known to be the right one. Nothing is touched before.

    The root stays open meanwhile, and beneath.open_root gives the verb this very directory: what is mounted
    over it, or taken away, between the look and the deed changes nothing.

    RootDegraded  it is not the recorded root; the message says which way
    """
    adopting = isinstance(request, Scan) and request.adopt
    known = RootMark() if adopting else request.mark
    if known is None:
        yield
        return
    try:
        fd = beneath.open_root(request.root)
    except NotFound:
        _judge(request.root, known, None, _nearest_device(request.root))
        if adopting:
            context.root = known
        yield
        return
    try:
        context.root = _seen(fd, request.root, known)
        if adopting and context.root is None:
            context.root = RootMark()
        with beneath.held(request.root, fd):
            yield
    finally:
        os.close(fd)


def make_root(request: Publish, context: Context) -> int:
    """Open the root that is published to: made where it is missing, and marked, durably, where it is not.

    Whoever the root belongs to, its mark is the daemon's.
    """
    with acting_as(request.owner, request.root):
        fd = durable.make_root(request.root)
    if request.mark is None or context.root is not None:
        return fd
    try:
        with _writing:
            # Another may have written one since the check, or a disk come where none was.
            context.root = _seen(fd, request.root, request.mark) or _write(fd, request.mark)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _seen(fd: int, root: str, known: RootMark) -> RootMark | None:
    """Return what the root is known by from now on; None where no mark is, and none has to be."""
    return _judge(root, known, _read(fd), os.fstat(fd).st_dev)


def _judge(root: str, known: RootMark, found: _Mark | None, device: int) -> RootMark | None:
    if found is None:
        if known.id and known.device != device:
            raise RootDegraded(
                f"{root} has no mark ({NAME}), and is on another file system than it was",
                hint=f"is its disk mounted? If another disk took its place for good: `ckpt rebuild {root}`",
            )
        return None
    if known.id in {"", found.root, found.instead_of}:
        return RootMark(id=found.root, device=device)
    raise RootDegraded(
        f"{root} is another root than it was: its mark ({NAME}) says {found.root}, not {known.id}",
        hint=f"is the right disk mounted there? If this one is right from now on: `ckpt rebuild {root}`",
    )


def _read(root_fd: int) -> _Mark | None:
    """Return the mark; None for none, and for what is no whole mark. OSError when the disk can't say."""
    try:
        fd = beneath.open_file(root_fd, NAME)
    except (FileNotFoundError, BadPath, PermissionError):
        return None
    with open(fd, "rb") as file:
        text = file.read(BYTES_MAX)
    try:
        mark = msgspec.json.decode(text, type=_Mark)
    except msgspec.DecodeError:
        return None
    return mark if is_id(mark.root) else None


def _write(root_fd: int, known: RootMark) -> RootMark:
    """Write a new mark in the place of the recorded one; no such name, or a whole durable mark, at every instant.

    Whoever recorded the old id takes the new one for it, because it says so: a daemon that dies before it
    knows the new one is not locked out of its own root.
    """
    mark = _Mark(new_id(), instead_of=known.id)
    durable.write_mark(root_fd, NAME, msgspec.json.encode(mark) + b"\n")
    return RootMark(id=mark.root, device=os.fstat(root_fd).st_dev)


def _nearest_device(path: str) -> int:
    """Return the device of the nearest directory above that exists."""
    while True:
        path = os.path.dirname(path.rstrip("/")) or "/"
        try:
            return os.stat(path).st_dev
        except (FileNotFoundError, NotADirectoryError):
            if path == "/":
                raise
