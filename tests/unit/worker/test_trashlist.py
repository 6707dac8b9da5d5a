"""What a trash holds, and since when."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ckptd.clock import SystemClock
from ckptd.worker import trash
from ckptd.worker.context import Context
from ckptd.worker.protocol import IdentityRecord, Trash
from ckptd.worker.trashlist import TrashList, TrashListed

BIN = ".ckptd-trash"
ID, OTHER = "ab" * 16, "cd" * 16


@dataclass
class Later(SystemClock):
    """The time in a while."""

    by_s: float

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.by_s)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


def retired(root: Path, name: str) -> None:
    """Retire a file that was not written to for decades."""
    path = root / name
    path.write_bytes(b"weights")
    os.utime(path, (1, 1))
    facts = path.stat()
    identity = IdentityRecord(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    trash.trash(Trash(root=str(root), path=str(path), identity=identity, trash=name, checkpoint=name), Context())


def listing(root: Path, older_s: float = 0.0, *, at: float = 0.0) -> TrashListed:
    """What the trash of a root holds, `at` seconds from now."""
    return trash.listed(TrashList(root=str(root), older_s=older_s), Context(), Later(at))


def test_a_trash_is_listed_by_name_and_by_how_long_things_have_been_in_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How old the files are says nothing: it is the move that counts."""
    for name in (OTHER, ID):
        retired(root, name)
    assert listing(root, 3600.0, at=3500.0).names == []
    assert listing(root, 3600.0, at=3700.0) == TrashListed([ID, OTHER])
    monkeypatch.setattr(trash, "NAMES_MAX", 1)
    assert listing(root, at=1.0).names in ([ID], [OTHER]), "there is an end to it"


def test_names_that_are_no_text_can_be_told(root: Path) -> None:
    """One of them in an answer would end the thread that gives it, and a person's terminal does what it says."""
    (root / BIN).mkdir()
    (root / BIN / os.fsdecode(b"\xff\x1b[31m\n")).mkdir()
    assert listing(root, at=1.0).names == [r"\udcff\x1b[31m\n"]


def test_a_root_without_a_trash_has_nothing_in_it_and_gets_none(root: Path) -> None:
    assert listing(root).names == []
    assert os.listdir(root) == []


def test_a_trash_that_is_a_symlink_is_not_listed_through(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/private").write_bytes(b"")
    (root / BIN).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError):
        listing(root, at=1.0)
