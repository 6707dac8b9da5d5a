"""Small file systems of a test's own: a tmpfs, an ext4 on a loop device, and ways to fill one to its last byte.

They need root; where nothing can be mounted the test is skipped with the kernel's reason.
"""

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 1 << 20
_EXT4_SHUTDOWN = 0x8004587D
_WITHOUT_FLUSHING = 2


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


@contextmanager
def ext4(place: Path, image: Path, size_bytes: int) -> Iterator[Path]:
    """An ext4 on a loop device over `image`, which is sparse: its disk may be smaller than it says."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4 for a file system of its own")
    place.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1", image], check=True)
    found = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"can't mount a loop device: {found.stderr.strip()}")
    device = found.stdout.strip()
    try:
        subprocess.run(["mount", "-o", "errors=continue", device, place], check=True)
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=False)
        subprocess.run(["losetup", "-d", device], check=True)


def shut_down(place: Path) -> None:
    """Every further write, fsync and open of this ext4 fails with EIO, as on a disk that is gone."""
    fd = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _EXT4_SHUTDOWN, struct.pack("I", _WITHOUT_FLUSHING))
    finally:
        os.close(fd)


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
