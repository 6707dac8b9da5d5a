"""What the kernel's error numbers mean for people: an OSError becomes the error of who must act."""

import errno
import os

from ckptd.errors import BadPath, Busy, CkptdError, Denied, DiskFault, Missing, NoSpace

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FAULT = frozenset({errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENXIO, errno.EUCLEAN, errno.ENODEV})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
# This process or this machine is out of something that comes back: nobody but time must act.
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})
_PATH = frozenset({errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EXDEV})


def coded(error: OSError) -> CkptdError | None:
    """Return the coded error for `error`, or None when its number blames nobody: then it is a bug.

    EFBIG is a limit on file size (ulimit or file system), so it is the owner of the space who acts.
    """
    number = error.errno
    cls: type[CkptdError]
    if number in _FULL:
        cls = NoSpace
    elif number in _FAULT:
        cls = DiskFault
    elif number in _DENIED:
        cls = Denied
    elif number == errno.ENOENT:
        cls = Missing
    elif number in _PATH:
        cls = BadPath
    elif number in _SCARCE:
        cls = Busy
    else:
        return None
    details = {} if error.filename is None else {"path": os.fsdecode(error.filename)}
    return cls(error.strerror or str(error), errno=errno.errorcode[number or 0], **details)
