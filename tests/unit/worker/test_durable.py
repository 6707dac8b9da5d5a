"""The primitives that every promise about the disk rests on."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd import failpoint
from ckptd.errors import BadPath, Exists, NoSpace, SourceChanged
from ckptd.worker import beneath, durable, fsync, kernel

ID = "ab" * 16


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def refuse(number: int):
    def call(*_args: object, **_named: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=["kernel", "by hand"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with the kernel's help, once as on a file system or kernel that has none."""
    if request.param == "by hand":
        monkeypatch.setattr(kernel, "renameat2", refuse(errno.EINVAL))
        monkeypatch.setattr(kernel, "openat2", refuse(errno.ENOSYS))
    return request.param


@pytest.mark.parametrize("taken", ["directory", "full directory", "file", "symlink"])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_taken_name_is_never_replaced(tmp_path: Path, root_fd: int, both_ways: str, kind: str, taken: str) -> None:
    """Plain rename would silently replace a file, and an empty directory."""
    (tmp_path / "new").mkdir() if kind == "directory" else (tmp_path / "new").write_bytes(b"new")
    old = tmp_path / "old"
    {"directory": old.mkdir, "full directory": old.mkdir, "file": old.touch}.get(taken, lambda: old.symlink_to("x"))()
    if taken == "full directory":
        (old / "theirs").write_bytes(b"1")
    before = os.lstat(old)
    with pytest.raises(Exists):
        durable.rename_noreplace((root_fd, "new"), (root_fd, "old"))
    assert os.lstat(old).st_ino == before.st_ino
    assert (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_free_name_is_taken(tmp_path: Path, root_fd: int, both_ways: str, kind: str) -> None:
    (tmp_path / "new").mkdir() if kind == "directory" else (tmp_path / "new").write_bytes(b"new")
    inode = os.lstat(tmp_path / "new").st_ino
    durable.rename_noreplace((root_fd, "new"), (root_fd, "name"))
    assert os.lstat(tmp_path / "name").st_ino == inode
    assert not (tmp_path / "new").exists()


def test_a_failed_fsync_is_never_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fsync of a file that lost pages succeeds: that is the kernel's lie we must not repeat."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"lost")
    calls: list[int] = []

    def lying(which: int) -> None:
        calls.append(which)
        if len(calls) == 1:
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fsync", lying)
    for _ in range(3):
        with pytest.raises(fsync.FsyncFailed):
            fsync.fsync_file(fd)
    again = os.open(tmp_path / "file", os.O_RDWR)
    with pytest.raises(fsync.FsyncFailed):
        fsync.fsync_file(again)
    assert len(calls) == 1
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    fsync.fsync_file(other)
    assert len(calls) == 2
    for each in (fd, again, other):
        os.close(each)


def test_a_directory_that_cannot_be_fsynced_passes_and_one_that_fails_does_not(
    root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    fsync.fsync_directory(root_fd)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(fsync.FsyncFailed):
        fsync.fsync_directory(root_fd)


def test_one_failed_fsync_of_a_directory_does_not_end_its_root_for_good(
    tmp_path: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is changed first, so that its entries are written again; the failed fsync itself is never repeated."""
    (tmp_path / "a").mkdir()
    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", refuse(errno.ENOSPC))
        with pytest.raises(NoSpace):
            durable.make_dir_chain(root_fd, ("a",))
    before = os.fstat(root_fd).st_mtime_ns
    seen: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(os.fstat(fd).st_mtime_ns))
    os.close(durable.make_dir_chain(root_fd, ("a",)))
    assert seen
    assert before not in seen
    assert os.listdir(tmp_path) == ["a"]


def test_every_name_from_the_root_down_is_fsynced_even_those_that_were_there(
    tmp_path: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed between mkdir and fsync leaves a name that the next power cut takes away."""
    (tmp_path / "a").mkdir()
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    os.close(durable.make_dir_chain(root_fd, ("a", "b", "c")))
    holders = [tmp_path, tmp_path / "a", tmp_path / "a/b"]
    assert synced == [path.stat().st_ino for path in holders]


def test_names_whose_fsync_failed_are_in_doubt_until_they_are_made_again(
    tmp_path: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second fsync would succeed, and prove nothing: the directory that could not be named durably goes again."""
    failing = [True]

    def once(which: int) -> None:
        if failing.pop() if failing else False:
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fsync", once)
    (tmp_path / "mine").mkdir()
    for _ in range(2):
        with pytest.raises(fsync.FsyncFailed):
            fsync.fsync_directory(root_fd)
    (tmp_path / "mine").rmdir()
    failing.append(True)
    with pytest.raises(fsync.FsyncFailed):
        durable.make_dir_chain(root_fd, ("a", "b"))
    assert os.listdir(tmp_path) == []
    os.close(durable.make_dir_chain(root_fd, ("a", "b")))


def test_a_removal_that_is_found_done_is_made_durable(root_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who did it may have died between its unlink and its fsync; a power cut would then bring it back."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    assert durable.remove_tree(root_fd, "gone") == 0
    assert durable.remove_symlink(root_fd, "gone") is False
    assert synced == [os.fstat(root_fd).st_ino] * 2


def test_a_missing_root_is_made_with_its_parents_and_their_names_are_fsynced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    os.close(durable.make_root(str(tmp_path / "x/y")))
    # The first of them: of an earlier try that was killed, the last directory may have a name that is not durable.
    assert synced == [path.stat().st_ino for path in (tmp_path.parent, tmp_path, tmp_path / "x")]


@pytest.mark.parametrize("parts", [("link", "inside"), ("link",), ("dir", "up", "inside"), ("home", "made")])
def test_no_symlink_below_a_root_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both_ways: str, parts: tuple[str, ...]
) -> None:
    """M201."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "dir").mkdir(parents=True)
    outside.mkdir()
    (outside / "inside").write_bytes(b"canary")
    (root / "link").symlink_to(outside)
    (root / "dir/up").symlink_to("../..")
    (root / "home").symlink_to("dir")  # leads nowhere else, and yet may tomorrow
    fd = beneath.open_root(str(root))
    with pytest.raises((BadPath, NotADirectoryError)):
        os.close(beneath.open_beneath(fd, parts, beneath.READ))
    with pytest.raises((BadPath, NotADirectoryError)):
        os.close(durable.make_dir_chain(fd, (*parts, "made")))
    assert os.listdir(outside) == ["inside"]
    os.close(fd)


@pytest.mark.parametrize("path", ["/r/../x", "/r/a/../../x", "/x", "/rr", "r/a", "/r/a\0b", "/r//a", "/r/./a"])
def test_a_path_that_leaves_its_root_is_refused(path: str) -> None:
    """M201."""
    with pytest.raises(BadPath):
        beneath.parts_below("/r", path)


def test_a_path_below_its_root_is_split() -> None:
    assert beneath.parts_below("/r/", "/r/a/b/") == ("a", "b")
    assert beneath.parts_below("/r", "/r") == ()
    assert beneath.parts_below("/", "/a") == ("a",)


def test_a_fifo_is_refused_at_once(tmp_path: Path, root_fd: int) -> None:
    """Opening one for reading the plain way waits for a writer for ever."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadPath):
        beneath.open_file(root_fd, "fifo")


@pytest.fixture
def temporary(root_fd: int) -> Iterator[durable.TemporaryDirectory]:
    made = durable.TemporaryDirectory.create(root_fd, "final", ID)
    yield made
    made.close()


def test_a_temporary_directory_is_ours_alone_until_published(
    tmp_path: Path, temporary: durable.TemporaryDirectory
) -> None:
    path = tmp_path / temporary.name
    assert temporary.name.startswith(f".final.ckptd-tmp-{ID}-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    temporary.publish("final")
    assert stat.S_IMODE((tmp_path / "final").stat().st_mode) == 0o777 & ~durable.UMASK
    assert not path.exists()


@pytest.mark.parametrize("point", ["publish.renamed", "parent.fsynced"])
def test_a_publish_that_fails_after_the_rename_takes_the_name_back(
    tmp_path: Path, temporary: durable.TemporaryDirectory, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Nobody was told of the name, and its durability is unknown: it must not be found later."""
    (tmp_path / temporary.name / "f").write_bytes(b"1")
    monkeypatch.setattr(failpoint, "_plan", {point: (1, "eio")})
    monkeypatch.setattr(failpoint, "_hits", {})
    with pytest.raises((OSError, fsync.FsyncFailed)):
        temporary.publish("final")
    assert os.listdir(tmp_path) == [temporary.name]
    temporary.discard()
    assert os.listdir(tmp_path) == []


def test_a_taken_back_directory_is_kept_while_its_name_is_in_doubt(
    tmp_path: Path, temporary: durable.TemporaryDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may still hold the final name: its files may not go before the parent is fsynced."""
    (tmp_path / temporary.name / "f").write_bytes(b"1")
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    temporary.discard()
    assert (tmp_path / temporary.name / "f").read_bytes() == b"1"


def test_a_symlink_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path, root_fd: int, both_ways: str) -> None:
    """M108."""
    for target in ("one", "two"):
        durable.replace_symlink(root_fd, "latest", target)
        assert os.readlink(tmp_path / "latest") == target
    assert os.listdir(tmp_path) == ["latest"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_symlink_is_never_replaced_by_one(tmp_path: Path, root_fd: int, both_ways: str, kind: str) -> None:
    name = tmp_path / "latest"
    name.mkdir() if kind == "directory" else name.write_bytes(b"mine")
    with pytest.raises(Exists):
        durable.replace_symlink(root_fd, "latest", "one")
    with pytest.raises(Exists):
        durable.remove_symlink(root_fd, "latest")
    assert os.listdir(tmp_path) == ["latest"]
    assert not name.is_symlink()


def test_a_file_put_there_in_the_last_moment_goes_back_to_its_place(
    tmp_path: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latest").symlink_to("one")
    real = kernel.renameat2
    raced: list[bool] = []

    def race(old: tuple[int, str], new: tuple[int, str], flags: int) -> None:
        if flags == kernel.RENAME_EXCHANGE and not raced:
            raced.append(True)
            (tmp_path / "latest").unlink()
            (tmp_path / "latest").write_bytes(b"mine")
        real(old, new, flags)

    monkeypatch.setattr(kernel, "renameat2", race)
    with pytest.raises(Exists):
        durable.replace_symlink(root_fd, "latest", "two")
    assert (tmp_path / "latest").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["latest"]


def test_a_tree_is_removed_without_following_its_symlinks(tmp_path: Path, root_fd: int, both_ways: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_bytes(b"alive")
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/b/file").write_bytes(b"1")
    (tree / "a/out").symlink_to(outside)
    (tree / "manifest.json").write_bytes(b"{}")
    assert durable.remove_tree(root_fd, "tree") == 5
    assert sorted(os.listdir(tmp_path)) == ["outside"]
    assert (outside / "canary").read_bytes() == b"alive"
    assert durable.remove_tree(root_fd, "tree") == 0


def test_a_removal_cut_off_half_way_leaves_no_manifest(
    tmp_path: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a checkpoint with its manifest would look like a damaged one, or be adopted."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a", "manifest.json", "z"):
        (tree / name).write_bytes(b"1")
    monkeypatch.setattr(failpoint, "_plan", {"retain.unlink": (1, "eio")})
    monkeypatch.setattr(failpoint, "_hits", {})
    with pytest.raises(OSError, match="fail point"):
        durable.remove_tree(root_fd, "tree")
    assert sorted(os.listdir(tree)) == ["a", "z"]


def test_a_move_of_another_file_than_the_meant_one_is_undone(tmp_path: Path, root_fd: int) -> None:
    (tmp_path / "name").write_bytes(b"another")
    with pytest.raises(SourceChanged):
        durable.move((root_fd, "name"), (root_fd, "moved"), (1, 2))
    assert os.listdir(tmp_path) == ["name"]


def test_only_one_holds_a_directorys_lock(tmp_path: Path, root_fd: int) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    assert durable.try_lock(root_fd)
    assert not durable.try_lock(other)
    os.close(other)
