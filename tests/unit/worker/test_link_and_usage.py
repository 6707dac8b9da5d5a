"""The links beside checkpoints, and what is said about a file system."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from ckptd.errors import BadPath, DiskFault, Exists
from ckptd.worker import link, usage
from ckptd.worker.context import Context
from ckptd.worker.protocol import Link, Usage


def set_link(root: Path, target: str, name: str = "latest") -> int:
    return link.run(Link(root=str(root), name=str(root / name), target=target), Context()).count


def test_a_link_follows_its_newest_target_and_goes_when_told(tmp_path: Path) -> None:
    """M108."""
    assert [set_link(tmp_path, target) for target in ("a", "a", "b", "", "")] == [1, 0, 1, 1, 0]
    assert set_link(tmp_path, "step_1") == 1
    assert os.readlink(tmp_path / "latest") == "step_1"
    assert os.listdir(tmp_path) == ["latest"]


def after_one_bad_moment(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the next fsync of a directory fail; return what was asked for, by inode and time of change."""
    real, asked = os.fsync, []

    def fsync(fd: int) -> None:
        facts = os.fstat(fd)
        asked.append((facts.st_ino, facts.st_mtime_ns))
        if len(asked) == 1:
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return asked


def test_one_bad_moment_of_a_disk_does_not_end_a_link_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed fsync is never asked for again: the link is made again first."""
    target = "step_2"
    set_link(tmp_path, "step_1")
    asked = after_one_bad_moment(monkeypatch)
    with pytest.raises(DiskFault):
        set_link(tmp_path, target)
    time.sleep(0.02)  # a file system's times move on by ticks of some milliseconds
    set_link(tmp_path, target)
    assert len(asked) == len(set(asked)) > 1
    assert [os.readlink(tmp_path / name) for name in os.listdir(tmp_path)] == [target]


@pytest.mark.parametrize("target", ["/etc", "../x", "a/../../x", "a//b"])
def test_a_link_never_leads_out_of_its_directory(tmp_path: Path, target: str) -> None:
    """M201."""
    with pytest.raises(BadPath):
        set_link(tmp_path, target)


def test_a_persons_file_is_never_replaced_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(b"mine")
    for target in ("a", ""):
        with pytest.raises(Exists):
            set_link(tmp_path, target)
    assert (tmp_path / "latest").read_bytes() == b"mine"


def test_usage_is_what_the_kernel_says_and_leaves_nothing_behind(tmp_path: Path) -> None:
    used = usage.run(Usage(root=str(tmp_path)), Context())
    assert used.total_bytes == shutil.disk_usage(tmp_path).total
    assert 0 < used.free_bytes <= used.total_bytes
    assert used.filesystem
    assert os.listdir(tmp_path) == []


def test_a_root_that_is_not_made_yet_is_measured_where_it_will_be(tmp_path: Path) -> None:
    there = usage.run(Usage(root=str(tmp_path)), Context())
    assert usage.run(Usage(root=str(tmp_path / "a/b")), Context()).total_bytes == there.total_bytes


def test_a_file_system_that_takes_no_files_can_do_nothing() -> None:
    used = usage.run(Usage(root="/proc"), Context())
    assert (used.direct_io, used.leases) == (False, False)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_a_directory_that_its_worker_may_not_write_in_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "_probed", {})
    assert usage.run(Usage(root="/usr"), Context()).unwritable == ""
    os.seteuid(65534)
    try:
        used = usage.run(Usage(root="/usr"), Context())
    finally:
        os.seteuid(0)
    assert used.unwritable == "uid 65534 may not write there"


def test_a_file_system_mounted_read_only_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = os.statvfs(tmp_path)
    read_only = os.statvfs_result((*facts[:8], facts.f_flag | os.ST_RDONLY, facts.f_namemax))
    monkeypatch.setattr(usage.os, "fstatvfs", lambda _: read_only)
    assert "read-only" in usage.run(Usage(root=str(tmp_path)), Context()).unwritable
