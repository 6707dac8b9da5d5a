"""The `ckptd` command with each system call of it and its children written down: python run_traced.py FILE FLAGS...

The tracer is a grandchild, so that the daemon keeps the process number that its service manager knows.
"""

import os
import shutil
import sys

if __name__ == "__main__":
    out, *flags = sys.argv[1:]
    strace = str(shutil.which("strace"))
    tracing = [strace, "-D", "-f", "-qq", "-o", f"{out}.{os.getpid()}", "--signal=none", "-s", "0"]
    os.execv(strace, [*tracing, sys.executable, "-P", "-m", "ckptd", *flags])
