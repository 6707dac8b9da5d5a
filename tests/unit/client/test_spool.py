"""The spool: whole under its final name, or not there."""

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd_client import control, spool

ID = "0123456789abcdef" * 2
OTHER = "f" * 32


def image(pages: int = 4, fill: int = 7) -> memoryview:
    """Page-aligned memory, as an arena's."""
    memory = mmap.mmap(-1, pages * control.PAGE)
    memory[:] = bytes([fill]) * len(memory)
    return memoryview(memory)


def test_an_image_lies_there_byte_by_byte(tmp_path: Path):
    path = spool.write_arena(str(tmp_path), ID, image())
    assert path == str(tmp_path / f"{ID}.arena")
    assert Path(path).read_bytes() == bytes([7]) * 4 * control.PAGE
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert [e.name for e in os.scandir(tmp_path)] == [f"{ID}.arena"]


def test_unaligned_memory_is_written_as_well(tmp_path: Path):
    """O_DIRECT refuses it at the first write, after the file was opened with it."""
    body = memoryview(bytearray(os.urandom(3 * control.PAGE + 1)))[1:]
    assert Path(spool.write_arena(str(tmp_path), ID, body)).read_bytes() == bytes(body)


def test_an_image_larger_than_one_write_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spool, "CHUNK_BYTES", 2 * control.PAGE)
    memory = mmap.mmap(-1, 5 * control.PAGE)
    memory[:] = os.urandom(len(memory))
    assert Path(spool.write_arena(str(tmp_path), ID, memoryview(memory))).read_bytes() == memory[:]


def test_a_short_write_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 2 // 512 * 512)]))
    body = image(8)
    assert Path(spool.write_arena(str(tmp_path), ID, body)).read_bytes() == bytes(body)


@pytest.mark.parametrize("failing", ["write", "fsync", "posix_fallocate", "rename"])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        spool.write_arena(str(tmp_path), ID, image())
    assert not list(tmp_path.iterdir())


def test_what_changed_while_it_was_written_gets_no_name(tmp_path: Path):
    """The last look is taken after the last byte and before the rename."""
    seen: list[list[str]] = []

    def changed() -> None:
        seen.append([entry.name for entry in tmp_path.iterdir()])
        raise OSError("lent again")

    with pytest.raises(OSError, match="lent again"):
        spool.write_arena(str(tmp_path), ID, image(), check=changed)
    assert seen == [[f"{ID}.arena.tmp-{os.getpid()}"]]
    assert not list(tmp_path.iterdir())


def test_the_order_is_bytes_then_fsync_then_name_then_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    for name in ("write", "fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (steps.append(name), real(*a))[1])
    spool.write_arena(str(tmp_path), ID, image())
    assert steps == ["write", "fsync", "rename", "fsync"]


def test_a_kill_at_any_moment_leaves_the_name_absent_or_whole(tmp_path: Path):
    """The process dies in the middle of its writes: what it leaves is a temporary name that anyone may remove."""
    script = (
        "import mmap, os, sys; from ckptd_client import spool\n"
        "real, n = os.write, [0]\n"
        "def write(fd, data):\n"
        "    n[0] += 1\n"
        "    if n[0] == 3: os.kill(os.getpid(), 9)\n"
        "    return real(fd, data)\n"
        "os.write, spool.CHUNK_BYTES = write, 4096\n"
        f"spool.write_arena({str(tmp_path)!r}, {ID!r}, memoryview(mmap.mmap(-1, 5 * 4096)))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert not list(spool.entries(str(tmp_path)))
    (left,) = spool.abandoned(str(tmp_path))
    assert left.startswith(str(tmp_path / f"{ID}.arena.tmp-"))


def test_entries_are_whole_ones_in_the_order_they_came(tmp_path: Path):
    spool.write_offer(str(tmp_path), OTHER, {"path": "/x"})
    spool.write_arena(str(tmp_path), ID, image())
    os.utime(tmp_path / f"{OTHER}.offer", ns=(1, 1))
    (tmp_path / f"{ID}.arena.tmp-1").touch()
    (tmp_path / "README").touch()
    (tmp_path / f"{'a' * 32}.arena").symlink_to("/etc/passwd")
    found = list(spool.entries(str(tmp_path)))
    assert [(e.checkpoint, e.kind) for e in found] == [(OTHER, "offer"), (ID, "arena")]
    assert list(spool.entries(str(tmp_path / "none"))) == []


def test_the_temporary_files_of_living_processes_are_not_abandoned(tmp_path: Path):
    (tmp_path / f"{ID}.arena.tmp-{os.getpid()}").touch()
    (tmp_path / f"{OTHER}.offer.tmp-999999999").touch()
    assert list(spool.abandoned(str(tmp_path))) == [str(tmp_path / f"{OTHER}.offer.tmp-999999999")]


def test_what_a_process_of_another_pid_namespace_writes_is_not_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its number means nothing here, or somebody else; that it has the file locked means that it lives."""
    monkeypatch.setattr(os, "getpid", lambda: 999999999)
    found: list[list[str]] = []
    spool.write_arena(str(tmp_path), ID, image(), check=lambda: found.append(list(spool.abandoned(str(tmp_path)))))
    assert found == [[]]
    assert [entry.checkpoint for entry in spool.entries(str(tmp_path))] == [ID]


def test_a_file_that_is_swept_before_its_writer_has_it_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lock, swept = fcntl.flock, []

    def late(fd: int, how: int) -> None:
        if not swept:
            swept.extend(tmp_path.iterdir())
            swept[0].unlink()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    body = image()
    assert Path(spool.write_arena(str(tmp_path), ID, body)).read_bytes() == bytes(body)
    assert len(swept) == 1


def test_where_files_can_not_be_locked_the_pid_says_who_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(_fd: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    spool.write_arena(str(tmp_path), ID, image())
    (tmp_path / f"{OTHER}.offer.tmp-999999999").touch()
    (tmp_path / f"{OTHER}.offer.tmp-{os.getpid()}").touch()
    (tmp_path / f"{ID}.arena.tmp-999999999").symlink_to("/etc/passwd")
    left = {os.path.basename(path) for path in spool.abandoned(str(tmp_path))}
    assert left == {f"{OTHER}.offer.tmp-999999999", f"{ID}.arena.tmp-999999999"}


def test_an_offer_reads_back_as_it_was(tmp_path: Path):
    path = spool.write_offer(str(tmp_path), ID, {"path": "/x/é", "step": 3})
    assert spool.read_offer(path) == {"path": "/x/é", "step": 3}


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"{", b"{" + b" " * spool.OFFER_BYTES_MAX + b"}"])
def test_what_is_no_offer_is_none(tmp_path: Path, body: bytes):
    (tmp_path / "x.offer").write_bytes(body)
    assert spool.read_offer(str(tmp_path / "x.offer")) is None


def test_sizes_that_can_t_be_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="not a multiple"):
        spool.write_arena(str(tmp_path), ID, memoryview(b"x"))
    with pytest.raises(ValueError, match="at most"):
        spool.write_offer(str(tmp_path), ID, {"note": "x" * spool.OFFER_BYTES_MAX})


def test_the_spool_has_a_limit_and_leaves_room_on_the_disk(tmp_path: Path):
    spool.write_arena(str(tmp_path), ID, image())
    spool.check_room(str(tmp_path), 1000, 1 << 20)
    with pytest.raises(spool.SpoolFull, match="limit of"):
        spool.check_room(str(tmp_path), 1000, 4 * control.PAGE)
    with pytest.raises(spool.SpoolFull, match="no room"):
        spool.check_room(str(tmp_path), 1 << 60, 1 << 62)
    assert spool.used_bytes(str(tmp_path)) == 4 * control.PAGE
    assert spool.used_bytes(str(tmp_path / "none")) == 0
