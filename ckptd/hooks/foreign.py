"""Whether others could change the code that a hook is: then it is not run. Asked below a host, never in the daemon."""

import os
import stat


def why_not(path: str) -> str:
    """Return why this file or directory must not be run or imported from, "" when it may. OSError when it is not there.

    Others of its group or of the world may not write it; for root's daemon its owner must be root. A group that is
    the user's own (of the same number, as login makes them) has no others in it, and a sticky directory lets nobody replace
    another's files.
    """
    status = os.stat(path)
    writers = stat.S_IWOTH if status.st_gid == os.getegid() == os.geteuid() else stat.S_IWGRP | stat.S_IWOTH
    is_sticky = stat.S_ISDIR(status.st_mode) and bool(status.st_mode & stat.S_ISVTX)
    if status.st_mode & writers and not is_sticky:
        return f"others may write {path}: chmod go-w"
    if os.geteuid() == 0 and status.st_uid != 0:
        return f"{path} belongs to uid {status.st_uid}, and the daemon is root's"
    return ""
