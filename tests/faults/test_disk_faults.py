"""Disks that are full, fail, or lie about what they took: the real worker, and system calls that really fail."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.worker.protocol import Digest, FileImage, Publish, Published, Scan, Scanned, Verified, Verify
from tests.support.arena import MIB, publish_request, sealed
from tests.support.disk import Disk, fill, tmpfs
from tests.support.strace import Injection
from tests.support.worker_process import WorkerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
FILES = {"model.safetensors": os.urandom(MIB + 5), "deep/opt.safetensors": os.urandom(70_000), "state.json": b"{}"}
SHOTS_MAX = 40  # calls of one kind in one publish; more of them would mean that the loop below never ends

CODES = {
    "ENOSPC": {"no_space"},
    "EDQUOT": {"no_space"},
    "EFBIG": {"no_space"},
    "EIO": {"disk_fault"},
    "EROFS": {"denied"},
    "EMFILE": {"busy"},
    "ENFILE": {"busy"},
    "ENOMEM": {"busy"},
    "EINTR": {"busy"},
}
SHORT = [("pwrite64", "ENOSPC"), ("fsync", "EIO"), ("renameat2", "EDQUOT"), ("openat2", "EMFILE"), ("mkdirat", "EROFS")]
CALLS = ("mkdirat", "openat2", "fallocate", "pwrite64", "write", "fsync", "renameat2", "sync_file_range")
LONG = [(call, error) for call in CALLS for error in CODES if (call, error) not in SHORT]


@pytest.fixture(scope="module")
def arena() -> Iterator[tuple[int, list[FileImage]]]:
    made = sealed(FILES)
    yield made
    os.close(made[0])


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess() as made:
        # A call that fails while the interpreter still starts, or imports a verb, would end the worker before any of ours.
        began = made.ask(Scan(root=str(tmp_path_factory.mktemp("empty")), managed=False))
        assert isinstance(began, Scanned)
        yield made


def leftovers(root: Path) -> list[str]:
    """Everything below a root but directories."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()) if root.exists() else []


def assert_whole(worker: WorkerProcess, request: Publish, done: Published) -> None:
    """What was answered is on the disk, and reads back with its digests."""
    verified = worker.ask(Verify(root=request.root, path=request.target, files=done.files))
    assert isinstance(verified, Verified)
    assert verified.damage == []
    for path, data in FILES.items():
        assert (Path(request.target) / path).read_bytes() == data


def assert_no_fsync_was_repeated(calls: list[str]) -> None:
    """I10. A file whose fsync failed is never asked again: the second fsync of lost bytes succeeds."""
    failed = set()
    for call in calls:
        found = re.search(r"fsync\(\d+<([^>]*\.(?:safetensors|json))>\)", call)
        if found and found[1] in failed:
            raise AssertionError(f"fsynced again after it failed: {call}")
        if found and "INJECTED" in call:
            failed.add(found[1])


@pytest.mark.parametrize(("call", "error"), [*SHORT, *(pytest.param(*pair, marks=pytest.mark.faults) for pair in LONG)])
def test_a_publish_whose_every_call_fails_in_turn_is_whole_or_absent(
    tmp_path: Path, worker: WorkerProcess, arena: tuple[int, list[FileImage]], call: str, error: str
) -> None:
    """F6, F8, F9. The n-th call fails, for n = 1, 2, ... until none is left: an answer or a coded error, never half of it."""
    for shot in range(1, SHOTS_MAX):
        request = publish_request(tmp_path / f"{shot}", arena[1])
        Path(request.root).mkdir()
        with Injection(worker.process.pid, f"{call}:error={error}:when={shot}", traced="fsync") as injected:
            answer = worker.ask(request, arena[0])
        if error != "EINTR":  # nothing failed: the call was cut short and is made again
            assert_no_fsync_was_repeated(injected.calls)
        if isinstance(answer, Published):
            assert_whole(worker, request, answer)
            if injected.shots == 0:
                assert shot > 1, f"a publish makes no {call}"
                return
            continue
        assert answer["code"] in CODES[error], (shot, answer)
        assert leftovers(Path(request.root)) == []
        again = worker.ask(request, arena[0])
        assert isinstance(again, Published), again
        assert_whole(worker, request, again)
    pytest.fail(f"over {SHOTS_MAX} calls of {call} in one publish")


@pytest.mark.parametrize("error", ["EIO", pytest.param("ENOMEM", marks=pytest.mark.faults)])
def test_a_scan_that_can_not_read_a_directory_never_says_that_it_saw_everything(
    tmp_path: Path, worker: WorkerProcess, error: str
) -> None:
    """F8. "Not found" would be taken for "gone"."""
    for number in range(3):
        directory = tmp_path / f"run{number}"
        directory.mkdir()
        (directory / "model.pt").write_bytes(b"x")
    for shot in range(1, SHOTS_MAX):
        with Injection(worker.process.pid, f"getdents64:error={error}:when={shot}") as injected:
            answer = worker.ask(Scan(root=str(tmp_path), managed=False))
        if injected.shots == 0:
            assert isinstance(answer, Scanned)
            assert answer.complete
            assert shot > 1
            return
        assert not isinstance(answer, Scanned) or not answer.complete, answer
    pytest.fail("a scan never ends")


def test_a_disk_that_takes_bytes_and_loses_them_at_the_fsync_names_nothing(
    tmp_path: Path, worker: WorkerProcess, arena: tuple[int, list[FileImage]]
) -> None:
    """F7, I10. A thin disk: ext4 says that there is room, and the disk below it has none; a second fsync would succeed."""
    with tmpfs(tmp_path / "thin", "24m") as thin, Disk(tmp_path, "ext4-thin", thin / "image") as disk:
        filler = fill(thin)
        request = publish_request(disk.path / "root", arena[1])
        with Injection(worker.process.pid, "getcwd:error=ENOENT:when=65535", traced="fsync") as traced:
            answer = worker.ask(request, arena[0])
        assert not isinstance(answer, Published), "the disk had room: the test proves nothing"
        assert answer["code"] in {"disk_fault", "no_space"}
        assert not Path(request.target).exists()
        failed = [call for call in traced.calls if "EIO" in call or "ENOSPC" in call]
        assert failed, "no fsync failed: the test proves nothing"
        filler.unlink()


def test_a_disk_that_is_gone_is_a_fault_for_every_verb(
    tmp_path: Path, worker: WorkerProcess, arena: tuple[int, list[FileImage]]
) -> None:
    """F8. After the shutdown of its file system each request is answered, by a code that names the disk."""
    with Disk(tmp_path, "ext4-thin") as disk:
        request = publish_request(disk.path / "root", arena[1])
        done = worker.ask(request, arena[0])
        assert isinstance(done, Published)
        disk.cut()
        late = publish_request(disk.path / "root", arena[1], target=disk.path / "root" / "p" / "e" / "step_2")
        assert worker.ask(late, arena[0])["code"] == "disk_fault"
        assert worker.ask(Digest(root=request.root, path=request.target))["code"] == "disk_fault"
        found = worker.ask(Verify(root=request.root, path=request.target, files=done.files))
        assert not isinstance(found, Verified) or found.damage, "read back from a disk that is gone"


@pytest.mark.faults
def test_a_thousand_flipped_bits_are_all_found(
    tmp_path: Path, worker: WorkerProcess, arena: tuple[int, list[FileImage]]
) -> None:
    """F10. One bit at a time, anywhere in what was published; the damage names its file and its MiB."""
    import random

    from tests.support import tally

    dice = random.Random(10)
    request = publish_request(tmp_path / "root", arena[1])
    done = worker.ask(request, arena[0])
    assert isinstance(done, Published)
    sizes = {path: len(data) for path, data in FILES.items()}
    total = sum(sizes.values())
    for _ in range(1000):
        at = dice.randrange(total)
        for path, size_bytes in sizes.items():  # noqa: B007 - the one it falls into
            if at < size_bytes:
                break
            at -= size_bytes
        file = Path(request.target) / path
        flip(file, at, 1 << dice.randrange(8))
        tally.add("bit flips")
        found: Any = worker.ask(Verify(root=request.root, path=request.target, files=done.files))
        assert [(damage.file, damage.mib) for damage in found.damage] == [(path, [at // MIB])]
        tally.add("bit flips found")
        flip(file, at, file.read_bytes()[at] ^ FILES[path][at])
    assert hashlib.sha256((Path(request.target) / "model.safetensors").read_bytes()).digest() == (
        hashlib.sha256(FILES["model.safetensors"]).digest()
    )


def flip(file: Path, at: int, mask: int) -> None:
    """Change the bits of one byte, and leave no trace in the file's times."""
    before = file.stat()
    with file.open("r+b") as raw:
        raw.seek(at)
        (byte,) = raw.read(1)
        raw.seek(at)
        raw.write(bytes([byte ^ mask]))
        raw.flush()
        os.fsync(raw.fileno())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
