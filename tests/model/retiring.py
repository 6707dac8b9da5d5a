"""Retire, restore and purge, as the worker does them; the promises are the catalog's rows around each."""

import json
import os
from pathlib import Path

from ckptd.worker import beneath, durable, sweep, trash
from ckptd.worker.context import Context
from ckptd.worker.members import identity, members
from ckptd.worker.protocol import IdentityRecord, Purge, Restore, Sweep, Trash
from tests.model import publishing
from tests.model.explore import Says, Tree
from tests.model.invariants import MANIFEST, damage, whole_or_absent
from tests.model.publishing import FILES, FIRST, RUN
from tests.model.recorder import Recorder
from tests.model.scenario import Edge, Scenario

BIN = "root/.ckptd-trash/one"


def _prepare(root: Path) -> None:
    publishing.publish_at(root, FIRST, FILES)


def _prepare_trashed(root: Path) -> None:
    _prepare(root)
    _trash(root)


def _identity(path: Path) -> IdentityRecord:
    fd = os.open(path, beneath.DIRECTORY_FLAGS)
    try:
        return identity(os.fstat(fd), members(fd))
    finally:
        os.close(fd)


def _trash(root: Path) -> None:
    here = root / FIRST if (root / FIRST).exists() else root / BIN
    trash.trash(
        Trash(root=str(root / "root"), path=str(root / FIRST), identity=_identity(here), trash="one"), Context()
    )


def _restore(root: Path) -> None:
    here = root / FIRST if (root / FIRST).exists() else root / BIN
    trash.restore(
        Restore(
            root=str(root / "root"),
            path=str(root / FIRST),
            identity=_identity(here),
            trash="one",
            checkpoint=json.loads((here / MANIFEST).read_bytes())["checkpoint"],
        ),
        Context(),
    )


def _purge(root: Path) -> None:
    trash.purge(Purge(root=str(root / "root"), trash="one"), Context())


def retired() -> Scenario:
    """Tombstone, rename, answer."""

    def run(recorder: Recorder) -> None:
        recorder.say("trashing")
        _trash(recorder.root)
        recorder.say("trashed")

    edges = (
        Edge("fsync trash._trash_at", "Move"),
        Edge("fsync durable.move", "fsync durable.move"),
        Edge("fsync durable.move", "says trashed"),
    )
    return Scenario("retire", run, check, prepare=_prepare, edges=edges)


def restored() -> Scenario:
    """Back from the trash; its row says so first, and says that it is done afterwards."""

    def run(recorder: Recorder) -> None:
        recorder.say("restoring")
        _restore(recorder.root)
        recorder.say("restored")

    edges = (Edge("fsync durable.move", "fsync durable.move"), Edge("fsync durable.move", "says restored"))
    return Scenario("restore", run, check, prepare=_prepare_trashed, edges=edges)


def restored_into_nothing() -> Scenario:
    """The experiment's directory went away meanwhile and is made again."""

    def prepare(root: Path) -> None:
        _prepare_trashed(root)
        (root / RUN).rmdir()
        (root / RUN).parent.rmdir()

    def run(recorder: Recorder) -> None:
        recorder.say("restoring")
        _restore(recorder.root)
        recorder.say("restored")

    edges = (Edge("fsync durable.make_dir_chain", "Move"), Edge("fsync durable.move", "says restored"))
    return Scenario("restore into new directories", run, check, prepare=prepare, edges=edges)


def purged() -> Scenario:
    """Gone for good: the trash was durable, and has had its grace."""

    def run(recorder: Recorder) -> None:
        recorder.say("purging")
        _purge(recorder.root)
        recorder.say("purged")

    edges = (
        Edge(f"Drop {MANIFEST}", "Drop"),
        Edge("fsync durable.remove_tree", "Drop"),
        Edge("fsync durable.remove_tree", "says purged"),
    )
    return Scenario("purge", run, check, prepare=_prepare_trashed, edges=edges)


def retired_and_purged() -> Scenario:
    """Both, with no time between them for the disk to catch up."""

    def run(recorder: Recorder) -> None:
        recorder.say("trashing")
        _trash(recorder.root)
        recorder.say("trashed")
        recorder.say("purging")
        _purge(recorder.root)
        recorder.say("purged")

    def again(recorder: Recorder) -> None:
        if not any(getattr(op, "what", "") == "purging" for op in recorder.ops):
            recorder.say("trashing")
            _trash(recorder.root)
            recorder.say("trashed")
        recorder.say("purging")
        _purge(recorder.root)
        recorder.say("purged")

    return Scenario("retire and purge", run, check, prepare=_prepare, again=again)


def file_purged() -> Scenario:
    """A single file that somebody handed over, gone for good."""

    def prepare(root: Path) -> None:
        _prepare_trashed(root)
        fd = beneath.open_root(str(root / "root/.ckptd-trash"))
        durable.remove_tree(fd, "one")
        os.close(fd)
        (root / BIN).write_bytes(b"weights")

    def run(recorder: Recorder) -> None:
        recorder.say("purging")
        _purge(recorder.root)
        recorder.say("purged")

    return Scenario(
        "purge a file", run, check, prepare=prepare, edges=(Edge("fsync durable.remove_tree", "says purged"),)
    )


def swept() -> Scenario:
    """What a killed publish left beside a checkpoint that must stay."""

    def prepare(root: Path) -> None:
        _prepare(root)
        left = root / RUN / ".step_0000000002.ckptd-tmp-22222222222222222222222222222222-00000001"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half of it")
        (left / MANIFEST).write_bytes(b"{}")

    def run(recorder: Recorder) -> None:
        sweep.run(Sweep(root=str(recorder.root / "root"), older_s=0.0), Context())

    return Scenario("sweep", run, check, prepare=prepare)


def check(tree: Tree, says: Says) -> str:
    """I1 to I4: what its row says of it is true on the disk, and no name of it holds less than all."""
    if broken := whole_or_absent(tree, RUN):
        return broken
    here, binned = FIRST in tree, BIN in tree
    whole = binned and not damage(tree, BIN)
    half = not whole and f"{BIN}/{MANIFEST}" in tree
    holds, otherwise = {
        "": (here or binned, "I1: it is gone"),
        "trashing": (here or whole, "I4: it is whole neither under its name nor in the trash"),
        "restoring": (here or whole, "I4: it is whole neither in the trash nor under its name"),
        "trashed": (whole and not here, "I4: trashed, and not whole in the trash alone"),
        "restored": (here and not binned, "I1: restored, and not under its name alone"),
        "purging": (not here and not half, "I2: half of it still looks like a checkpoint"),
        "purged": (not here and not binned, "I11: what was purged is back"),
    }[says[-1].what if says else ""]
    return "" if holds else otherwise
