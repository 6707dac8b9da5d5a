"""A secret in a file of its own: read when it is needed, so that it can be changed, and never kept or shown."""

import os
import stat

from ckptd.errors import BadConfig

BYTES_MAX = 4096


def read(path: str) -> bytes:
    """Return the file's content without the white space around it. Blocks.

    BadConfig when it is missing, empty, too large, or others than its owner could read it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadConfig(f"the secret file {path!r} can't be read: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
            raise BadConfig(
                f"the secret file {path!r} must be a file that only its owner can read", hint=f"chmod 600 {path}"
            )
        found = file.read(BYTES_MAX + 1).strip()
    if not found or len(found) > BYTES_MAX:
        raise BadConfig(f"the secret file {path!r} must hold 1 to {BYTES_MAX} bytes")
    return found
