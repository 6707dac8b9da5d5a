"""Does anybody have this file open for writing, or mapped writable? A read lease tells.

F_SETLEASE F_RDLCK is refused with EAGAIN while any writable descriptor or shared writable mapping of
the file exists, whatever its pauses and wherever it was opened on this host. A lease that is granted
is given back at once: while it is held, another's open for writing waits, and the kernel sends this
process SIGIO, whose default action is death.
"""

import errno
import fcntl
import os
import signal
from enum import Enum

from ckptd.errors import Bug
from ckptd.worker import beneath

_NO_LEASES = frozenset({errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK})


class Writer(Enum):
    """What the probe found."""

    NONE = "none"
    OPEN = "open"
    UNKNOWN = "unknown"  # not our file, or a file system without leases


def probe(fd: int) -> Writer:
    """Ask for a read lease on a regular file opened read-only, and give it back; takes microseconds.

    Bug when SIGIO is not ignored; OSError as the kernel says, other than "no leases here".
    """
    if signal.getsignal(signal.SIGIO) is not signal.SIG_IGN:
        raise Bug("SIGIO must be ignored before a lease is taken")
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EBUSY}:
            return Writer.OPEN
        if error.errno in _NO_LEASES:
            return Writer.UNKNOWN
        raise
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return Writer.NONE


def probe_at(directory_fd: int, path: str) -> Writer:
    """As `probe`, for a member of an open directory. A file that may not be read is UNKNOWN, one under a
    write lease is OPEN; FileNotFoundError and BadPath when it is gone or a link now.
    """
    try:
        fd = beneath.open_file(directory_fd, path)
    except PermissionError:
        return Writer.UNKNOWN
    except BlockingIOError:
        return Writer.OPEN
    try:
        return probe(fd)
    finally:
        os.close(fd)
