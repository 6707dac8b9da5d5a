"""A root says which one it is: what is not the recorded root is not touched, and a mark is whole or none."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.errors import BadPath, RootDegraded
from ckptd.model import new_id
from ckptd.worker import publish, rootmark, scan, sweep, trash
from ckptd.worker.context import Context
from ckptd.worker.protocol import FileImage, IdentityRecord, Link, Publish, Purge, Request, RootMark, Scan, Sweep, Trash
from tests.support.arena import publish_request, sealed
from tests.support.worker_process import Died, WorkerProcess

FILES = {"state.json": b'{"v":1}'}
ELSEWHERE = 999_999  # no device has this number
OLD, OTHER = "0d" * 16, "07" * 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def arena() -> Iterator[tuple[int, list[FileImage]]]:
    made = sealed(FILES)
    yield made
    os.close(made[0])


def a_publish(root: Path, images: list[FileImage], known: RootMark) -> Publish:
    made = publish_request(root, images, checkpoint=OTHER)
    return Publish(root=made.root, target=made.target, files=made.files, manifest=made.manifest, mark=known)


def published(root: Path, arena: tuple[int, list[FileImage]], known: RootMark) -> RootMark:
    """Publish as a worker does it; return what the daemon is told of the root."""
    context = Context(fd=os.dup(arena[0]))
    request = a_publish(root, arena[1], known)
    try:
        with rootmark.checked(request, context):
            publish.run(request, context)
    finally:
        context.close()
    assert context.root is not None
    return context.root


def looked(request: Request) -> RootMark | None:
    """Let a verb that does nothing in."""
    context = Context()
    with rootmark.checked(request, context):
        pass
    return context.root


def written(root: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((root / rootmark.NAME).read_bytes())
    return found


def device(path: Path) -> int:
    return path.stat().st_dev


def mark(place: Path, text: bytes | None = None, /, **fields: object) -> None:
    place.mkdir(exist_ok=True)
    (place / rootmark.NAME).write_bytes(json.dumps({"v": 1, **fields}).encode() if text is None else text)


def test_the_first_publish_makes_the_root_and_its_mark(root: Path, arena: tuple[int, list[FileImage]]) -> None:
    told = published(root, arena, RootMark())
    assert told == RootMark(id=str(written(root)["root"]), device=device(root))
    assert sorted(os.listdir(root)) == [".ckptd-root", "p"]
    assert published(root, arena, told) == told
    assert published(root, arena, RootMark()) == told, "a lost catalog adopts the mark that lies there"


@pytest.mark.parametrize("is_there", [True, False])
def test_a_root_without_its_mark_on_another_device_is_not_touched(
    root: Path, arena: tuple[int, list[FileImage]], *, is_there: bool
) -> None:
    if is_there:
        root.mkdir()
    known = RootMark(id=OLD, device=ELSEWHERE)
    with pytest.raises(RootDegraded, match="another file system") as caught:
        published(root, arena, known)
    assert "is its disk mounted?" in caught.value.hint
    assert (os.listdir(root) == []) if is_there else not root.exists()
    for request in (
        Trash(root=str(root), path=f"{root}/x", identity=IdentityRecord(1, 1, 1, 1, 1), trash="x", mark=known),
        Purge(root=str(root), trash="x", mark=known),
        Link(root=str(root), name=f"{root}/latest", target="x", mark=known),
        Scan(root=str(root), managed=True, mark=known),
    ):
        with pytest.raises(RootDegraded):
            looked(request)


def test_a_root_that_was_emptied_on_its_own_device_goes_on_under_a_new_mark(
    root: Path, arena: tuple[int, list[FileImage]]
) -> None:
    known = RootMark(id=OLD, device=device(root.parent))
    assert looked(Purge(root=str(root), trash="x", mark=known)) is None
    told = published(root, arena, known)
    assert told.id not in {"", OLD}
    assert written(root) == {"root": told.id, "v": 1, "instead_of": OLD}
    again = looked(Purge(root=str(root), trash="x", mark=known))
    assert again == told, "the daemon that died before it knew of the new one is not locked out"
    mark(root, root=OLD)
    with pytest.raises(RootDegraded, match="another root"):
        looked(Purge(root=str(root), trash="x", mark=told))  # what was away comes back: two wrote under one path


def test_the_right_mark_is_right_on_any_device(root: Path) -> None:
    mark(root, root=OLD)
    told = looked(Purge(root=str(root), trash="x", mark=RootMark(id=OLD, device=ELSEWHERE)))
    assert told == RootMark(id=OLD, device=device(root))


def test_another_roots_mark_is_refused_until_a_person_adopts_it(root: Path, arena: tuple[int, list[FileImage]]) -> None:
    mark(root, root=OTHER)
    known = RootMark(id=OLD, device=device(root))
    with pytest.raises(RootDegraded, match="another root") as caught:
        published(root, arena, known)
    assert "ckpt rebuild" in caught.value.hint
    assert os.listdir(root) == [rootmark.NAME]
    assert looked(Scan(root=str(root), managed=True, adopt=True)) == RootMark(id=OTHER, device=device(root))


@pytest.mark.parametrize(
    "text", [b"", b'{"v":1,"root":"0d0d', b"\0" * 60, b"[]", b'{"root":"short"}', b'{"root":7}', b"x" * 9000]
)
def test_half_a_mark_is_none(root: Path, arena: tuple[int, list[FileImage]], text: bytes) -> None:
    mark(root, text)
    with pytest.raises(RootDegraded, match="has no mark"):
        looked(Purge(root=str(root), trash="x", mark=RootMark(id=OLD, device=ELSEWHERE)))
    told = published(root, arena, RootMark(id=OLD, device=device(root)))
    assert written(root)["root"] == told.id


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_file_is_no_mark_and_is_not_waited_for(root: Path, kind: str) -> None:
    root.mkdir()
    place = root / rootmark.NAME
    if kind == "link":
        mark(root.parent / "elsewhere", root=OLD)
        place.symlink_to(root.parent / "elsewhere" / rootmark.NAME)
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(RootDegraded, match="has no mark"):
        looked(Purge(root=str(root), trash="x", mark=RootMark(id=OLD, device=ELSEWHERE)))


def test_what_is_mounted_over_a_root_after_the_look_changes_nothing(root: Path) -> None:
    """The verb works in the directory that was looked at, not in what has its path by then."""
    mark(root, root=OLD)
    (root / ".ckptd-trash/gone").mkdir(parents=True)
    request = Purge(root=str(root), trash="gone", mark=RootMark(id=OLD, device=device(root)))
    context = Context()
    with rootmark.checked(request, context):
        root.rename(root.parent / "aside")
        (root / ".ckptd-trash/gone").mkdir(parents=True)
        assert trash.purge(request, context).count == 1
    assert (root / ".ckptd-trash/gone").is_dir()
    assert not (root.parent / "aside/.ckptd-trash/gone").exists()


def test_two_first_publishes_side_by_side_make_one_mark(root: Path, arena: tuple[int, list[FileImage]]) -> None:
    root.mkdir()
    told: list[RootMark] = []
    start = threading.Barrier(4)

    def one() -> None:
        context = Context(fd=os.dup(arena[0]))
        request = a_publish(root, arena[1], RootMark())
        with rootmark.checked(request, context):
            start.wait(20)  # all have seen that there is none
            os.close(rootmark.make_root(request, context))
        context.close()
        assert context.root is not None
        told.append(context.root)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert told == [RootMark(id=str(written(root)["root"]), device=device(root))] * 4


def test_scans_and_sweeps_leave_the_mark_alone(root: Path, arena: tuple[int, list[FileImage]]) -> None:
    published(root, arena, RootMark())
    before = (root / rootmark.NAME).read_bytes()
    for managed in (True, False):
        parts: list[object] = []
        scan.run(Scan(root=str(root), managed=managed), Context(send=lambda body: parts.append(body["part"])))  # noqa: B023
        assert ".ckptd-root" not in str(parts)
    sweep.run(Sweep(root=str(root), older_s=0.0), Context())
    assert (root / rootmark.NAME).read_bytes() == before


@pytest.mark.parametrize("point", ["mark.written", "mark.fsynced", "mark.renamed", "mark.dir_fsynced"])
def test_a_worker_killed_while_it_marks_a_root_leaves_a_whole_mark_or_none(
    root: Path, arena: tuple[int, list[FileImage]], point: str
) -> None:
    root.mkdir()
    known = RootMark(id=OLD, device=device(root))
    with WorkerProcess(fail=f"{point}=kill") as worker, pytest.raises(Died) as died:
        worker.ask(a_publish(root, arena[1], known), arena[0])
    assert died.value.status == -signal.SIGKILL
    named = (root / rootmark.NAME).exists()
    assert named == (point in {"mark.renamed", "mark.dir_fsynced"})
    assert not (root / "p").exists(), "nothing is published before the mark is durable"
    told = published(root, arena, known)
    assert told.id == written(root)["root"]
    assert sorted(os.listdir(root)) == [".ckptd-root", "p"]


def test_a_publish_that_fails_after_the_mark_was_written_still_tells_of_it(
    root: Path, arena: tuple[int, list[FileImage]]
) -> None:
    root.mkdir()
    with WorkerProcess(fail="copy.tmp_created=eio") as worker:
        worker.send(a_publish(root, arena[1], RootMark()), arena[0])
        frame = worker.reply(1)
    assert not frame["ok"]
    assert frame["root"] == {"id": written(root)["root"], "device": device(root)}


def test_a_request_without_a_mark_is_not_checked_and_marks_nothing(
    root: Path, arena: tuple[int, list[FileImage]]
) -> None:
    mark(root, b"torn")
    assert looked(Purge(root=str(root), trash="x")) is None
    request = publish_request(root, arena[1])
    publish.run(request, Context(fd=os.dup(arena[0])))
    assert (root / rootmark.NAME).read_bytes() == b"torn"


def test_a_root_that_is_no_absolute_path_is_refused_as_ever(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises((BadPath, OSError)):
        looked(Purge(root=str(tmp_path / "file"), trash=new_id(), mark=RootMark()))
