"""Arenas as the daemon makes them, filled as a client fills them, and requests that go with them."""

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptd.model import new_id
from ckptd.worker.protocol import FileImage, Publish
from ckptd_client import control

MIB = 1 << 20


def layout(files: Mapping[str, bytes]) -> tuple[list[FileImage], int]:
    """Where each file lies in an image, and how long the image is."""
    offset, images = control.PAGE, []
    for path, data in files.items():
        images.append(FileImage(path, offset, len(data)))
        offset = control.round_up(offset + len(data))
    return images, max(offset, 2 * control.PAGE)


def sealed(files: Mapping[str, bytes]) -> tuple[int, list[FileImage]]:
    """A memfd that holds `files`, sealed against shrinking and growing; the caller closes it."""
    images, size_bytes = layout(files)
    fd = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(fd, 0, size_bytes)
    fill(fd, files, images)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd, images


def spooled(path: Path, files: Mapping[str, bytes]) -> tuple[int, list[FileImage]]:
    """The same image as a plain file, as the spool holds it."""
    images, size_bytes = layout(files)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, size_bytes)
    fill(fd, files, images)
    return fd, images


def fill(fd: int, files: Mapping[str, bytes], images: list[FileImage]) -> None:
    for image, data in zip(images, files.values(), strict=True):
        written = 0
        while written < len(data):
            written += os.pwrite(fd, memoryview(data)[written:], image.offset + written)


def publish_request(root: Path, images: list[FileImage], **manifest: Any) -> Publish:
    """Ask for <root>/p/e/step_0000000001 unless `target` says otherwise."""
    target = manifest.pop("target", root / "p" / "e" / "step_0000000001")
    manifest = {"v": 1, "checkpoint": new_id(), "step": 1, **manifest}
    return Publish(root=str(root), target=str(target), files=images, manifest=manifest)
