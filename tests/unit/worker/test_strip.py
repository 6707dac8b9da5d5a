"""Taking files out of a checkpoint that stays, and putting them back."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ckptd import failpoint
from ckptd.cli.verifying import verify_directory
from ckptd.errors import BadPath, Exists, Missing, SourceChanged
from ckptd.worker import scan, strip, trash
from ckptd.worker.context import Context
from ckptd.worker.formats import ckptd_dir
from ckptd.worker.protocol import Purge, Scan, Strip, Unstrip
from ckptd_client.find import find_checkpoint, list_checkpoints, stripped_files

ID = "ab" * 16
NAME = "optimizer.safetensors"
FILES = {"model.safetensors": b"weights", NAME: b"moments", "state.json": b"{}"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    (path / "p/e/step_1").mkdir(parents=True)
    for name, data in FILES.items():
        (path / "p/e/step_1" / name).write_bytes(data)
    listed = [
        {"path": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "xxh3": []}
        for name, data in FILES.items()
    ]
    manifest = {"v": 1, "checkpoint": ID, "step": 1, "files": listed}
    (path / "p/e/step_1/manifest.json").write_text(json.dumps(manifest))
    return path


def about(root: Path, **more: Any) -> dict[str, Any]:
    wanted = {"root": str(root), "path": str(root / "p/e/step_1"), "checkpoint": ID, "trash": f"{ID}.stripped"}
    return {**wanted, "files": {NAME: len(FILES[NAME])}, **more}


def stripped(root: Path, **more: Any) -> Any:
    return strip.strip(Strip(at="2030-01-01T00:00:00+00:00", **about(root, **more)), Context())


def unstripped(root: Path, **more: Any) -> Any:
    return strip.unstrip(Unstrip(**about(root, **more)), Context())


def names(root: Path) -> set[str]:
    return set(os.listdir(root / "p/e/step_1"))


def test_it_is_whole_in_the_trash_and_named_beside_the_manifest_which_stays_as_it_was(root: Path) -> None:
    before = (root / "p/e/step_1/manifest.json").read_bytes()
    found = stripped(root)
    assert names(root) == {"model.safetensors", "state.json", "manifest.json", "stripped.json"}
    assert (root / f".ckptd-trash/{ID}.stripped" / NAME).read_bytes() == FILES[NAME]
    assert (root / "p/e/step_1/manifest.json").read_bytes() == before
    assert found.identity.ino == (root / "p/e/step_1").stat().st_ino
    assert stripped_files(str(root / "p/e/step_1")) == [NAME]


def test_twice_is_once_and_back_again_leaves_no_trace(root: Path) -> None:
    stripped(root)
    stripped(root)
    unstripped(root)
    unstripped(root)
    assert names(root) == {*FILES, "manifest.json"}
    assert (root / "p/e/step_1" / NAME).read_bytes() == FILES[NAME]
    assert os.listdir(root / ".ckptd-trash") == []


@pytest.mark.parametrize("point", ["strip.noted", "strip.file_moved", "amend.renamed"])
def test_a_disk_that_fails_half_way_leaves_what_can_be_carried_on(
    root: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(failpoint, "_plan", {point: (1, "eio")})
        patch.setattr(failpoint, "_hits", {})
        with pytest.raises(OSError, match=point):
            stripped(root)
    assert (root / "p/e/step_1" / NAME).exists() or NAME in stripped_files(str(root / "p/e/step_1"))
    stripped(root)
    assert NAME not in names(root)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"checkpoint": "cd" * 16}, SourceChanged),
        ({"files": {NAME: 3}}, SourceChanged),
        ({"files": {"gone.safetensors": 3}}, Missing),
        ({"files": {"manifest.json": 3}}, BadPath),
        ({"files": {"../../e/step_1/model.safetensors": 7}}, BadPath),
        ({"trash": "../out"}, BadPath),
        ({"path": "p/e/step_2"}, Missing),
    ],
)
def test_what_is_not_what_was_recorded_is_left_alone(root: Path, more: dict[str, Any], error: type[Exception]) -> None:
    if "path" in more:
        more = {"path": str(root / more["path"])}
    with pytest.raises(error):
        stripped(root, **more)
    assert {*FILES, "manifest.json"} <= names(root)


def test_a_name_that_is_taken_meanwhile_stays_and_so_does_the_trash(root: Path) -> None:
    stripped(root)
    (root / "p/e/step_1" / NAME).write_bytes(b"somebody's own")
    with pytest.raises(Exists):
        unstripped(root)
    assert (root / "p/e/step_1" / NAME).read_bytes() == b"somebody's own"
    assert (root / f".ckptd-trash/{ID}.stripped" / NAME).read_bytes() == FILES[NAME]


def test_it_still_reads_as_a_whole_checkpoint_for_everybody_who_looks(root: Path) -> None:
    stripped(root)
    trash.purge(Purge(root=str(root), trash=f"{ID}.stripped"), Context())
    assert find_checkpoint(str(root / "p/e"), 1).checkpoint == ID
    assert [file["path"] for file in list_checkpoints(str(root / "p/e"))[0].files] == [
        "model.safetensors",
        "state.json",
    ]
    sent: list[Any] = []
    scan.run(Scan(root=str(root), managed=True), Context(send=sent.append))
    assert [one.stripped for frame in sent for one in frame["part"].found] == [[NAME]]
    assert verify_directory(str(root / "p/e/step_1"))["ok"]
    (root / "p/e/step_1/model.safetensors").unlink()
    assert not verify_directory(str(root / "p/e/step_1"))["ok"]


def test_a_note_that_is_none_of_ours_takes_nothing_away(root: Path) -> None:
    stripped(root)
    said = (root / "p/e/step_1/stripped.json").read_bytes()
    assert ckptd_dir.parse_stripped(said, ID) == [NAME]
    assert ckptd_dir.parse_stripped(said, "cd" * 16) == ckptd_dir.parse_stripped(b"[", ID) == []
    (root / "p/e/step_1/stripped.json").write_bytes(said.replace(ID.encode(), b"cd" * 16))
    assert list_checkpoints(str(root / "p/e")) == [], "then a file of its manifest is simply not there"
