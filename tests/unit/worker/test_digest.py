"""Files where they lie: durable, digested, and noticed when they change meanwhile."""

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from ckptd.errors import BadPath, DiskFault, NotFound, SourceChanged
from ckptd.worker import digest, fsync
from ckptd.worker.context import Cancelled, Context, Limits
from ckptd.worker.fsync import FsyncFailed
from ckptd.worker.hashing import FileDigest, HashThread
from ckptd.worker.protocol import Digest, Digested

MIB = 1 << 20
DATA = os.urandom(MIB * 9 + 12345)


def ask(root: Path, path: Path, context: Context | None = None) -> Digested:
    return digest.run(Digest(root=str(root), path=str(path)), context or Context())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "runs/step_5"
    (path / "rank0").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(DATA)
    (path / "rank0/shard.bin").write_bytes(b"shard")
    (path / "empty").touch()
    return path


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="compares with the real sha256sum")
def test_the_digest_is_what_sha256sum_prints(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(DATA)
    printed = subprocess.run(["sha256sum", path], capture_output=True, check=True, text=True).stdout.split()[0]
    done = ask(tmp_path, path)
    (record,) = done.files
    assert (record.path, record.sha256, record.size_bytes) == ("", printed, len(DATA))
    assert record.xxh3 == [xxhash.xxh3_64(DATA[at : at + MIB]).hexdigest() for at in range(0, len(DATA), MIB)]
    facts = path.stat()
    assert (done.identity.dev, done.identity.ino) == (facts.st_dev, facts.st_ino)
    assert (done.identity.size_bytes, done.identity.mtime_ns) == (len(DATA), facts.st_mtime_ns)


def test_a_directory_is_one_checkpoint_with_a_record_for_every_regular_file(tmp_path: Path, checkpoint: Path) -> None:
    """M006."""
    (checkpoint / "link").symlink_to("model.safetensors")
    os.mkfifo(checkpoint / "fifo")
    done = ask(tmp_path, checkpoint)
    assert [(record.path, record.sha256) for record in done.files] == [
        ("empty", hashlib.sha256(b"").hexdigest()),
        ("model.safetensors", hashlib.sha256(DATA).hexdigest()),
        ("rank0/shard.bin", hashlib.sha256(b"shard").hexdigest()),
    ]
    assert done.identity.ino == checkpoint.stat().st_ino
    assert done.identity.size_bytes == done.size_bytes == len(DATA) + 5


def test_every_file_and_every_name_up_to_the_root_is_fsynced(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else does: no trainer fsyncs its directories."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    ask(tmp_path, checkpoint)
    below = ["empty", "model.safetensors", "rank0/shard.bin"]
    above = [checkpoint / "rank0", checkpoint, checkpoint.parent, tmp_path]
    assert synced == [*(str(checkpoint / name) for name in below), *map(str, above)]


def meddle(checkpoint: Path) -> dict[str, Callable[[], object]]:
    model = checkpoint / "model.safetensors"

    def replace() -> None:
        (checkpoint.parent / "new").mkdir()
        checkpoint.rename(checkpoint.parent / "old")
        (checkpoint.parent / "new").rename(checkpoint)

    def overwrite() -> None:
        facts = model.stat()
        with model.open("r+b") as file:
            file.write(b"!")
        os.utime(model, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    def replace_above() -> None:
        checkpoint.parent.rename(checkpoint.parent.with_name("old"))
        checkpoint.mkdir(parents=True)

    def append() -> None:
        with model.open("ab") as file:
            file.write(b"!")

    return {
        "overwritten, its time set back": overwrite,
        "appended": append,
        "truncated": lambda: os.truncate(model, 100),
        "file removed": (checkpoint / "empty").unlink,
        "file added": (checkpoint / "rank0/more").touch,
        "file replaced": lambda: (checkpoint / "empty").rename(model),
        "directory replaced": replace,
        "a directory above replaced": replace_above,
    }


@pytest.mark.parametrize("change", list(meddle(Path())))
def test_any_change_while_it_is_read_is_noticed(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    act = meddle(checkpoint)[change]
    real = FileDigest.update
    done: list[bool] = []

    def update(self: FileDigest, view: memoryview) -> None:
        real(self, view)
        if not done and self.size_bytes > MIB:
            done.append(True)
            act()

    monkeypatch.setattr(FileDigest, "update", update)
    with pytest.raises(SourceChanged):
        ask(tmp_path, checkpoint)
    assert done


def test_a_single_file_renamed_over_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our descriptor still shows the old one, unchanged."""
    path, other = tmp_path / "model.pt", tmp_path / "other"
    path.write_bytes(b"old")
    other.write_bytes(b"new")
    os.link(path, tmp_path / "kept")
    real = FileDigest.update
    monkeypatch.setattr(FileDigest, "update", lambda self, view: (real(self, view), other.rename(path)))
    with pytest.raises(SourceChanged):
        ask(tmp_path, path)


def test_a_large_file_gives_signs_of_life_while_it_goes_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fsync of gigabytes that their writer left in memory could take longer than a worker may be silent."""
    monkeypatch.setattr(digest, "SLICE_BYTES", MIB)
    path, order = tmp_path / "model.bin", []
    path.write_bytes(DATA)
    monkeypatch.setattr(fsync.kernel, "sync_file_range", lambda _fd, at, size, _flags: order.append((at, size)))
    monkeypatch.setattr(fsync.os, "fsync", lambda _fd: order.append("fsync"))
    ask(tmp_path, path, Context(send=lambda _: order.append("alive"), limits=Limits(alive_every_s=0.0)))
    slices = -(-len(DATA) // MIB)
    begun = [step for at in range(slices) for step in ((at * MIB, MIB), "alive")]
    assert order[: 2 * slices] == begun
    assert order[2 * slices] == "fsync"


def test_a_failed_writeback_is_as_final_as_a_failed_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells a descriptor of it once: the fsync that follows, or another one, may succeed all the same."""
    monkeypatch.setattr(digest, "SLICE_BYTES", MIB)
    path, asked = tmp_path / "model.bin", []
    path.write_bytes(DATA)

    def failing(*_: object) -> None:
        asked.append(1)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(fsync.kernel, "sync_file_range", failing)
        with pytest.raises(FsyncFailed):
            ask(tmp_path, path)
    with pytest.raises(FsyncFailed):
        ask(tmp_path, path)
    path.write_bytes(DATA)  # its writer wrote it again
    assert ask(tmp_path, path).size_bytes == len(DATA)
    assert len(asked) == 1


def test_a_file_whose_fsync_failed_is_never_called_durable(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FsyncFailed):
        ask(tmp_path, checkpoint)
    monkeypatch.setattr(os, "fsync", real)
    with pytest.raises(FsyncFailed):
        ask(tmp_path, checkpoint)


def test_what_is_not_there_or_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ask(tmp_path, tmp_path / "gone")
    with pytest.raises(NotFound):
        ask(tmp_path / "gone", tmp_path / "gone/x")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadPath):
        ask(tmp_path, tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with pytest.raises(BadPath):
        ask(tmp_path, tmp_path / "link")


def test_a_cancelled_digest_stops(tmp_path: Path, checkpoint: Path) -> None:
    context = Context()
    context.cancelled.set()
    with pytest.raises(Cancelled):
        ask(tmp_path, checkpoint, context)


def test_the_error_of_a_read_is_told_though_it_still_holds_a_buffer_of_the_digest() -> None:
    held = []

    def fail() -> None:
        with HashThread() as hasher:
            buffer = hasher.buffer()
            held.append(buffer[:3])
            hasher.give_back(buffer)
            raise DiskFault("gone")

    with pytest.raises(DiskFault, match="gone"):
        fail()
    assert bytes(held[0]) == bytes(3)
