"""Whole or absent: the real worker, killed or failed at every step of a publish."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ckptd.worker.protocol import FileImage, FileRecord, Publish, Published, Sweep, Verified, Verify
from tests.support import tally
from tests.support.arena import MIB, publish_request, sealed
from tests.support.worker_process import Died, WorkerProcess

FILES = {"model.safetensors": os.urandom(MIB * 33 + 5), "deep/opt.safetensors": os.urandom(MIB), "state.json": b"{}"}

BEFORE_RENAME = [
    "copy.tmp_created",
    "copy.allocated",
    "copy.allocated:3",
    "copy.chunk",
    "copy.chunk:3",
    "copy.fsynced",
    "copy.fsynced:2",
    "manifest.written",
    "manifest.fsynced",
    "dir.fsynced",
]
AFTER_RENAME = ["publish.renamed", "parent.fsynced"]


@pytest.fixture(scope="module")
def arena() -> Iterator[tuple[int, list[FileImage]]]:
    made = sealed(FILES)
    yield made
    os.close(made[0])


@pytest.fixture
def request_(tmp_path: Path, arena: tuple[int, list[FileImage]]) -> Publish:
    return publish_request(tmp_path / "root", arena[1])


def listing(request: Publish) -> list[str]:
    parent = Path(request.target).parent
    return sorted(os.listdir(parent)) if parent.is_dir() else []


def assert_whole(worker: WorkerProcess, request: Publish) -> None:
    """The manifest on disk names the checkpoint, and every file reads back with its digest."""
    manifest = json.loads((Path(request.target) / "manifest.json").read_bytes())
    assert manifest["checkpoint"] == request.manifest["checkpoint"]
    records = msgspec.convert(manifest["files"], list[FileRecord])
    assert [record.path for record in records] == list(FILES)
    verified = worker.ask(Verify(root=request.root, path=request.target, files=records))
    assert isinstance(verified, Verified)
    assert verified.damage == []
    for path, data in FILES.items():
        assert (Path(request.target) / path).read_bytes() == data


def assert_recovers(request: Publish, fd: int, *, there: bool) -> None:
    """A fresh worker finds nothing or all of it, publishes once, and sweeps the rest."""
    name = Path(request.target).name
    assert (name in listing(request)) == there
    with WorkerProcess() as worker:
        if there:
            assert_whole(worker, request)
        done = worker.ask(request, fd)
        assert isinstance(done, Published)
        assert done.adopted == there
        assert_whole(worker, request)
        worker.ask(Sweep(root=request.root, older_s=0.0))
    assert listing(request) == [name]


@pytest.mark.parametrize("point", [*BEFORE_RENAME, *AFTER_RENAME])
def test_a_worker_killed_at_any_step_leaves_all_or_nothing(
    request_: Publish, arena: tuple[int, list[FileImage]], point: str
) -> None:
    """M021, F1."""
    with WorkerProcess(fail=f"{point}=kill") as worker:
        number = worker.send(request_, arena[0])
        with pytest.raises(Died) as died:
            worker.reply(number)
    assert died.value.status == -9
    tally.add("kills")
    assert_recovers(request_, arena[0], there=point in AFTER_RENAME)


@pytest.mark.parametrize(("fault", "code"), [("eio", "disk_fault"), ("enospc", "no_space")])
@pytest.mark.parametrize("point", [*BEFORE_RENAME, *AFTER_RENAME])
def test_a_disk_that_fails_at_any_step_is_a_coded_error_and_no_name(
    request_: Publish, arena: tuple[int, list[FileImage]], point: str, fault: str, code: str
) -> None:
    """F6, F8. A failed fsync is answered by one more try on new inodes; all else is told at once."""
    with WorkerProcess(fail=f"{point}={fault}") as worker:
        answer = worker.ask(request_, arena[0])
        if fault == "eio" and "fsynced" in point:
            assert isinstance(answer, Published)
            assert not answer.adopted
        else:
            assert answer["code"] == code
            assert listing(request_) == []
            assert isinstance(worker.ask(request_, arena[0]), Published)
        assert_whole(worker, request_)
    assert listing(request_) == [Path(request_.target).name]


def test_a_disk_that_loses_bytes_twice_is_told_and_nothing_is_named(
    request_: Publish, arena: tuple[int, list[FileImage]]
) -> None:
    """F7, I10. Never reported durable from an inode whose fsync failed."""
    with WorkerProcess(fail="copy.fsynced=eio,parent.fsynced=eio") as worker:
        assert worker.ask(request_, arena[0])["code"] == "disk_fault"
        assert listing(request_) == []
        assert isinstance(worker.ask(request_, arena[0]), Published)


def test_two_workers_that_publish_one_checkpoint_at_once_publish_it_once(
    request_: Publish, arena: tuple[int, list[FileImage]]
) -> None:
    """A worker that was abandoned as hung may wake up after its successor began."""
    with WorkerProcess(fail="dir.fsynced=delay:0.3") as slow, WorkerProcess() as quick:
        number = slow.send(request_, arena[0])
        first = quick.ask(request_, arena[0])
        second = msgspec.convert(slow.reply(number)["result"], Published)
        assert {first.adopted, second.adopted} == {True, False}
        assert first.identity == second.identity
        assert_whole(quick, request_)
    assert listing(request_) == [Path(request_.target).name]


def test_a_file_size_limit_is_a_coded_error(
    tmp_path: Path, request_: Publish, arena: tuple[int, list[FileImage]]
) -> None:
    """F9. EFBIG from RLIMIT_FSIZE, met by a real system call."""
    import resource

    with WorkerProcess() as worker:
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
        assert worker.ask(request_, arena[0])["code"] == "no_space"
        assert listing(request_) == []
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert isinstance(worker.ask(request_, arena[0]), Published)
