"""What the descriptors of a process are."""

import contextlib
import os


def names(pid: int) -> list[str]:
    """Return what each leads to, but for those that closed since they were listed: a thread may do so at any time."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found
