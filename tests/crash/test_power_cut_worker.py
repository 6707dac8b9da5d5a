"""The real worker, asked over its socket, on disks whose power fails."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.worker.protocol import Digest, Digested, Done, FileImage, Link, Publish, Published, Purge, Restore, Trash
from ckptd.worker.protocol import Verify as VerifyRequest
from tests.support import tally
from tests.support.arena import MIB, publish_request, sealed
from tests.support.disk import Disk
from tests.support.worker_process import Died, WorkerProcess

pytestmark = pytest.mark.xdist_group("loop")

FILES = {"model.safetensors": os.urandom(MIB * 5 + 5), "deep/opt.safetensors": os.urandom(4096), "state.json": b"{}"}
POINTS = ["copy.chunk", "copy.fsynced:3", "manifest.fsynced", "dir.fsynced", "publish.renamed", "parent.fsynced"]


@pytest.fixture(params=["ext4", "xfs"])
def disk(disks: Callable[[str], Disk], request: pytest.FixtureRequest) -> Iterator[Disk]:
    found = disks(request.param)
    cuts = found.cuts
    yield found
    tally.add(found.counted, found.cuts - cuts)


@pytest.fixture
def root(disk: Disk) -> Iterator[Path]:
    """A root of the test's own, on that disk."""
    made = disk.path / "root"
    yield made
    shutil.rmtree(made)
    disk.settle()


@pytest.fixture(scope="module")
def arena() -> Iterator[tuple[int, list[FileImage]]]:
    made = sealed(FILES)
    yield made
    os.close(made[0])


def assert_holds(target: Path) -> None:
    for name, data in FILES.items():
        assert (target / name).read_bytes() == data
    assert (target / "manifest.json").read_bytes().endswith(b"]\n}\n")


def killed(request: Publish, fd: int, point: str) -> None:
    with WorkerProcess(fail=f"{point}=kill") as worker:
        number = worker.send(request, fd)
        with pytest.raises(Died):
            worker.reply(number)


@pytest.mark.parametrize("point", POINTS)
def test_a_publish_cut_off_at_a_named_step_is_whole_or_absent_and_can_be_had_again(
    disk: Disk, root: Path, arena: tuple[int, list[FileImage]], point: str
) -> None:
    """M021, F3, I1, I2: the worker dies there, then the power does; what the next one answers survives."""
    request = publish_request(root, arena[1])
    killed(request, arena[0], point)
    disk.cut_power()
    if Path(request.target).exists():
        assert_holds(Path(request.target))
    with WorkerProcess() as worker:
        done = worker.ask(request, arena[0])
    assert isinstance(done, Published)
    disk.cut_power()
    assert_holds(Path(request.target))
    with WorkerProcess() as worker:
        verify = VerifyRequest(root=request.root, path=request.target, files=done.files)
        assert worker.ask(verify).damage == []


def test_a_name_that_only_the_page_cache_knew_is_made_durable_by_its_adoption(
    disk: Disk, root: Path, arena: tuple[int, list[FileImage]]
) -> None:
    """The first publish dies between its rename and the parent's fsync; the second finds it there."""
    request = publish_request(root, arena[1])
    killed(request, arena[0], "publish.renamed")
    with WorkerProcess() as worker:
        assert worker.ask(request, arena[0]).adopted
    disk.cut_power()
    assert_holds(Path(request.target))


def test_a_digest_makes_other_peoples_files_durable(disk: Disk, root: Path) -> None:
    """No trainer fsyncs what it writes: without us this checkpoint would be empty or gone."""
    path = root / "runs/a/checkpoint-5"
    path.mkdir(parents=True)
    for name in ("model.bin", "optimizer.bin"):
        (path / name).write_bytes(FILES["model.safetensors"])
    with WorkerProcess() as worker:
        done = worker.ask(Digest(root=str(disk.path), path=str(path)))
        assert isinstance(done, Digested)
    disk.cut_power()
    with WorkerProcess() as worker:
        assert worker.ask(VerifyRequest(root=str(disk.path), path=str(path), files=done.files)).damage == []


def test_what_was_retired_restored_linked_or_purged_stays_so(
    disk: Disk, root: Path, arena: tuple[int, list[FileImage]]
) -> None:
    """An unlink or a rename that is not fsynced comes back after a power cut."""
    request = publish_request(root, arena[1])
    name, target = request.manifest["checkpoint"], Path(request.target)
    binned, link = root / ".ckptd-trash" / name, target.parent / "latest"
    with WorkerProcess() as worker:
        done = worker.ask(request, arena[0])

    def ask(verb: Trash | Restore | Purge | Link) -> None:
        with WorkerProcess() as worker:
            assert isinstance(worker.ask(verb), Done)
        disk.cut_power()

    ask(Link(root=request.root, name=str(link), target=target.name))
    assert_holds(link)
    ask(Trash(root=request.root, path=str(target), identity=done.identity, trash=name))
    assert not target.exists()
    assert_holds(binned)
    ask(Restore(root=request.root, path=str(target), identity=done.identity, trash=name))
    assert not binned.exists()
    assert_holds(target)
    ask(Trash(root=request.root, path=str(target), identity=done.identity, trash=name))
    ask(Purge(root=request.root, trash=name))
    assert not binned.exists()
    ask(Link(root=request.root, name=str(link), target=""))
    assert not link.is_symlink()
