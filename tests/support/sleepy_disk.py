"""A mount that hangs on demand, as one whose server is gone: run_sleepy_disk.py in a process of its own."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_sleepy_disk.py")
MOUNT_S = 20.0
END_S = 20.0
_ABORT = Path("/sys/fs/fuse/connections")


class SleepyDisk:
    """`path` is the mount; `hang("getattr", "read")` until `wake()`."""

    def __init__(self, home: Path) -> None:
        self.path, self._backing, self._control = home / "sleepy", home / "backing", home / "asleep"
        for directory in (self.path, self._backing):
            directory.mkdir()
        self._control.touch()
        words = [sys.executable, str(SCRIPT), str(self._backing), str(self.path), str(self._control)]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + MOUNT_S
        while not os.path.ismount(self.path):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                said = self._process.communicate()[1].strip()
                pytest.skip(f"no FUSE here: {said.splitlines()[-1] if said else 'it does not mount'}")
            time.sleep(0.02)
        self._connection = _ABORT / str(os.minor(os.stat(self.path).st_dev))

    def hang(self, *operations: str) -> None:
        """These operations do not return from now on."""
        self._control.write_text(" ".join(operations))

    def wake(self) -> None:
        """All go on."""
        self._control.write_text("")

    def end(self) -> None:
        """Wake everybody, unmount and end the process; what still hangs then gets an error."""
        self.wake()
        subprocess.run(["umount", "-l", str(self.path)], check=False, capture_output=True)
        abort = self._connection / "abort"
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            if abort.exists():
                abort.write_text("1")
            self._process.kill()
            self._process.wait(timeout=END_S)
        if self._process.stderr is not None:
            self._process.stderr.close()


@contextmanager
def sleepy_disk(home: Path) -> Iterator[SleepyDisk]:
    """Mount one; skip where there is no FUSE."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists() or shutil.which("fusermount") is None:
        pytest.skip("needs root and FUSE for a mount that hangs")
    pytest.importorskip("mfusepy")
    made = SleepyDisk(home)
    try:
        yield made
    finally:
        made.end()
