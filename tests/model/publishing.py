"""Publish and digest: an arena under its final name, and somebody's files where they lie."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from ckptd.worker import digest, imagewriter, kernel, publish, sweep
from ckptd.worker.context import Context
from ckptd.worker.protocol import Digest, FileImage, Publish, Sweep
from tests.model.explore import Says, Tree
from tests.model.invariants import damage, said, sha256, whole_or_absent
from tests.model.recorder import Recorder
from tests.model.scenario import Edge, Scenario
from tests.support.arena import sealed

# Lengths off every border: nine sectors on two pages, two sectors, and a part of one.
FILES = {
    "model.safetensors": bytes(range(1, 251)) * 17 + b"end",
    "deep/opt.safetensors": b"moment " * 100,
    "state.json": b"{}",
}
NESTED = {"model.safetensors": b"weights!" * 80, "deep/opt.safetensors": b"moments"}
SMALL = {"model.safetensors": b"weights!" * 80, "state.json": b"{}"}
RUN = "root/p/e"
FIRST, SECOND = f"{RUN}/step_0000000001", f"{RUN}/step_0000000002"
EDGES = (
    Edge("fsync imagewriter._write_all", "Move"),
    Edge("fsync publish._write_manifest", "Move"),
    Edge("fsync durable.publish", "Move"),
    Edge("fsync durable.publish", "says durable"),
)
NEW_PARENTS = (
    Edge("fsync durable.make_root", "says durable"),
    Edge("fsync durable.make_dir_chain", "says durable"),
)
DIGESTED = (Edge("fsync digest._digest_file", "says durable"), Edge("fsync digest._sync_names", "says durable"))
_IDS = {FIRST: "1" * 32, SECOND: "2" * 32}


def publish_at(root: Path, target: str, files: dict[str, bytes]) -> None:
    """Publish `files` under `target`, as the worker does."""
    fd, images = sealed(files)
    try:
        publish.run(request(root, target, images), Context(fd=fd))
    finally:
        os.close(fd)


def request(root: Path, target: str, images: list[FileImage]) -> Publish:
    manifest = {"v": 1, "checkpoint": _IDS[target], "step": int(target[-1])}
    return Publish(root=str(root / "root"), target=str(root / target), files=images, manifest=manifest)


def published(files: dict[str, bytes], name: str) -> Scenario:
    """Root, project and experiment are new as well."""

    def run(recorder: Recorder) -> None:
        publish_at(recorder.root, FIRST, files)
        recorder.say("durable", FIRST)

    def again(recorder: Recorder) -> None:
        run(recorder)
        sweep.run(Sweep(root=str(recorder.root / "root"), older_s=0.0), Context())

    return Scenario(name, run, check, again=again, edges=(*EDGES, *NEW_PARENTS), clean=True)


def published_beside(files: dict[str, bytes], name: str) -> Scenario:
    """The second save of an experiment; the first was durable long ago."""

    def prepare(root: Path) -> None:
        publish_at(root, FIRST, SMALL)

    def run(recorder: Recorder) -> None:
        if not recorder.ops:
            recorder.say("durable", FIRST)
        publish_at(recorder.root, SECOND, files)
        recorder.say("durable", SECOND)

    return Scenario(name, run, check, prepare=prepare, edges=EDGES)


def published_by_hand(files: dict[str, bytes]) -> Scenario:
    """On a kernel or a file system without renameat2's flags."""
    plain = published(files, "publish without renameat2")

    def run(recorder: Recorder) -> None:
        with without_flags():
            plain.run(recorder)

    return replace(plain, run=run, again=None, fails=False, clean=False)


@contextmanager
def without_flags() -> Iterator[None]:
    """Answer EINVAL to every renameat2, as NFS does."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "no such flags here")

    with mock.patch.object(kernel, "renameat2", refuse):
        yield


def published_with_space_reserved() -> Scenario:
    """As a large file is written: its space reserved first, whole blocks past the page cache, the rest through it."""
    plain = published({"model.safetensors": FILES["model.safetensors"]}, "publish into reserved space")

    def run(recorder: Recorder) -> None:
        with mock.patch.object(imagewriter, "DIRECT_BYTES_MIN", 4096):
            plain.run(recorder)

    return replace(plain, run=run, again=None, clean=False)


def check(tree: Tree, says: Says) -> str:
    """I1, I2, I3: what was called durable is there and whole; no final name holds less than all."""
    broken = whole_or_absent(tree, RUN)
    return broken or next((f"I1: {why}" for path in said(says, "durable") if (why := damage(tree, path))), "")


def digested() -> Scenario:
    """A trainer that fsyncs nothing writes a directory; the digest makes it last."""
    path = "root/runs/a/checkpoint-5"

    def run(recorder: Recorder) -> None:
        os.makedirs(recorder.root / path / "deep")
        for name, data in FILES.items():
            fd = os.open(recorder.root / path / name, os.O_WRONLY | os.O_CREAT)
            os.write(fd, data)
            os.close(fd)
        again(recorder)

    def again(recorder: Recorder) -> None:
        if not (recorder.root / path / "state.json").exists():
            return
        done = digest.run(Digest(root=str(recorder.root / "root"), path=str(recorder.root / path)), Context())
        recorder.say("durable", [(f"{path}/{one.path}", one.sha256) for one in done.files])

    def holds(tree: Tree, says: Says) -> str:
        for name, digest_of in (one for fact in said(says, "durable") for one in fact):
            data = tree.get(name)
            if not isinstance(data, bytes) or sha256(data) != digest_of:
                return f"I1: {name} is lost"
        return ""

    def prepare(root: Path) -> None:
        (root / "root").mkdir()

    return Scenario("digest a directory", run, holds, prepare=prepare, again=again, edges=DIGESTED)


def single_digested() -> Scenario:
    """The same for one file, right under its root."""
    path = "root/last.pt"

    def run(recorder: Recorder) -> None:
        fd = os.open(recorder.root / path, os.O_WRONLY | os.O_CREAT)
        os.write(fd, FILES["model.safetensors"])
        os.close(fd)
        again(recorder)

    def again(recorder: Recorder) -> None:
        if (recorder.root / path).exists():
            digest.run(Digest(root=str(recorder.root / "root"), path=str(recorder.root / path)), Context())
            recorder.say("durable", (recorder.root / path).read_bytes())

    def holds(tree: Tree, says: Says) -> str:
        return next((f"I1: {path} is lost" for data in said(says, "durable") if tree.get(path) != data), "")

    def prepare(root: Path) -> None:
        (root / "root").mkdir()

    return Scenario("digest a file", run, holds, prepare=prepare, again=again, edges=DIGESTED)
