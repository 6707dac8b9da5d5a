"""What a power cut leaves: the real worker on a real ext4 that loses everything not yet on its disk.

SIGKILL proves nothing about fsync, for the kernel lives on and writes what it holds. Here the file
system is shut down without flushing its journal, and mounted again as after a power cut.
"""

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.worker.protocol import (
    Digest,
    Digested,
    Done,
    FileImage,
    Link,
    Publish,
    Published,
    Purge,
    Restore,
    Trash,
    Verify,
)
from tests.support.arena import MIB, publish_request, sealed
from tests.support.worker_process import Died, WorkerProcess

EXT4_IOC_SHUTDOWN = 0x8004587D
WITHOUT_FLUSHING_THE_JOURNAL = 2
FILES = {"model.safetensors": os.urandom(MIB * 5 + 5), "deep/opt.safetensors": os.urandom(4096), "state.json": b"{}"}
POINTS = ["copy.chunk", "copy.fsynced:3", "manifest.fsynced", "dir.fsynced", "publish.renamed", "parent.fsynced"]


class Disk:
    """An ext4 of its own on a loop device. `path` is its mount point."""

    def __init__(self, home: Path) -> None:
        self._image, self.path = home / "image", home / "mnt"
        self.path.mkdir()
        with self._image.open("wb") as image:
            image.truncate(64 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", self._image], check=True)
        self._mounted = False
        # One device for the image's whole life: a checkpoint's identity names the device's number.
        done = subprocess.run(["losetup", "-f", "--show", self._image], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"can't mount a loop device: {done.stderr.decode().strip()}")
        self._device = done.stdout.decode().strip()

    def mount(self) -> None:
        subprocess.run(["mount", self._device, self.path], check=True)
        self._mounted = True

    def give_back(self) -> None:
        self.unmount()
        subprocess.run(["losetup", "-d", self._device], check=True)

    def unmount(self) -> None:
        if self._mounted:
            subprocess.run(["umount", self.path], check=True)
            self._mounted = False

    def cut_power(self) -> None:
        """Lose all that is not on the disk, and come up again."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", WITHOUT_FLUSHING_THE_JOURNAL))
        finally:
            os.close(fd)
        self.unmount()
        self.mount()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4 for a file system of its own")
    made = Disk(tmp_path)
    made.mount()
    yield made
    made.give_back()


@pytest.fixture(scope="module")
def arena() -> Iterator[tuple[int, list[FileImage]]]:
    made = sealed(FILES)
    yield made
    os.close(made[0])


def assert_holds(target: Path) -> None:
    for name, data in FILES.items():
        assert (target / name).read_bytes() == data
    assert (target / "manifest.json").read_bytes().endswith(b"]\n}\n")


def published(disk: Disk, arena: tuple[int, list[FileImage]]) -> tuple[Publish, Published]:
    request = publish_request(disk.path / "root", arena[1])
    with WorkerProcess() as worker:
        done = worker.ask(request, arena[0])
    assert isinstance(done, Published)
    return request, done


def test_a_publish_that_was_answered_survives(disk: Disk, arena: tuple[int, list[FileImage]]) -> None:
    """F3, I1: root, project and experiment are new as well, and every name of them must be there."""
    request, done = published(disk, arena)
    disk.cut_power()
    assert_holds(Path(request.target))
    with WorkerProcess() as worker:
        verify = Verify(root=request.root, path=request.target, files=done.files)
        assert worker.ask(verify).damage == []


@pytest.mark.parametrize("point", POINTS)
def test_a_publish_cut_off_at_any_step_is_whole_or_absent_and_can_be_had_again(
    disk: Disk, arena: tuple[int, list[FileImage]], point: str
) -> None:
    """M021, F3, I2."""
    request = publish_request(disk.path / "root", arena[1])
    with WorkerProcess(fail=f"{point}=kill") as worker:
        number = worker.send(request, arena[0])
        with pytest.raises(Died):
            worker.reply(number)
    disk.cut_power()
    if Path(request.target).exists():
        assert_holds(Path(request.target))
    with WorkerProcess() as worker:
        assert isinstance(worker.ask(request, arena[0]), Published)
    disk.cut_power()
    assert_holds(Path(request.target))


def test_a_name_that_only_the_page_cache_knew_is_made_durable_by_its_adoption(
    disk: Disk, arena: tuple[int, list[FileImage]]
) -> None:
    """The first publish dies between its rename and the parent's fsync; the second finds it there."""
    request = publish_request(disk.path / "root", arena[1])
    with WorkerProcess(fail="publish.renamed=kill") as worker:
        number = worker.send(request, arena[0])
        with pytest.raises(Died):
            worker.reply(number)
    with WorkerProcess() as worker:
        assert worker.ask(request, arena[0]).adopted
    disk.cut_power()
    assert_holds(Path(request.target))


def test_a_digest_makes_other_peoples_files_durable(disk: Disk) -> None:
    """No trainer fsyncs what it writes: without us this checkpoint would be empty or gone."""
    path = disk.path / "runs/a/checkpoint-5"
    path.mkdir(parents=True)
    for name in ("model.bin", "optimizer.bin"):
        (path / name).write_bytes(FILES["model.safetensors"])
    with WorkerProcess() as worker:
        done = worker.ask(Digest(root=str(disk.path), path=str(path)))
        assert isinstance(done, Digested)
    disk.cut_power()
    with WorkerProcess() as worker:
        assert worker.ask(Verify(root=str(disk.path), path=str(path), files=done.files)).damage == []


def test_what_was_retired_restored_linked_or_purged_stays_so(disk: Disk, arena: tuple[int, list[FileImage]]) -> None:
    """An unlink or a rename that is not fsynced comes back after a power cut."""
    request, done = published(disk, arena)
    root, name = request.root, request.manifest["checkpoint"]
    target, binned = Path(request.target), Path(root) / ".ckptd-trash" / name
    link = target.parent / "latest"

    def ask(request: Trash | Restore | Purge | Link) -> None:
        with WorkerProcess() as worker:
            assert isinstance(worker.ask(request), Done)
        disk.cut_power()

    ask(Link(root=root, name=str(link), target=target.name))
    assert_holds(link)
    ask(Trash(root=root, path=str(target), identity=done.identity, trash=name))
    assert not target.exists()
    assert_holds(binned)
    ask(Restore(root=root, path=str(target), trash=name))
    assert not binned.exists()
    assert_holds(target)
    ask(Trash(root=root, path=str(target), identity=done.identity, trash=name))
    ask(Purge(root=root, trash=name))
    assert not binned.exists()
    ask(Link(root=root, name=str(link), target=""))
    assert not link.is_symlink()
