"""Retiring, bringing back, purging and sweeping: only what was meant, and nothing outside."""

import errno
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from ckptd import failpoint
from ckptd.errors import BadPath, Exists, Missing, SourceChanged
from ckptd.worker import digest, durable, kernel, sweep, trash
from ckptd.worker.context import Context
from ckptd.worker.protocol import Digest, Done, IdentityRecord, Purge, Restore, Sweep, Trash
from tests.support.disk import tmpfs

BIN = ".ckptd-trash"
ID = "ab" * 16
OTHER = "cd" * 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


def make(path: Path, *, managed: bool = False) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "sub/shard").write_bytes(b"shard")
    if managed:
        (path / "manifest.json").write_text(f'{{"checkpoint": "{ID}"}}')
    return path


def remounted(recorded: IdentityRecord, **also: int) -> IdentityRecord:
    """What was recorded before the machine started again: its disk had another number then."""
    return msgspec.structs.replace(recorded, dev=recorded.dev + 1, **also)


def identity(root: Path, path: Path) -> IdentityRecord:
    return digest.run(Digest(root=str(root), path=str(path)), Context()).identity


def retire(root: Path, path: Path, recorded: IdentityRecord, name: str = ID, checkpoint: str = ID) -> Done:
    request = Trash(root=str(root), path=str(path), identity=recorded, trash=name, checkpoint=checkpoint)
    return trash.trash(request, Context())


def restore(root: Path, path: Path, recorded: IdentityRecord, name: str = ID, checkpoint: str = ID) -> Done:
    request = Restore(root=str(root), path=str(path), identity=recorded, trash=name, checkpoint=checkpoint)
    return trash.restore(request, Context())


def purge(root: Path, name: str = ID) -> Done:
    return trash.purge(Purge(root=str(root), trash=name), Context())


@pytest.fixture
def checkpoint(root: Path) -> Path:
    return make(root / "runs/step_1")


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_checkpoint_goes_into_the_trash_and_comes_back_as_it_was(root: Path, checkpoint: Path, kind: str) -> None:
    path = checkpoint if kind == "directory" else checkpoint / "model.safetensors"
    inode, recorded = path.stat().st_ino, identity(root, path)
    assert retire(root, path, recorded).count == 1
    assert not path.exists()
    assert (root / BIN / ID).stat().st_ino == inode
    assert restore(root, path, recorded).count == 1
    assert path.stat().st_ino == inode
    assert os.listdir(root / BIN) == []


def test_asking_twice_is_asking_once(root: Path, checkpoint: Path) -> None:
    """The daemon repeats what it has no answer for: the worker may have died after the rename."""
    recorded = identity(root, checkpoint)
    assert [retire(root, checkpoint, recorded).count for _ in range(2)] == [1, 0]
    assert [restore(root, checkpoint, recorded).count for _ in range(2)] == [1, 0]
    retire(root, checkpoint, recorded)
    assert [purge(root).count for _ in range(2)] == [4, 0]


@pytest.mark.parametrize("place", ["trash._check", "durable.move"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_two_that_retire_it_at_the_same_time_both_find_it_in_the_trash(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    """Upkeep may look at a tombstone just while its retirement carries it out: the loser must not call it missing."""
    path = make(root / "runs/step_7", managed=True) if kind == "directory" else root / "m.pt"
    if kind == "file":
        path.write_bytes(b"x")
    recorded, others = identity(root, path), []
    module, name = {"trash": trash, "durable": durable}[place.partition(".")[0]], place.partition(".")[2]
    real = getattr(module, name)

    def late(*arguments: object) -> object:
        monkeypatch.setattr(module, name, real)
        others.append(retire(root, path, recorded))
        return real(*arguments)

    monkeypatch.setattr(module, name, late)
    assert retire(root, path, recorded) == Done(0)
    assert others == [Done(1)]
    assert (root / trash.TRASH / ID).exists()
    monkeypatch.setattr(module, name, real)
    assert restore(root, path, recorded) == Done(1)


def test_both_directories_are_fsynced_the_new_name_first(
    root: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = identity(root, checkpoint)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    retire(root, checkpoint, recorded)
    bin_ino, parent_ino = (root / BIN).stat().st_ino, checkpoint.parent.stat().st_ino
    assert synced[-2:] == [bin_ino, parent_ino]
    restore(root, checkpoint, recorded)
    assert synced[-2:] == [parent_ino, bin_ino]


def test_another_inode_under_the_name_is_never_removed(root: Path, checkpoint: Path) -> None:
    recorded = identity(root, checkpoint)
    checkpoint.rename(root / "moved")
    make(checkpoint)
    with pytest.raises(SourceChanged):
        retire(root, checkpoint, recorded)
    assert (checkpoint / "model.safetensors").exists()


def test_a_file_written_again_under_the_same_inode_is_never_removed(root: Path, checkpoint: Path) -> None:
    """torch.save into an old name keeps its inode: another checkpoint, not the one that was retired."""
    path = checkpoint / "model.safetensors"
    recorded = identity(root, path)
    os.utime(path, ns=(0, recorded.mtime_ns + 1))
    with pytest.raises(SourceChanged):
        retire(root, path, recorded)
    assert path.exists()


def test_a_foreign_directory_with_a_newer_file_is_never_removed(root: Path, checkpoint: Path) -> None:
    recorded = identity(root, checkpoint)
    (checkpoint / "sub/new").write_bytes(b"new")
    os.utime(checkpoint / "sub/new", ns=(0, recorded.mtime_ns + 1))
    with pytest.raises(SourceChanged):
        retire(root, checkpoint, recorded)
    assert (checkpoint / "sub/new").exists()


def test_a_checkpoint_of_ours_goes_although_a_person_dropped_or_added_a_file(root: Path) -> None:
    path = make(root / "p/e/step_1", managed=True)
    recorded = identity(root, path)
    (path / "model.safetensors").unlink()
    (path / "eval.json").write_bytes(b"{}")
    os.utime(path / "eval.json", ns=(0, recorded.mtime_ns + 1))
    assert retire(root, path, recorded).count == 1


@pytest.mark.parametrize("kind", ["ours", "foreign", "file"])
def test_a_disk_that_has_another_number_after_a_restart_still_holds_the_same_checkpoint(root: Path, kind: str) -> None:
    path = make(root / "p/e/step_1", managed=kind == "ours")
    path = path / "model.safetensors" if kind == "file" else path
    recorded = remounted(identity(root, path))
    assert [retire(root, path, recorded).count for _ in range(2)] == [1, 0]
    assert not path.exists()


def test_on_another_disk_an_equal_inode_number_alone_is_no_proof(root: Path) -> None:
    path = make(root / "p/e/step_1", managed=True)
    with pytest.raises(SourceChanged):
        retire(root, path, remounted(identity(root, path)), checkpoint=OTHER)
    (path / "manifest.json").write_text("{")
    with pytest.raises(SourceChanged):
        retire(root, path, remounted(identity(root, path)))
    assert retire(root, path, identity(root, path)).count == 1, "on the same disk it is"
    foreign = make(root / "p/e/step_2")
    recorded = identity(root, foreign)
    (foreign / "model.safetensors").unlink()
    with pytest.raises(SourceChanged):
        retire(root, foreign, remounted(recorded), OTHER)
    assert (foreign / "sub/shard").exists()


def test_what_lies_in_the_trash_is_known_by_its_manifest_where_inode_numbers_change(root: Path) -> None:
    path = make(root / "p/e/step_1", managed=True)
    recorded = identity(root, path)
    retire(root, path, recorded)
    moved_on = remounted(recorded, ino=recorded.ino + 1)
    assert retire(root, path, moved_on).count == 0
    with pytest.raises(Missing):
        retire(root, path, moved_on, checkpoint=OTHER)
    with pytest.raises(Missing):
        retire(root, path, moved_on, checkpoint="")


def test_a_swap_between_look_and_rename_is_undone(
    root: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M201."""
    recorded = identity(root, checkpoint)
    real = trash._check

    def check(*args: object) -> None:
        real(*args)
        checkpoint.rename(root / "moved")
        make(checkpoint)

    monkeypatch.setattr(trash, "_check", check)
    with pytest.raises(SourceChanged):
        retire(root, checkpoint, recorded)
    assert checkpoint.exists()
    assert os.listdir(root / BIN) == []


def test_what_is_gone_is_missing_and_what_is_there_is_not_overwritten(root: Path, checkpoint: Path) -> None:
    recorded = identity(root, checkpoint)
    with pytest.raises(Missing):
        restore(root, root / "nothing", recorded)
    retire(root, checkpoint, recorded)
    make(checkpoint)
    with pytest.raises(Exists):
        restore(root, checkpoint, recorded)
    assert (root / BIN / ID / "model.safetensors").read_bytes() == b"weights"
    checkpoint.rename(root / "aside")
    purge(root)
    with pytest.raises(Missing):
        retire(root, checkpoint, recorded)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", ".", "a\0b"])
def test_a_trash_name_is_one_plain_name(root: Path, checkpoint: Path, name: str) -> None:
    """M201."""
    recorded = identity(root, checkpoint)
    for act in (lambda: retire(root, checkpoint, recorded, name), lambda: purge(root, name)):
        with pytest.raises(BadPath):
            act()
    assert checkpoint.exists()


def test_a_trash_that_is_a_symlink_is_refused(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    """M201."""
    outside = make(tmp_path / "outside" / ID).parent
    (root / BIN).symlink_to(outside)
    recorded = identity(root, checkpoint)
    for act in (lambda: retire(root, checkpoint, recorded), lambda: purge(root)):
        with pytest.raises((BadPath, NotADirectoryError)):
            act()
    assert (outside / ID / "model.safetensors").exists()


def test_the_root_and_the_trash_itself_are_never_retired(root: Path, checkpoint: Path) -> None:
    recorded = identity(root, checkpoint)
    retire(root, checkpoint, recorded)
    for path in (root, root / BIN, root / BIN / ID, root.parent, root / "../beside", Path.home(), Path("/")):  # S15
        with pytest.raises(BadPath):
            retire(root, path, recorded, OTHER)


def test_a_mount_point_and_what_lies_on_it_are_never_retired(root: Path) -> None:
    """S15. Neither by what was recorded before something was mounted there, nor by what is there now."""
    place = make(root / "runs/step_1")
    before = identity(root, place)
    with tmpfs(place, "1m") as mounted:
        inside = make(mounted / "step_2")
        for path in (mounted, inside):
            f = path.stat()
            for recorded in (before, IdentityRecord(f.st_dev, f.st_ino, 12, 2**62, 2**62)):
                with pytest.raises((BadPath, SourceChanged)):
                    retire(root, path, recorded)
        assert (inside / "sub/shard").exists()
    assert retire(root, place, before).count == 1


def test_a_purge_cut_off_half_way_is_finished_by_the_next(
    root: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retire(root, checkpoint, identity(root, checkpoint))
    monkeypatch.setattr(failpoint, "_plan", {"retain.unlink": (2, "eio")})
    monkeypatch.setattr(failpoint, "_hits", {})
    with pytest.raises(OSError, match="fail point"):
        purge(root)
    assert purge(root).count > 0
    assert os.listdir(root / BIN) == []


@pytest.mark.parametrize("refused", [(), ("openat2",)])
def test_a_mount_below_a_checkpoint_is_never_emptied(
    root: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...]
) -> None:
    """/proc stands for any other file system: the look at its device number is what must stop us."""

    def gone(*_args: object, **_named: object) -> int:
        raise OSError(errno.ENOSYS, "no openat2")

    for name in refused:
        monkeypatch.setattr(kernel, name, gone)
    fd = os.open("/", os.O_RDONLY)
    with pytest.raises(BadPath):
        durable.beneath.open_directory(fd, ("proc",), one_mount=True)
    os.close(fd)


# Sweep


def swept(root: Path, older_s: float = 0.0, keep: list[str] | None = None, ahead_s: float = 0.0) -> int:
    class Later:
        def now(self) -> datetime:
            return datetime.now(UTC) + timedelta(seconds=ahead_s)

        def monotonic_s(self) -> float:
            return 0.0

    return sweep.run(Sweep(root=str(root), older_s=older_s, keep=keep or []), Context(), Later()).count


@pytest.fixture
def leavings(root: Path) -> list[Path]:
    made = [root / f".s.ckptd-tmp-{ID}-01234567", root / f"p/e/.step_2.ckptd-tmp-{OTHER}-89abcdef"]
    for path in made:
        make(path, managed=True)
    link = root / "p/e/.latest.ckptd-tmp-01234567"
    link.symlink_to("step_1")
    return [*made, link]


def test_old_leavings_are_swept_and_nothing_else(root: Path, leavings: list[Path]) -> None:
    others = [make(root / "p/e/step_1", managed=True), make(root / "p/e/.s.ckptd-tmp-x"), make(root / BIN / ID)]
    inside = make(others[0] / f".s.ckptd-tmp-{ID}-01234567")  # in a checkpoint: not ours to look at
    file = root / f".f.ckptd-tmp-{ID}-01234567"
    file.write_bytes(b"a person's file")
    assert swept(root, ahead_s=1.0) == 3
    assert not any(path.exists() or path.is_symlink() for path in leavings)
    assert all(path.exists() for path in [*others, inside, file])


def test_young_leavings_and_those_of_kept_checkpoints_stay(root: Path, leavings: list[Path]) -> None:
    assert swept(root, older_s=3600.0, ahead_s=3000.0) == 0
    assert swept(root, older_s=3600.0, ahead_s=4000.0, keep=[ID]) == 2
    assert leavings[0].exists()
    assert swept(root, older_s=3600.0, ahead_s=4000.0) == 1


def test_a_publish_of_hours_is_not_swept_under_its_writer(root: Path) -> None:
    """Its directory's own time is from its first minute: the lock and the newest file's time tell."""
    fd = os.open(root, os.O_RDONLY)
    living = durable.TemporaryDirectory.create(fd, "s", ID)
    assert swept(root, ahead_s=1e6) == 0
    living.close()
    path = root / living.name
    (path / "f").write_bytes(b"1")
    os.utime(path / "f", ns=(0, (path.stat().st_mtime_ns + 3_000_000_000_000)))
    assert swept(root, older_s=1.0, ahead_s=2000.0) == 0
    assert swept(root, older_s=1.0, ahead_s=60_000.0) == 1
    os.close(fd)


def test_symlinks_lead_a_sweep_nowhere(root: Path, tmp_path: Path) -> None:
    """M201."""
    outside = make(tmp_path / f"outside/.s.ckptd-tmp-{ID}-01234567")
    (root / "link").symlink_to(outside.parent)
    (root / f".t.ckptd-tmp-{ID}-01234567").symlink_to(outside)
    assert swept(root, ahead_s=1.0) == 1
    assert outside.exists()


def test_what_can_not_be_removed_does_not_stop_the_sweep(
    root: Path, leavings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., int] = durable.remove_tree

    def remove_tree(fd: int, name: str, *rest: object) -> int:
        if ID in name:
            raise OSError(errno.EIO, "bad sector")
        return real(fd, name, *rest)

    monkeypatch.setattr(durable, "remove_tree", remove_tree)
    assert swept(root, ahead_s=1.0) == 2
