"""Our own leavings: temporary directories and links of publishes that died half way."""

import os
import re
import stat
from dataclasses import dataclass

from ckptd.clock import Clock, SystemClock
from ckptd.errors import DiskFault
from ckptd.worker import beneath, durable
from ckptd.worker.context import Context
from ckptd.worker.durable import MANIFEST, TEMPORARY
from ckptd.worker.members import members
from ckptd.worker.protocol import Done, Sweep
from ckptd.worker.trash import TRASH

ENTRIES_MAX = 2_000_000
DEPTH_MAX = 32
_NAME = re.compile(r"\..+" + re.escape(TEMPORARY) + r"(?:([0-9a-f]{32})-)?[0-9a-f]{8}")


@dataclass(slots=True)
class _Round:
    request: Sweep
    context: Context
    now_ns: int
    device: int
    seen: int = 0
    removed: int = 0


def run(request: Sweep, context: Context, clock: Clock | None = None) -> Done:
    """Remove what is ours, older than `older_s`, unlocked, and not of a checkpoint in `keep`.

    `count` is how many directories and links went. What can't be removed is left for the next
    sweep. No symlink is followed and no mount entered; checkpoints (they have a manifest) and the
    trash are not searched.
    """
    root_fd = beneath.open_root(request.root)
    try:
        now_ns = int((clock or SystemClock()).now().timestamp() * 1e9)
        work = _Round(request, context, now_ns, os.fstat(root_fd).st_dev)
        _search(root_fd, 0, work)
    finally:
        os.close(root_fd)
    return Done(work.removed)


def _search(fd: int, depth: int, work: _Round) -> None:
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in entries]
    if any(name == MANIFEST for name, _, _ in found):
        return
    for name, is_directory, is_symlink in found:
        work.context.alive()
        work.seen += 1
        if work.seen > ENTRIES_MAX:
            return
        if match := _NAME.fullmatch(name):
            if (is_directory or is_symlink) and match[1] not in work.request.keep:
                _remove(fd, name, work)
        elif is_directory and name != TRASH and depth < DEPTH_MAX:
            _enter(fd, name, depth, work)


def _enter(fd: int, name: str, depth: int, work: _Round) -> None:
    try:
        below = os.open(name, beneath.DIRECTORY_FLAGS, dir_fd=fd)
    except OSError:
        return  # gone, swapped, or not ours to read: nothing of ours can be told there
    try:
        if os.fstat(below).st_dev == work.device:
            _search(below, depth + 1, work)
    finally:
        os.close(below)


def _remove(fd: int, name: str, work: _Round) -> None:
    try:
        if _is_old(fd, name, work):
            work.removed += bool(durable.remove_tree(fd, name, work.context.alive))
    except (OSError, DiskFault):
        return  # the next sweep comes


def _is_old(fd: int, name: str, work: _Round) -> bool:
    """Say whether nothing in it was touched for `older_s` and no living writer holds its lock.

    The newest time of all counts: a publish of hours makes its directory once and writes on and on.
    """
    facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
    newest_ns = max(facts.st_mtime_ns, facts.st_ctime_ns)
    if stat.S_ISDIR(facts.st_mode):
        below = os.open(name, beneath.DIRECTORY_FLAGS, dir_fd=fd)
        try:
            if not durable.try_lock(below):
                return False
            newest_ns = max([newest_ns, *(member.mtime_ns for member in members(below))])
        finally:
            os.close(below)
    return newest_ns <= work.now_ns - int(work.request.older_s * 1e9)
