"""Read back and compare: every damage is found and named, and nothing sound is called damaged."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptd.errors import BadPath, SourceChanged
from ckptd.worker import beneath, digest, verify
from ckptd.worker.context import Context
from ckptd.worker.protocol import DamageRecord, Digest, FileRecord, Verified, Verify

MIB = 1 << 20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "step_1"
    path.mkdir()
    tensors = {f"layer.{i}.weight": np.arange(i, i + MIB // 4, dtype=np.float32) for i in range(3)}
    save_file(tensors, path / "model.safetensors")
    (path / "optimizer.bin").write_bytes(random.Random(1).randbytes(MIB * 2 + 77))
    (path / "other.bin").write_bytes(random.Random(2).randbytes(MIB * 2 + 77))
    (path / "state.json").write_bytes(b'{"v":1}')
    return path


@pytest.fixture
def records(tmp_path: Path, checkpoint: Path) -> list[FileRecord]:
    return digest.run(Digest(root=str(tmp_path), path=str(checkpoint)), Context()).files


def ask(root: Path, path: Path, records: list[FileRecord]) -> Verified:
    return verify.run(Verify(root=str(root), path=str(path), files=records), Context())


def damage(root: Path, path: Path, records: list[FileRecord]) -> list[DamageRecord]:
    return ask(root, path, records).damage


def test_a_sound_checkpoint_has_no_damage_and_extra_files_are_none(
    tmp_path: Path, checkpoint: Path, records: list[FileRecord]
) -> None:
    (checkpoint / "notes.txt").write_bytes(b"by a person")
    done = ask(tmp_path, checkpoint, records)
    assert done.damage == []
    assert done.read_bytes == sum(record.size_bytes for record in records)


def flip(path: Path, rng: random.Random) -> tuple[Path, int]:
    at = rng.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << rng.randrange(8))]))
    return path, at


def zero_block(path: Path, rng: random.Random) -> tuple[Path, int]:
    """A block that was never written after a power cut: full size, all zeros."""
    at = rng.randrange(path.stat().st_size // 4096) * 4096 if path.stat().st_size > 4096 else 0
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(min(4096, path.stat().st_size - at)))
    return path, at


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("harm", [flip, zero_block])
def test_every_random_flip_and_every_zeroed_block_is_found_in_its_mib(
    tmp_path: Path,
    checkpoint: Path,
    records: list[FileRecord],
    harm: Callable[[Path, random.Random], tuple[Path, int]],
    seed: int,
) -> None:
    """M072. 100 rounds of each harm in all; no size changes, so only a digest can tell."""
    rng = random.Random(seed)
    for _ in range(25):
        victim = checkpoint / rng.choice(records).path
        sound = victim.read_bytes()
        path, at = harm(victim, rng)
        (found,) = damage(tmp_path, checkpoint, records)
        assert (found.file, found.kind, found.mib) == (path.name, "digest", [at // MIB])
        victim.write_bytes(sound)
    assert damage(tmp_path, checkpoint, records) == []


def test_the_tensor_in_which_damage_falls_is_named(tmp_path: Path, checkpoint: Path, records: list[FileRecord]) -> None:
    path = checkpoint / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as file:
        file.seek(header + MIB * 2 + 5000)
        file.write(b"\xff\x00\xff")
    (found,) = damage(tmp_path, checkpoint, records)
    assert found.mib == [2]
    assert "layer.2.weight" in found.tensors
    assert "layer.0.weight" not in found.tensors


def test_a_destroyed_header_is_damage_without_names(
    tmp_path: Path, checkpoint: Path, records: list[FileRecord]
) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)
    (found,) = damage(tmp_path, checkpoint, records)
    assert (found.kind, found.mib, found.tensors) == ("digest", [0], [])


def test_each_status_has_one_cause(tmp_path: Path, checkpoint: Path, records: list[FileRecord]) -> None:
    """M071. missing, size, format and digest in one checkpoint, each told apart."""
    (checkpoint / "state.json").unlink()
    os.truncate(checkpoint / "optimizer.bin", 4096)
    (checkpoint / "other.bin").unlink()
    (checkpoint / "other.bin").mkdir()
    found = {each.file: each.kind for each in damage(tmp_path, checkpoint, records)}
    assert found == {"state.json": "missing", "optimizer.bin": "size", "other.bin": "format"}


@pytest.mark.parametrize("size_bytes", [0, 1, 4095, MIB, MIB * 2 + 76, MIB * 2 + 78])
def test_a_file_of_another_size_is_never_called_sound(
    tmp_path: Path, checkpoint: Path, records: list[FileRecord], size_bytes: int
) -> None:
    os.truncate(checkpoint / "optimizer.bin", size_bytes)
    (found,) = damage(tmp_path, checkpoint, records)
    assert (found.file, found.kind) == ("optimizer.bin", "size")


def test_swapped_files_of_one_size_are_both_found(tmp_path: Path, checkpoint: Path, records: list[FileRecord]) -> None:
    (checkpoint / "optimizer.bin").rename(checkpoint / "x")
    (checkpoint / "other.bin").rename(checkpoint / "optimizer.bin")
    (checkpoint / "x").rename(checkpoint / "other.bin")
    found = damage(tmp_path, checkpoint, records)
    assert [(each.file, each.kind, each.mib) for each in found] == [
        ("optimizer.bin", "digest", [0, 1, 2]),
        ("other.bin", "digest", [0, 1, 2]),
    ]


def test_a_missing_checkpoint_is_damage_of_all_its_files(
    tmp_path: Path, checkpoint: Path, records: list[FileRecord]
) -> None:
    checkpoint.rename(tmp_path / "elsewhere")
    assert [each.kind for each in damage(tmp_path, checkpoint, records)] == ["missing"] * len(records)


def test_a_single_file_is_verified_under_its_own_path(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    records = digest.run(Digest(root=str(tmp_path), path=str(path)), Context()).files
    assert damage(tmp_path, path, records) == []
    path.write_bytes(b"weighty")
    (found,) = damage(tmp_path, path, records)
    assert (found.file, found.kind) == ("", "digest")


def test_a_symlink_in_place_of_a_file_is_damage_and_is_not_followed(
    tmp_path: Path, checkpoint: Path, records: list[FileRecord]
) -> None:
    """M201. Even when it leads to the very same bytes."""
    (checkpoint / "other.bin").rename(tmp_path / "moved")
    (checkpoint / "other.bin").symlink_to(tmp_path / "moved")
    (found,) = damage(tmp_path, checkpoint, records)
    assert (found.file, found.kind) == ("other.bin", "format")


def test_mib_that_the_disk_cannot_read_are_named_and_the_rest_is_still_read(
    tmp_path: Path, checkpoint: Path, records: list[FileRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("model.safetensors"):
            end = offset + len(buffers[0])
            if offset < MIB + 5000 < end:
                raise OSError(errno.EIO, "bad sector")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    (found,) = damage(tmp_path, checkpoint, records)
    assert (found.file, found.kind, found.mib) == ("model.safetensors", "unreadable", [1])
    assert set(found.tensors) == {"layer.0.weight", "layer.1.weight"}


@pytest.mark.parametrize("refuses", ["open", "read"])
def test_a_file_system_without_o_direct_is_verified_through_the_cache(
    tmp_path: Path,
    checkpoint: Path,
    records: list[FileRecord],
    monkeypatch: pytest.MonkeyPatch,
    refuses: str,
) -> None:
    """Pages are dropped before each read, so that the bytes still come from the disk."""
    real_open, real_read = beneath.open_beneath, os.preadv
    dropped: list[int] = []

    def open_beneath(at: int, parts: tuple[str, ...], flags: int, **named: bool) -> int:
        if refuses == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real_open(at, parts, flags, **named)

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "unaligned")
        return real_read(fd, buffers, offset)

    monkeypatch.setattr(beneath, "open_beneath", open_beneath)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, n, advice: dropped.append(advice))
    assert damage(tmp_path, checkpoint, records) == []
    assert dropped
    assert set(dropped) == {os.POSIX_FADV_DONTNEED}
    flip(checkpoint / "optimizer.bin", random.Random(3))
    assert [each.kind for each in damage(tmp_path, checkpoint, records)] == ["digest"]


def test_bytes_come_from_the_disk_and_not_from_memory(
    tmp_path: Path, checkpoint: Path, records: list[FileRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the cache would verify the memory that the bytes were just written from."""
    flags_seen: list[int] = []
    real = beneath.open_beneath
    monkeypatch.setattr(
        beneath,
        "open_beneath",
        lambda at, parts, flags, **named: flags_seen.append(flags) or real(at, parts, flags, **named),
    )
    ask(tmp_path, checkpoint, records)
    assert len(flags_seen) == len(records)
    assert all(flags & os.O_DIRECT for flags in flags_seen)


def test_a_file_written_to_while_it_is_verified_is_no_damage(
    tmp_path: Path, checkpoint: Path, records: list[FileRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        got = real(fd, buffers, offset)
        flip(checkpoint / "optimizer.bin", random.Random(4))
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(SourceChanged):
        ask(tmp_path, checkpoint, [record for record in records if record.path == "optimizer.bin"])


def test_a_record_that_leaves_the_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    """M201."""
    with pytest.raises(BadPath):
        ask(tmp_path, checkpoint, [FileRecord("../../etc/passwd", 1, "00")])
