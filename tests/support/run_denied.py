"""The `ckptd` command in a process that may never have memory both writable and executable, nor may its children.

PR_SET_MDWE (Linux 6.3) is the kernel's own form of MemoryDenyWriteExecute=. Elsewhere the test skips.
"""

import ctypes
import errno
import os
import sys

PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1


def deny() -> bool:
    """Set it for this process and all that it starts; False where the kernel can't."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0 or ctypes.get_errno() != errno.EINVAL


if __name__ == "__main__":
    assert deny()
    os.environ["MDWE"] = "refused"
    os.execv(sys.executable, [sys.executable, "-P", "-m", "ckptd", *sys.argv[1:]])
