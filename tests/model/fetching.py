"""Files that came back from an archive: filled by whoever fetches, compared, kept; a row says that they are there."""

import os
from pathlib import Path

from ckptd.worker import fetched
from ckptd.worker.context import Context
from ckptd.worker.fetching import FetchBegin, FetchDrop, FetchKeep
from ckptd.worker.protocol import FileRecord
from tests.model.explore import Says, Tree
from tests.model.invariants import said, sha256
from tests.model.recorder import Recorder
from tests.model.scenario import Edge, Scenario

KEY = "5e" * 16
KEPT = f"root/5e/{KEY}"
FILES = {"model.safetensors": b"weights that an archive has as well", "deep/state.json": b"{}"}


def _records() -> list[FileRecord]:
    return [FileRecord(path=name, size_bytes=len(data), sha256=sha256(data), xxh3=[]) for name, data in FILES.items()]


def _fetch(recorder: Recorder) -> None:
    root = str(recorder.root / "root")
    into = Path(fetched.begin(FetchBegin(root=root, key=KEY), Context()).path)
    (into / "deep").mkdir()
    for name, data in FILES.items():
        fd = os.open(into / name, os.O_WRONLY | os.O_CREAT)
        os.write(fd, data)
        os.close(fd)
    fetched.keep(FetchKeep(root=root, key=KEY, path=str(into), files=_records()), Context())
    recorder.say("kept")


def _drop(recorder: Recorder) -> None:
    recorder.say("dropping")  # its row is gone
    for _ in range(2):  # the next start may ask again
        fetched.drop(FetchDrop(root=str(recorder.root / "root"), key=KEY), Context())
    recorder.say("dropped")


def check(tree: Tree, says: Says) -> str:
    """A row always has its files; and what has the final name without one is whole all the same."""
    gone = bool(said(says, "dropping"))
    if not gone and said(says, "kept") and KEPT not in tree:
        return "I1: what the catalog says is kept is not there"
    if KEPT in tree:
        for name, data in FILES.items():
            if tree.get(f"{KEPT}/{name}") != data:
                return f"I2: {name} is damaged under its final name"
    return ""


def fetched_and_kept() -> Scenario:
    """Begin, fill, keep; the row comes last."""
    edges = (
        Edge("fsync fetched._compare", "Move"),
        Edge("fsync durable", "says kept"),
    )
    return Scenario("fetch", _fetch, check, edges=edges)


def dropped() -> Scenario:
    """The row goes first, then the name, then the files."""

    def run(recorder: Recorder) -> None:
        _fetch(recorder)
        _drop(recorder)

    return Scenario("drop what was fetched", run, check)
