"""What is said after the publish lies beside the manifest: replaced whole, durable, and never in another's directory."""

import json
import os
import time
from pathlib import Path

import pytest

from ckptd import failpoint
from ckptd.errors import BadRequest, DiskFault, Missing, SourceChanged
from ckptd.worker import amend, durable, scan
from ckptd.worker.context import Context
from ckptd.worker.protocol import Amend, Candidates, Scan

ID = "ab" * 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root/p/e/step_0000000001"
    path.mkdir(parents=True)
    manifest = {"v": 1, "checkpoint": ID, "metrics": {"loss": 1.0}, "files": []}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "state.json").write_text("{}")
    return tmp_path / "root"


def directory(root: Path) -> Path:
    return root / "p/e/step_0000000001"


def amended(root: Path, checkpoint: str = ID, **metrics: float | str) -> int:
    request = Amend(root=str(root), path=str(directory(root)), checkpoint=checkpoint, metrics=metrics)
    return amend.run(request, Context()).count


def late(root: Path) -> dict[str, object] | None:
    parts: list[Candidates] = []
    context = Context(send=lambda body: parts.append(body["part"]))  # type: ignore[arg-type, return-value]
    scan.run(Scan(root=str(root), managed=True), context)
    [found] = [candidate for part in parts for candidate in part.found]
    assert found.manifest is not None, "the manifest stands whatever lies beside it"
    return found.late


def test_one_bad_moment_of_a_disk_does_not_end_late_metrics_for_good(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed fsync is never asked for again: late.json is written once more first."""
    monkeypatch.setattr(failpoint, "_plan", {"amend.dir_fsynced": (1, "eio")})
    monkeypatch.setattr(failpoint, "_hits", {})
    with pytest.raises(DiskFault):
        amended(root, loss=0.5)
    time.sleep(0.02)  # a file system's times move on by ticks of some milliseconds
    assert amended(root, loss=0.5) == 1
    assert amended(root, loss=0.5) == 0
    assert late(root) == {"v": 1, "checkpoint": ID, "metrics": {"loss": 0.5}}


def test_a_scan_finds_what_was_said_last(root: Path) -> None:
    assert late(root) is None
    assert amended(root, val_loss=0.5) == 1
    assert amended(root, val_loss="NaN", acc=0.9) == 1
    assert late(root) == {"v": 1, "checkpoint": ID, "metrics": {"val_loss": "NaN", "acc": 0.9}}
    assert sorted(os.listdir(directory(root))) == ["late.json", "manifest.json", "state.json"]


def test_what_is_said_already_is_not_written_again_but_made_durable(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    amended(root, a=1.0)
    inode = (directory(root) / "late.json").stat().st_ino
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    assert amended(root, a=1.0) == 0
    assert (directory(root) / "late.json").stat().st_ino == inode
    assert synced == [directory(root).stat().st_ino]


def test_the_bytes_are_durable_before_the_name_and_the_name_before_the_answer(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename
    path = directory(root)

    def fsync(fd: int) -> None:
        order.append("directory" if os.fstat(fd).st_ino == path.stat().st_ino else "file")
        real_fsync(fd)

    def rename(*args: object, **named: object) -> None:
        order.append("rename")
        real_rename(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    amended(root, a=1.0)
    assert order == ["file", "rename", "directory"]


@pytest.mark.parametrize("point", ["amend.written", "amend.fsynced"])
def test_a_failing_disk_leaves_the_old_words_and_no_litter(
    root: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    amended(root, a=1.0)
    monkeypatch.setattr(failpoint, "_plan", {point: (1, "eio")})
    monkeypatch.setattr(failpoint, "_hits", {})
    with pytest.raises((OSError, DiskFault)):
        amended(root, a=2.0)
    assert late(root) == {"v": 1, "checkpoint": ID, "metrics": {"a": 1.0}}
    assert sorted(os.listdir(directory(root))) == ["late.json", "manifest.json", "state.json"]


def test_what_a_killed_worker_left_is_in_nobodys_way(root: Path) -> None:
    (directory(root) / f".late.json{durable.TEMPORARY}replaces").write_bytes(b"half of")
    amended(root, a=2.0)
    assert sorted(os.listdir(directory(root))) == ["late.json", "manifest.json", "state.json"]


def test_nothing_is_written_into_a_directory_of_another_checkpoint(root: Path) -> None:
    with pytest.raises(SourceChanged):
        amended(root, "cd" * 16, a=1.0)
    assert late(root) is None
    (directory(root) / "manifest.json").unlink()
    with pytest.raises(SourceChanged):
        amended(root, a=1.0)
    with pytest.raises(Missing):
        amend.run(Amend(root=str(root), path=str(root / "p/none"), checkpoint=ID, metrics={}), Context())


def test_more_than_its_limit_is_refused_before_anything_is_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amend, "LATE_BYTES_MAX", 50)
    with pytest.raises(BadRequest):
        amended(root, a_metric_with_a_long_name=1.0)
    assert late(root) is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"v":2,"checkpoint":"x","metrics":{}}', b'{"v":1,"metrics":[]}'])
def test_a_file_of_that_name_that_is_none_of_ours_says_nothing(root: Path, text: bytes) -> None:
    (directory(root) / "late.json").write_bytes(text)
    assert late(root) is None
