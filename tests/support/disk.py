"""File systems of a test's own: ext4 and XFS on loop devices, whose power can be cut, and a small one in memory.

`cut()` shuts a file system down without flushing its journal: every call fails as on a disk that is gone.
`replay()` mounts it again, which is what happens after a power cut. What was not durable is gone then;
SIGKILL alone never shows that, for the kernel lives on and writes what it holds.

All need root; where nothing can be mounted the test is skipped with the kernel's reason.
"""

import ctypes
import errno
import fcntl
import gc
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32): XFS_IOC_GOINGDOWN, and ext4's the same
WITHOUT_FLUSHING_THE_LOG = 2
MIB = 1 << 20
# What mkfs takes, how large the image is (sparse), and what mount(2) takes. XFS refuses less than 300 MB.
KINDS = {
    "ext4": ("mkfs.ext4 -q -F", 64 * MIB, ""),
    "ext4-noauto": ("mkfs.ext4 -q -F", 64 * MIB, "noauto_da_alloc"),
    # Writes as little as can be before anybody asks, and goes on after an error: its disk may be smaller than it says.
    "ext4-thin": ("mkfs.ext4 -q -F -E lazy_itable_init=1", 64 * MIB, "errors=continue"),
    "xfs": ("mkfs.xfs -q -f", 300 * MIB, ""),
}
BUSY_TRIES = 1000
BUSY_S = 0.02
DETACH = 2  # umount2(2): out of sight now, gone when the last descriptor is

_libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """One file system. `path` is its mount point; `cuts` counts what it went through.

    It keeps one loop device for its whole life: a checkpoint's identity names the device's number.
    """

    def __init__(self, home: Path, kind: str, image: Path | None = None) -> None:
        """Make and mount it under `home`, over `image` (home / "KIND.image"). Skips the test where that can't be had."""
        command, size_bytes, self._options = KINDS[kind]
        make = command.split()
        if os.geteuid() != 0 or shutil.which(make[0]) is None:
            pytest.skip(f"needs root and {make[0]} for a file system of its own")
        self.kind, self.cuts = kind, 0
        self._type = kind.partition("-")[0]
        self._image, self.path = image or home / f"{kind}.image", home / kind
        self.path.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(size_bytes)
        subprocess.run([*make, self._image], check=True)
        done = subprocess.run(["losetup", "-f", "--show", self._image], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"can't mount a loop device: {done.stderr.decode().strip()}")
        self._device = done.stdout.decode().strip()
        self._mounted = False
        self.mount()

    def __enter__(self) -> Self:
        """Return the disk, mounted."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        self.give_back()

    @property
    def counted(self) -> str:
        """The name under which cuts of this file system are counted."""
        return f"power cuts {self._type}"

    def mount(self) -> None:
        """Mount it; the journal is replayed."""
        given = (self._device.encode(), os.fsencode(self.path), self._type.encode(), 0, self._options.encode())
        if _libc.mount(*given) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), self._device)
        self._mounted = True

    def unmount(self) -> None:
        """Unmount it. OSError when somebody keeps a descriptor in it."""
        if not self._mounted:
            return
        for attempt in range(BUSY_TRIES):
            if _libc.umount2(os.fsencode(self.path), 0) == 0:
                self._mounted = False
                return
            if attempt == 0:
                gc.collect()  # a traceback may hold a frame that holds a file
            time.sleep(BUSY_S)  # a process that was killed lets go of its descriptors a moment later
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(self.path))

    def cut(self) -> None:
        """Cut the power: from here on nothing reaches the disk, and every call fails.

        But for one: an fsync that is under way may say that it succeeded, while its transaction is thrown away
        (ext4 of Linux 6.18; a bare loop of append and fsync shows it, always for its last write). A machine
        without power says nothing: so what is said after this began is nobody's acknowledgement.
        """
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", WITHOUT_FLUSHING_THE_LOG))
        finally:
            os.close(fd)
        self.cuts += 1

    def replay(self) -> None:
        """Come up again after a cut.

        Another process may have a mount namespace of its own, with a copy of ours: what is mounted then is
        the dead file system once more, until that process has ended.
        """
        for _ in range(BUSY_TRIES):
            self.unmount()
            self.mount()
            if self._lives():
                return
            time.sleep(BUSY_S * 10)
        raise OSError(errno.EBUSY, "another mount namespace keeps the file system that was cut off", str(self.path))

    def _lives(self) -> bool:
        try:
            os.listdir(self.path)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        return True

    def cut_power(self) -> None:
        """Lose all that is not on the disk, and come up again."""
        self.cut()
        self.replay()

    def settle(self) -> None:
        """Let everything written so far reach the disk: what a test begins with is durable."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            if _libc.syncfs(fd) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(self.path))
        finally:
            os.close(fd)

    def give_back(self) -> None:
        """Unmount for good and let go of the device and the image; also after a test that failed with files open."""
        try:
            self.unmount()
        except OSError:
            _libc.umount2(os.fsencode(self.path), DETACH)
            raise
        finally:
            subprocess.run(["losetup", "-d", self._device], check=True)  # the kernel does it once nobody has it open
            self._image.unlink()


@contextmanager
def tmpfs(place: Path, size: str) -> Iterator[Path]:
    """A file system in memory that holds `size` and not a byte more."""
    if os.geteuid() != 0:
        pytest.skip("needs root: a file system of its own")
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(directory: Path) -> Path:
    """Take the last byte of a file system; return the file that holds it."""
    path = directory / "filler"
    with path.open("ab", buffering=0) as filler:
        for size in (MIB, 4096, 1):
            try:
                while filler.write(b"x" * size):
                    pass
            except OSError:
                continue
    return path


def free_bytes(directory: Path) -> int:
    """What the file system has left for everybody."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
