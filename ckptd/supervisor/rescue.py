"""What only the supervisor still holds when it ends: saves that no daemon took over, written into the spool.

Once its trainer and its daemon are gone, a stored descriptor is all that is left of a STAGED save, and it
goes with the supervisor. So before it ends, each stored arena whose control page is whole and COMMITTED is
written as the daemon spills one at its own stop: the same image, name and order (ckptd_client.spool). Whether
a save was published meanwhile only the catalog knows; the next daemon takes an image in by its checkpoint's
id, so one too many costs a write, never a second checkpoint.

Each image has a process of its own. A disk that hangs hangs that one, and the others are still tried; one
that is killed is started once more; one whose supervisor is killed writes on to its end. What a dead one
leaves has a temporary name: no daemon takes it for a save, the next one removes it.

All that this needs is imported with the supervisor, never late: a daemon that dies at every start may be one
whose package was taken away under it.
"""

import json
import mmap
import os
import select
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ckptd import failpoint
from ckptd.intake.arena import FD_PREFIX, Arena, is_sealed
from ckptd.model import is_id
from ckptd_client import control, places, spool

RESCUE_S = 20.0  # for one image of any size: the fsyncs of a disk that others use
RESCUE_BYTES_PER_S = 20 << 20  # and what the slowest disk of a node is trusted to take, as the daemon's own spill
TRIES_MAX = 2  # of one image whose process was killed: an OOM killer may have had it in mind, not us
_DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_KEPT_FD = 3
_FD_MAX = 1 << 16  # numbers are given out lowest first, and the store is bounded
_SAFE, _SAID, _BROKE = 0, 3, 4  # exit statuses of a writer: it is in the spool; it is not, and that was said; a defect


@dataclass(frozen=True, slots=True)
class Save:
    """A committed save that the store holds."""

    checkpoint: str
    fd: int
    image_bytes: int
    owner_uid: int
    page: control.Control


class TakenBack(OSError):
    """The arena was lent again while it was written: a daemon lives, and has had what was in it."""


class Rescue:
    """Writes what the store holds into the spool of one state directory."""

    def __init__(self, state_dir: Path, say: Callable[..., None]) -> None:
        """Look at nothing yet."""
        self._state_dir = str(state_dir)
        self._spool = places.spool_dir(self._state_dir)
        self._say = say

    def run(self, store: Iterable[tuple[str, int]]) -> int:
        """Bring every committed save into the spool, durably; return how many could not be.

        Each of those is said, with what a person can do, and none keeps the others from being tried. Blocks, for
        each save at most TRIES_MAX times RESCUE_S and its size at RESCUE_BYTES_PER_S. Signals don't end it:
        there is no other copy.
        """
        return sum(not self._is_safe(name, fd) for name, fd in list(store))

    def _is_safe(self, name: str, fd: int) -> bool:
        try:
            save = committed(name, fd)
        except OSError as error:  # no memory to map it
            self._lost("unknown", f"{name} can't be read: {error}")
            return False
        if save is None:
            return True
        if not save.checkpoint:
            # The daemon would refuse it as well: no trainer was told that it is staged.
            self._say("warning", "supervisor.arena_refused", arena=name, why="its descriptor names no checkpoint")
            return True
        code = -signal.SIGKILL
        for _ in range(TRIES_MAX):
            code = self._write_aside(save)
            if code >= 0:
                break
        if code not in {_SAFE, _SAID}:
            self._lost(save.checkpoint, f"its writer was ended by {code}" if code < 0 else "its writer broke")
        return code == _SAFE

    def _write_aside(self, save: Save) -> int:
        """Write in a process of its own; return its exit status, -N when signal N ended it."""
        try:
            pid = os.fork()
        except OSError:
            return self._write(save)  # none to be had: without a bound is better than not at all
        if pid == 0:
            code = _BROKE
            try:
                _stand_alone(save.fd)
                code = self._write(replace(save, fd=_KEPT_FD))
            except BaseException:  # noqa: ASYNC103, BLE001 - the supervisor's code must not go on in the writer
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        return self._outcome(pid, save)

    def _outcome(self, pid: int, save: Save) -> int:
        limit_s = RESCUE_S + save.image_bytes / RESCUE_BYTES_PER_S
        if not _ends_within(pid, limit_s):
            # Not waited for: in an uninterruptible call it dies when that returns.
            os.kill(pid, signal.SIGKILL)
            self._lost(save.checkpoint, f"{self._spool} took no {save.image_bytes} bytes in {limit_s:.0f} s")
            return _SAID
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _write(self, save: Save) -> int:
        path = spool.arena_path(self._spool, save.checkpoint)
        try:
            places.ensure_state_dir(self._state_dir)
            if _is_file(path):  # spilled by the daemon itself; who renamed it may have died right then
                spool.sync_directory(self._spool)
                return _SAFE
            with mmap.mmap(save.fd, save.image_bytes, prot=mmap.PROT_READ) as image, memoryview(image) as view:
                check = partial(_before_named, save)
                spool.write_arena(self._spool, save.checkpoint, view, check=check, owner_uid=save.owner_uid)
        except TakenBack:
            return _SAFE
        except (OSError, ValueError) as error:  # PlaceError is one
            self._lost(save.checkpoint, str(error))
            return _SAID
        failpoint.hit("rescue.spooled")
        self._say("warning", "supervisor.save_spooled", checkpoint=save.checkpoint, bytes=save.image_bytes)
        return _SAFE

    def _lost(self, checkpoint: str, error: str) -> None:
        do = f"put that right in {self._spool}; what is in memory alone is lost when ckptd ends: then save again"
        self._say("critical", "supervisor.save_not_spooled", checkpoint=checkpoint, error=error, do=do)


def committed(name: str, fd: int) -> Save | None:
    """Judge a stored descriptor as the next daemon would: the save in it; None when there is none to bring to safety.

    What was published is RELEASED, what nobody committed is not whole: neither is needed. `checkpoint` is ""
    where a whole descriptor names none. OSError when it can't be read.
    """
    facts = os.fstat(fd)
    if not is_sealed(fd) or facts.st_size <= control.PAGE:
        return None
    with mmap.mmap(fd, control.PAGE, prot=mmap.PROT_READ) as page:
        found = control.read(page)
        if found is None or found.state != control.COMMITTED or FD_PREFIX + found.arena.hex() != name:
            return None
        raw = Arena(found.arena, fd, facts.st_size, page, facts.st_uid).descriptor()
    if raw is None:
        return None
    length = spool.image_bytes(found.descriptor_offset, found.descriptor_size)
    return Save(_checkpoint_in(raw), fd, min(length, facts.st_size), facts.st_uid, found)


def _checkpoint_in(raw: bytes) -> str:
    """Return the id in a descriptor. It becomes a file's name, and a trainer wrote it: nothing but an id will do."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    text = found.get("checkpoint") if isinstance(found, dict) else None
    return text if isinstance(text, str) and is_id(text) else ""


def _before_named(save: Save) -> None:
    """Every byte is durable, the name is not final: what was written must be the save still."""
    failpoint.hit("rescue.written")
    if control.read(os.pread(save.fd, control.PAGE, 0)) != save.page:
        raise TakenBack


def _stand_alone(fd: int) -> None:
    """In the writer: nothing but `fd`, as _KEPT_FD, and stderr is shared with the supervisor any more.

    Its lock and its listening socket would outlive it in us, and keep the next supervisor out. What stops a
    process group or a terminal is not meant for who writes the last copy.
    """
    signal.set_wakeup_fd(-1)
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    if fd != _KEPT_FD:
        os.dup2(fd, _KEPT_FD)
    os.closerange(_KEPT_FD + 1, _FD_MAX)


def _ends_within(pid: int, limit_s: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return True  # no descriptor to be had: waitpid has no limit, and is better than none at all
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(limit_s * 1000))
    finally:
        os.close(pidfd)


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
