"""Acting as another user: what a shared daemon makes for somebody is theirs, and the kernel says what they may.

Whoever a file system asks about is a thread's own matter: its file-system uid and gid and its groups
(credentials(7), setfsuid(2)). So one worker acts as the user of each request, on the thread that serves it; threads
that are started meanwhile inherit it. With root's uid go the capabilities that open every file, until it is back.
"""

import os
import pwd
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache

from ckptd.errors import Denied
from ckptd.worker import kernel

NOBODYS_GID = 65534  # of who is in no user database, as the kernel has it for ids that it can't map
_KNOWN_MAX = 1024  # users of one node


@contextmanager
def acting_as(uid: int | None, path: str) -> Iterator[None]:
    """Let this thread touch files as `uid` alone; as itself for None, and where only root could be somebody else.

    Denied  that user may not do to `path` what was tried; or the process is root and may still be nobody else:
            nothing is done as the wrong one
    """
    own = os.geteuid()
    if uid is None or uid == own or own != 0:
        yield
        return
    mine, my_groups = (own, os.getegid()), os.getgroups()
    gid, groups = _groups(uid)
    try:
        kernel.touch_files_as(uid, gid)
        kernel.take_groups(groups)
    except OSError as error:
        _be_again(*mine, None)  # that of groups failed or was not made
        raise Denied(
            f"a worker may not act as uid {uid}: {error.strerror}",
            hint="a shared daemon needs the capabilities CAP_SETUID and CAP_SETGID",
        ) from error
    try:
        yield
    except PermissionError as error:
        raise Denied(
            f"uid {uid} may not make or change {path}: {error.strerror}",
            hint="let that user write there, or have it name a directory of its own; its saves wait meanwhile",
            path=path,
        ) from error
    finally:
        _be_again(*mine, my_groups)


def go_with(directory_fd: int, fd: int) -> None:
    """Give a file that root has just made to whom its directory belongs to: a small one of ours in a user's checkpoint.

    Whose it is is no promise: what a file system, or a container, does not let root give away stays root's.
    """
    there = os.fstat(directory_fd)
    if os.geteuid() == 0 != there.st_uid:
        with suppress(OSError):
            os.fchown(fd, there.st_uid, there.st_gid)


@lru_cache(_KNOWN_MAX)
def _groups(uid: int) -> tuple[int, tuple[int, ...]]:
    """Return a user's gid and groups. As with a login, a new group counts from the next worker on. May ask the network."""
    try:
        known = pwd.getpwuid(uid)
    except KeyError:
        return NOBODYS_GID, ()
    return known.pw_gid, tuple(os.getgrouplist(known.pw_name, known.pw_gid))


def _be_again(uid: int, gid: int, groups: Sequence[int] | None) -> None:
    try:
        kernel.touch_files_as(uid, gid)
        if groups is not None:
            kernel.take_groups(groups)
    except OSError:
        os._exit(os.EX_OSERR)  # a thread that stayed somebody else would serve everybody as that one
