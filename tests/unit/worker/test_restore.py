"""Out of the trash and back: what counts as there, what counts as back, and what is in the way."""

import os
import shutil
from pathlib import Path

import pytest

from ckptd.errors import Exists, Missing
from ckptd.worker import durable
from ckptd.worker.protocol import Done
from tests.unit.worker.test_trash import BIN, ID, OTHER, checkpoint, identity, make, remounted, restore, retire, root

__all__ = ["checkpoint", "root"]  # fixtures


def test_two_that_restore_it_at_the_same_time_both_find_it_back(
    root: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = identity(root, checkpoint)
    retire(root, checkpoint, recorded)
    real, others = durable.move, []

    def late(*arguments: object) -> object:
        monkeypatch.setattr(durable, "move", real)
        others.append(restore(root, checkpoint, recorded))
        return real(*arguments)

    monkeypatch.setattr(durable, "move", late)
    assert restore(root, checkpoint, recorded) == Done(0)
    assert others == [Done(1)]
    assert checkpoint.exists()


@pytest.fixture(params=["file", "ours", "foreign"])
def path(root: Path, request: pytest.FixtureRequest) -> Path:
    """One checkpoint of each kind."""
    if request.param != "file":
        return make(root / "runs/step_1", managed=request.param == "ours")
    (root / "runs").mkdir()
    (root / "runs/last.safetensors").write_bytes(b"weights")
    return root / "runs/last.safetensors"


def rewrite(path: Path, like: Path) -> None:
    """Put another checkpoint at a path, as its trainer does."""
    if like.is_file():
        path.write_bytes(b"WEIGHTS")
        return
    make(path, managed=(like / "manifest.json").exists())
    (path / "model.safetensors").write_bytes(b"WEIGHTS")
    if (path / "manifest.json").exists():
        (path / "manifest.json").write_text(f'{{"checkpoint": "{OTHER}"}}')


@pytest.mark.parametrize("inode", ["another", "given out again"])
def test_what_has_its_place_after_the_trash_was_emptied_by_hand_is_not_taken_for_it(
    root: Path, path: Path, inode: str
) -> None:
    recorded = identity(root, path)
    retire(root, path, recorded)
    rewrite(path, root / BIN / ID)
    shutil.rmtree(root / BIN)
    here = identity(root, path)
    if inode == "given out again":
        recorded = type(recorded)(here.dev, here.ino, recorded.size_bytes, recorded.mtime_ns, recorded.ctime_ns)
    with pytest.raises(Missing):
        restore(root, path, recorded)
    assert identity(root, path) == here
    assert os.listdir(root / BIN) == []


def test_one_that_is_back_already_is_known_by_its_identity_or_its_manifest(root: Path, path: Path) -> None:
    recorded = identity(root, path)
    assert restore(root, path, recorded) == Done(0)
    if (path / "manifest.json").exists():
        assert restore(root, path, remounted(recorded, ino=recorded.ino + 1)) == Done(0)
        with pytest.raises(Missing):
            restore(root, path, recorded, checkpoint=OTHER)


def test_a_restore_of_nothing_makes_no_directory(root: Path, path: Path) -> None:
    recorded = identity(root, path)
    with pytest.raises(Missing):
        restore(root, root / "gone/for/good", recorded)
    assert not (root / "gone").exists()


def test_what_lies_in_the_trash_is_retired_whatever_took_its_place(root: Path, path: Path) -> None:
    """A trainer writes into the old name; a daemon that starts again asks for each of its tombstones."""
    recorded = identity(root, path)
    retire(root, path, recorded)
    rewrite(path, root / BIN / ID)
    here = identity(root, path)
    assert retire(root, path, recorded) == Done(0)
    if (path / "manifest.json").exists():
        assert retire(root, path, remounted(recorded, ino=recorded.ino + 1)) == Done(0)
    assert identity(root, path) == here
    with pytest.raises(Exists):
        restore(root, path, recorded)
    assert (root / BIN / ID).exists()


def test_what_lies_in_the_trash_is_retired_although_its_directory_is_gone(root: Path, path: Path) -> None:
    recorded = identity(root, path)
    retire(root, path, recorded)
    path.parent.rmdir()
    assert retire(root, path, recorded) == Done(0)
    assert restore(root, path, recorded) == Done(1)
    assert path.exists()
