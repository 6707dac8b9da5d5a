"""The symlinks beside checkpoints: `latest` and `best`."""

import os
from contextlib import suppress

from ckptd.errors import BadPath
from ckptd.worker import beneath, durable
from ckptd.worker.context import Context
from ckptd.worker.fsync import FailedEarlier, fsync_directory
from ckptd.worker.owner import acting_as
from ckptd.worker.protocol import Done, Link


def run(request: Link, _context: Context) -> Done:
    """Point the symlink at `target`, or remove it; durable on return. `count` is 1 when it changed.

    Exists   the name is there and is no symlink; it stays
    BadPath  the target is absolute or leads upwards: a link must not leave its root
    """
    parts = beneath.parts_below(request.root, request.name)
    if not parts:
        raise BadPath("the root is no link")
    if request.target:
        beneath.parts_of(request.target)
    with acting_as(request.owner, request.name):
        return _place(request, parts)


def _place(request: Link, parts: tuple[str, ...]) -> Done:
    root_fd = beneath.open_root(request.root)
    try:
        directory_fd = beneath.open_directory(root_fd, parts[:-1])
    finally:
        os.close(root_fd)
    try:
        if not request.target:
            return Done(int(durable.remove_symlink(directory_fd, parts[-1])))
        if _points_to(directory_fd, parts[-1]) == request.target:
            # Its name may be from a process that died before its fsync. Where that fsync failed it is made again:
            # another is asked for only after another change.
            with suppress(FailedEarlier):
                fsync_directory(directory_fd)
                return Done(0)
        durable.replace_symlink(directory_fd, parts[-1], request.target)
        return Done(1)
    finally:
        os.close(directory_fd)


def _points_to(directory_fd: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=directory_fd)
    except OSError:
        return None  # not there, or no link: replace_symlink says which
