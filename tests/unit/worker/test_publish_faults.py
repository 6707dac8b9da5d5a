"""What a publish does when the disk fails it, and the order that makes a power cut harmless."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from ckptd import failpoint
from ckptd.errors import NoSpace, SourceChanged
from ckptd.worker import durable, imagewriter, publish
from ckptd.worker.context import Context
from ckptd.worker.fsync import FsyncFailed
from ckptd.worker.protocol import FileImage
from tests.support.arena import publish_request


def arm(monkeypatch: pytest.MonkeyPatch, **plan: Any) -> None:
    monkeypatch.setattr(failpoint, "_plan", {name.replace("__", "."): value for name, value in plan.items()})
    monkeypatch.setattr(failpoint, "_hits", {})


def test_the_manifest_is_written_after_every_file_is_durable_and_the_name_given_last(
    root: Path, small: tuple[int, list[FileImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the calls that a power cut may come between. SIGKILL can't tell: only the order can."""
    fd, images = small
    order: list[str] = []
    names = lambda which: os.readlink(f"/proc/self/fd/{which}").removeprefix(str(root))  # noqa: E731
    real_fsync, real_write, real_rename = os.fsync, os.write, durable.rename_noreplace

    def fsync(which: int) -> None:
        name = names(which)
        order.append("fsync " + ("temporary" if name.count("ckptd-tmp") and name.count("/") == 3 else name[-13:]))
        real_fsync(which)

    def write(which: int, data: memoryview) -> int:
        order.append("write " + names(which)[-13:])
        return real_write(which, data)

    def rename(old: Any, new: Any) -> None:
        order.append("rename")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(durable, "rename_noreplace", rename)
    publish.run(publish_request(root, images), Context(fd=fd))
    at = next(i for i, step in enumerate(order) if step.endswith("/f"))
    assert order[at].startswith("fsync")
    assert order[at + 1 :] == ["write manifest.json", "fsync manifest.json", "fsync temporary", "rename", "fsync /p/e"]


@pytest.mark.parametrize("point", ["copy__fsynced", "manifest__fsynced", "dir__fsynced", "parent__fsynced"])
def test_a_failed_fsync_is_answered_by_writing_everything_to_new_inodes(
    root: Path, small: tuple[int, list[FileImage]], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    fd, images = small
    arm(monkeypatch, **{point: (1, "eio")})
    made: list[int] = []
    real = imagewriter.Output.create
    monkeypatch.setattr(imagewriter.Output, "create", lambda at, file: made.append(at) or real(at, file))
    done = publish.run(publish_request(root, images), Context(fd=fd))
    assert len(made) == 2
    assert Path(done.path, "f").read_bytes() == b"x" * 5000
    assert os.listdir(root / "p/e") == ["step_0000000001"]


def test_a_second_failed_fsync_is_the_end(
    root: Path, small: tuple[int, list[FileImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, images = small
    arm(monkeypatch, copy__fsynced=(1, "eio"), manifest__fsynced=(1, "eio"))
    with pytest.raises(FsyncFailed):
        publish.run(publish_request(root, images), Context(fd=fd))
    assert os.listdir(root / "p/e") == []


def test_a_full_disk_is_seen_before_a_byte_is_written(
    root: Path, small: tuple[int, list[FileImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, images = small
    free = SimpleNamespace(f_bavail=5050, f_frsize=1)  # the file has 5,000 bytes: 2 % more must be free
    monkeypatch.setattr(os, "fstatvfs", lambda _: free)
    with pytest.raises(NoSpace) as caught:
        publish.run(publish_request(root, images), Context(fd=fd))
    assert caught.value.details["need_bytes"] == 5100
    assert os.listdir(root / "p/e") == []
    free.f_bavail = 5100
    publish.run(publish_request(root, images), Context(fd=fd))


def test_a_disk_that_fills_up_at_the_fsync_is_not_tried_twice(
    root: Path, small: tuple[int, list[FileImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thin volumes and quotas say so late; writing it all again would fill them again."""
    fd, images = small
    arm(monkeypatch, copy__fsynced=(1, "enospc"))
    with pytest.raises(NoSpace):
        publish.run(publish_request(root, images), Context(fd=fd))
    assert os.listdir(root / "p/e") == []


@pytest.mark.parametrize("published", [False, True], ids=["written", "adopted"])
def test_bytes_that_are_not_those_asked_for_get_no_name(
    root: Path, small: tuple[int, list[FileImage]], *, published: bool
) -> None:
    """A repair says what it wants: a manifest made from what the memory holds would fit whatever it holds."""
    fd, images = small
    request = publish_request(root, images)
    good = {record.path: record.sha256 for record in publish.run(request, Context(fd=fd)).files}
    if not published:
        shutil.rmtree(root / "p/e/step_0000000001")
    wrong = msgspec.structs.replace(request, sha256={**good, images[0].path: "0" * 64})
    with pytest.raises(SourceChanged):
        publish.run(wrong, Context(fd=fd))
    assert os.listdir(root / "p/e") == ["step_0000000001"] * published
    assert publish.run(msgspec.structs.replace(request, sha256=good), Context(fd=fd)).adopted == published


def test_a_directory_removed_while_a_save_is_written_into_it_is_made_again_by_the_next_try(
    root: Path, small: tuple[int, list[FileImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, images = small
    real = failpoint.hit

    def hit(point: str) -> None:
        if point == "copy.tmp_created":
            shutil.rmtree(root / "p")
        real(point)

    with monkeypatch.context() as patched:
        patched.setattr(failpoint, "hit", hit)
        with pytest.raises(FileNotFoundError):
            publish.run(publish_request(root, images), Context(fd=fd))
    publish.run(publish_request(root, images), Context(fd=fd))
    assert os.listdir(root / "p/e") == ["step_0000000001"]
