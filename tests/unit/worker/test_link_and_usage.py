"""The links beside checkpoints, and what is said about a file system."""

import os
import shutil
from pathlib import Path

import pytest

from ckptd.errors import BadPath, Exists
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
