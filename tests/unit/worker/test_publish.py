"""Arena to final name, in this process and on a real file system."""

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from ckptd.errors import BadPath, BadRequest, Corrupt, Exists, SourceChanged
from ckptd.model import new_id
from ckptd.worker import beneath, digest, imagewriter, publish, verify
from ckptd.worker.context import Cancelled, Context, Limits
from ckptd.worker.image import Image
from ckptd.worker.protocol import Digest, FileImage, Publish, Verify
from tests.support.arena import MIB, publish_request, sealed, spooled
from tests.support.in_process import open_fds

BLOCK = bytes(range(256)) * 4096
FILES = {
    "model.safetensors": BLOCK * 17 + b"tail",
    "deep/er/optimizer.safetensors": b"\xff" * (MIB * 2),
    "state.json": b'{"v":1}',
    "empty": b"",
}


@pytest.fixture(params=["sealed", "spooled"])
def arena(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, list[FileImage]]]:
    """The same image as a sealed memfd (mapped) and as a spool file (read)."""
    made = sealed(FILES) if request.param == "sealed" else spooled(tmp_path / "spool", FILES)
    yield made
    os.close(made[0])


def assert_holds(path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        assert (path / name).read_bytes() == data


def test_a_publish_holds_every_byte_and_says_so_in_its_manifest(root: Path, arena: tuple[int, list[FileImage]]) -> None:
    fd, images = arena
    request = publish_request(root, images, metrics={"val_loss": 0.5, "acc": "NaN"}, note="a\nnote")
    done = publish.run(request, Context(fd=fd))
    target = Path(done.path)
    assert_holds(target, FILES)
    text = (target / "manifest.json").read_bytes()
    manifest = json.loads(text)
    assert manifest | {"files": []} == request.manifest | {"files": []}
    assert done.manifest_sha256 == hashlib.sha256(text).hexdigest()
    assert [entry["path"] for entry in manifest["files"]] == list(FILES)
    for entry, record, data in zip(manifest["files"], done.files, FILES.values(), strict=True):
        assert entry == {"path": record.path, "size_bytes": len(data), "sha256": record.sha256, "xxh3": record.xxh3}
        assert record.sha256 == hashlib.sha256(data).hexdigest()
        mib = [data[at : at + MIB] for at in range(0, len(data), MIB)]
        assert record.xxh3 == [xxhash.xxh3_64(part).hexdigest() for part in mib]
    assert done.size_bytes == sum(map(len, FILES.values()))
    assert not done.adopted
    assert os.listdir(target.parent) == [target.name]
    assert verify.run(Verify(root=str(root), path=done.path, files=done.files), Context()).damage == []


def test_a_publish_is_recognised_by_the_identity_it_returned(root: Path, arena: tuple[int, list[FileImage]]) -> None:
    """Retention compares it before it removes: what digest and settle see later must be equal."""
    fd, images = arena
    done = publish.run(publish_request(root, images), Context(fd=fd))
    assert digest.run(Digest(root=str(root), path=done.path), Context()).identity == done.identity


def test_files_take_exactly_their_size_on_disk_however_they_were_written(
    root: Path, arena: tuple[int, list[FileImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """O_DIRECT refused at open, refused at the first write, and not refused: the bytes are the same."""
    fd, images = arena
    real_pwrite, real_open = os.pwrite, beneath.open_beneath

    def pwrite(out: int, data: memoryview, offset: int) -> int:
        import fcntl

        if fcntl.fcntl(out, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "unaligned")
        return real_pwrite(out, data, offset)

    def open_beneath(at: int, parts: tuple[str, ...], flags: int, **named: Any) -> int:
        opened = real_open(at, parts, flags & ~os.O_DIRECT, **named)
        if flags & os.O_DIRECT:
            os.close(opened)
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return opened

    answers = []
    for step, patch in enumerate([None, ("pwrite", pwrite), ("open_beneath", open_beneath)]):
        with monkeypatch.context() as patched:
            if patch is not None:
                patched.setattr(os if patch[0] == "pwrite" else beneath, *patch)
            done = publish.run(publish_request(root, images, target=root / str(step)), Context(fd=fd))
        assert_holds(root / str(step), FILES)
        answers.append(done)
    assert [done.direct for done in answers] == [True, False, False]
    assert answers[0].files == answers[1].files == answers[2].files


def test_a_kernel_that_writes_less_than_asked_is_asked_again(
    root: Path, arena: tuple[int, list[FileImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, images = arena
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda out, data, at: real(out, data[: max(1, len(data) // 3)], at))
    done = publish.run(publish_request(root, images), Context(fd=fd))
    assert_holds(Path(done.path), FILES)


def test_publishing_twice_is_one_publish(root: Path, arena: tuple[int, list[FileImage]]) -> None:
    fd, images = arena
    request = publish_request(root, images)
    first = publish.run(request, Context(fd=fd))
    again = publish.run(request, Context(fd=fd))
    assert again.adopted
    assert (again.files, again.identity, again.manifest_sha256) == (first.files, first.identity, first.manifest_sha256)
    assert os.listdir(root / "p/e") == ["step_0000000001"]


def test_adopting_makes_the_name_durable_again(
    root: Path, small: tuple[int, list[FileImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first publish may have died between its rename and the parent's fsync."""
    fd, images = small
    request = publish_request(root, images)
    publish.run(request, Context(fd=fd))
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda which: synced.append(os.fstat(which).st_ino))
    publish.run(request, Context(fd=fd))
    assert synced[-1] == (root / "p/e").stat().st_ino


def test_another_checkpoint_under_the_name_is_an_error_and_stays(
    root: Path, small: tuple[int, list[FileImage]]
) -> None:
    fd, images = small
    first = publish.run(publish_request(root, images), Context(fd=fd))
    with pytest.raises(Exists):
        publish.run(publish_request(root, images), Context(fd=fd))
    assert verify.run(Verify(root=str(root), path=first.path, files=first.files), Context()).damage == []
    assert os.listdir(root / "p/e") == ["step_0000000001"]


@pytest.mark.parametrize("kind", ["empty directory", "file", "directory without manifest", "foreign manifest"])
def test_what_is_no_checkpoint_of_ours_is_never_replaced(
    root: Path, small: tuple[int, list[FileImage]], kind: str
) -> None:
    fd, images = small
    target = root / "p/e/step_0000000001"
    target.parent.mkdir(parents=True)
    if kind == "file":
        target.write_bytes(b"mine")
    else:
        target.mkdir()
    if kind == "directory without manifest":
        (target / "mine").write_bytes(b"mine")
    if kind == "foreign manifest":
        (target / "manifest.json").write_text("[]")
    with pytest.raises(Exists):
        publish.run(publish_request(root, images), Context(fd=fd))
    assert os.listdir(target.parent) == [target.name]


def test_a_name_taken_while_we_wrote_is_found_out_by_the_rename(
    root: Path, small: tuple[int, list[FileImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers may publish one checkpoint when the first hung: one of them wins, both are right."""
    fd, images = small
    request = publish_request(root, images)
    real = publish._write_manifest
    won: list[Any] = []

    def race(*args: Any) -> None:
        real(*args)
        if not won:
            won.append(None)
            won[0] = publish.run(request, Context(fd=fd))

    monkeypatch.setattr(publish, "_write_manifest", race)
    lost = publish.run(request, Context(fd=fd))
    assert not won[0].adopted
    assert lost.adopted
    assert lost.identity == won[0].identity
    assert os.listdir(root / "p/e") == ["step_0000000001"]


def test_a_damaged_checkpoint_is_not_adopted(root: Path, small: tuple[int, list[FileImage]]) -> None:
    fd, images = small
    request = publish_request(root, images)
    done = publish.run(request, Context(fd=fd))
    os.truncate(Path(done.path) / "f", 10)
    with pytest.raises(Corrupt):
        publish.run(request, Context(fd=fd))


def test_a_cancelled_publish_leaves_nothing(root: Path, arena: tuple[int, list[FileImage]]) -> None:
    fd, images = arena
    context = Context(fd=fd)
    context.cancelled.set()
    with pytest.raises(Cancelled):
        publish.run(publish_request(root, images), context)
    assert os.listdir(root / "p/e") == []


def test_a_spool_file_that_shrinks_is_an_error_and_no_crash(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping of it would kill the worker with SIGBUS at the first lost page."""
    fd, images = spooled(tmp_path / "spool", FILES)
    real = imagewriter.Output.write

    def shrink(self: imagewriter.Output, view: memoryview, offset: int) -> None:
        real(self, view, offset)
        os.truncate(tmp_path / "spool", 8192)

    monkeypatch.setattr(imagewriter.Output, "write", shrink)
    with pytest.raises(SourceChanged):
        publish.run(publish_request(root, images), Context(fd=fd))
    assert os.listdir(root / "p/e") == []
    os.close(fd)


def test_an_unsealed_memfd_is_read_and_never_mapped(root: Path) -> None:
    """Its owner could cut it short under us at any time."""
    fd, images = sealed({"f": b"x" * 5000})
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.sendfile(unsealed, fd, 0, os.fstat(fd).st_size)
    image = Image(unsealed, images)
    assert not image.mapped
    image.close()
    done = publish.run(publish_request(root, images), Context(fd=unsealed))
    assert_holds(Path(done.path), {"f": b"x" * 5000})
    os.close(unsealed)
    os.close(fd)


def mapped(inode: int) -> bool:
    """Whether this process maps a memfd of that inode."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(line.split()[4] == str(inode) for line in lines if "/memfd:" in line)


def test_an_image_that_is_closed_while_a_traceback_holds_a_view_goes_with_the_view() -> None:
    """Else the error of a write that failed would be lost to one that its memory can't be unmapped."""
    fd, images = sealed({"f": b"x" * 5000})
    inode = os.fstat(fd).st_ino
    image = Image(fd, images)
    view = image.view(4096, 5000)
    image.close()
    image.close()
    os.close(fd)
    assert not image.mapped
    assert (bytes(view[:3]), mapped(inode)) == (b"xxx", True)
    del view
    assert not mapped(inode)


@pytest.mark.parametrize(
    "image",
    [
        FileImage("../f", 4096, 1),
        FileImage("/f", 4096, 1),
        FileImage("a//f", 4096, 1),
        FileImage("manifest.json", 4096, 1),
        FileImage("f", 4097, 1),
        FileImage("f", 4096, 1 << 40),
        FileImage("f", 4096, -1),
        FileImage("f", -4096, 1),
    ],
)
def test_files_that_do_not_fit_the_arena_are_refused(
    root: Path, small: tuple[int, list[FileImage]], image: FileImage
) -> None:
    """M201."""
    with pytest.raises((BadRequest, BadPath)):
        publish.run(publish_request(root, [image]), Context(fd=small[0]))
    with pytest.raises(BadRequest):
        publish.run(publish_request(root, [small[1][0]] * 2), Context(fd=small[0]))


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_a_descriptor_that_is_no_file_is_refused(
    root: Path, small: tuple[int, list[FileImage]], tmp_path: Path, kind: str
) -> None:
    """M201."""
    fd = os.pipe()[0] if kind == "pipe" else os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BadRequest):
        publish.run(publish_request(root, small[1]), Context(fd=fd))
    os.close(fd)


def test_a_symlink_on_the_way_to_the_target_is_refused(
    root: Path, small: tuple[int, list[FileImage]], tmp_path: Path
) -> None:
    """M201."""
    outside = tmp_path / "outside"
    outside.mkdir()
    root.mkdir()
    (root / "p").symlink_to(outside)
    with pytest.raises((BadPath, NotADirectoryError)):
        publish.run(publish_request(root, small[1]), Context(fd=small[0]))
    assert os.listdir(outside) == []


def test_more_files_than_one_batch_are_all_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"d{i % 3}/f{i}": bytes([i % 256]) * i for i in range(imagewriter.BATCH_FILES_MAX + 70)}
    fd, images = sealed(files)
    before = open_fds("memfd:")
    done = publish.run(publish_request(root, images), Context(fd=fd))
    assert_holds(Path(done.path), files)
    assert [record.sha256 for record in done.files] == [hashlib.sha256(data).hexdigest() for data in files.values()]
    assert open_fds("memfd:") <= before
    assert open_fds(str(root)) == 0
    os.close(fd)


def test_a_publish_says_that_it_lives_while_it_writes_and_while_it_digests(root: Path) -> None:
    """Either may go on for minutes after the other is done."""
    fd, images = sealed(FILES)
    said: list[tuple[str, dict[str, object]]] = []
    limits = Limits(alive_every_s=0.0)
    context = Context(fd=fd, limits=limits, send=lambda body: said.append((threading.current_thread().name, body)))
    publish.run(publish_request(root, images), context)
    assert {name for name, _ in said} == {threading.current_thread().name, "hash"}
    assert all(body == {"alive": True} for _, body in said)
    os.close(fd)


def test_the_manifest_is_one_line_a_file(root: Path, small: tuple[int, list[FileImage]]) -> None:
    done = publish.run(publish_request(root, small[1], tags=["a", "b"]), Context(fd=small[0]))
    lines = (Path(done.path) / "manifest.json").read_text().splitlines()
    assert [line for line in lines if '"path"' in line] == [
        f'    {{"path":"f","size_bytes":5000,"sha256":"{done.files[0].sha256}","xxh3":["{done.files[0].xxh3[0]}"]}}'
    ]


def test_a_publish_without_an_arena_or_an_id_is_refused(root: Path, small: tuple[int, list[FileImage]]) -> None:
    with pytest.raises(BadRequest):
        publish.run(publish_request(root, small[1]), Context())
    with pytest.raises(BadRequest):
        publish.run(publish_request(root, small[1], checkpoint="../../x"), Context(fd=small[0]))
    with pytest.raises(BadPath):
        publish.run(
            Publish(root=str(root), target=str(root), files=small[1], manifest={"checkpoint": new_id()}),
            Context(fd=small[0]),
        )


def test_a_starved_second_hash_thread_hands_over_what_it_has_begun(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs at the lowest priority: beside a busy training it may get no processor at all."""
    files = {"large": os.urandom(24 * MIB), "less": os.urandom(20 * MIB + 7)}
    fd, images = sealed(files)
    starved: list[int] = []
    chunks: list[int] = []
    held: list[imagewriter._Digests] = []
    real_view = Image.view

    def view(image: Image, offset: int, size_bytes: int) -> memoryview:
        if threading.get_native_id() in starved:
            chunks.append(size_bytes)
            begun.set()
            first_is_done.wait(60.0)
            end_s = time.monotonic() + 60.0
            while len(chunks) == 1 and not held[0]._first_is_idle and time.monotonic() < end_s:
                time.sleep(0.001)  # it says that it is done a moment before it is
        elif threading.current_thread().name == "hash":
            assert begun.wait(60.0)  # the second has a file of its own before the first goes on
        return real_view(image, offset, size_bytes)

    real_next = imagewriter._Digests._next

    def following(digests: imagewriter._Digests) -> int | None:
        if digests._digests[0].size_bytes:
            held[:] = [digests]
            first_is_done.set()
        return real_next(digests)

    begun, first_is_done = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "setpriority", lambda _which, who, _value: starved.append(who))
    monkeypatch.setattr(Image, "view", view)
    monkeypatch.setattr(imagewriter._Digests, "_next", following)
    done = publish.run(publish_request(root, images), Context(fd=fd))
    os.close(fd)
    assert [record.sha256 for record in done.files] == [hashlib.sha256(data).hexdigest() for data in files.values()]
    assert 0 < len(chunks) < 20
