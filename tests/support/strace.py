"""System calls of a running process that fail as told: strace attached to it for the length of a block."""

import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

ATTACH_S = 20.0
_FAILED = re.compile(r"\(INJECTED\)")


class Injection:
    """with Injection(pid, "fsync:error=EIO:when=2") as injected: ...; afterwards injected.shots says how often it fired.

    `when` counts the calls of one thread. The process goes on undisturbed before and after.
    """

    def __init__(self, pid: int, *what: str, traced: str = "") -> None:
        """Fail what is named by strace's own words; calls in `traced` are written down as well."""
        if shutil.which("strace") is None or os.geteuid() != 0:
            pytest.skip("needs root and strace to make system calls fail")
        handle, name = tempfile.mkstemp(prefix="ck-strace")
        os.close(handle)
        self._log = Path(name)
        calls = {expression.partition(":")[0] for expression in what} | set(filter(None, traced.split(",")))
        words = [f"--inject={expression}" for expression in what]
        command = ["strace", "-f", "-y", "-o", name, "-e", f"trace={','.join(sorted(calls))}", *words, "-p", str(pid)]
        self._strace = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self.calls: list[str] = []

    def __enter__(self) -> Self:
        said, stderr = b"", self._strace.stderr
        assert stderr is not None
        while b"attached" not in said:
            ready, _, _ = select.select([stderr], [], [], ATTACH_S)
            chunk = os.read(stderr.fileno(), 4096) if ready else b""
            if not chunk:
                self._end()
                pytest.skip(f"strace attaches to nothing here: {said.decode(errors='replace').strip()}")
            said += chunk
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._strace.poll() is None:
            self._strace.send_signal(signal.SIGTERM)  # it lets go of the process first
            self._strace.wait(timeout=ATTACH_S)
        if self._strace.stderr is not None:
            self._strace.stderr.close()
        self.calls = self._log.read_text(errors="replace").splitlines()
        self._log.unlink()

    @property
    def shots(self) -> int:
        """How many calls were made to fail; known when the block has ended."""
        return sum(bool(_FAILED.search(call)) for call in self.calls)
