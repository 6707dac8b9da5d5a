"""Optimizer states out of an old checkpoint, back again, or gone for good; the promises are the catalog's rows around each."""

import json
from pathlib import Path

from ckptd.worker import strip, trash
from ckptd.worker.context import Context
from ckptd.worker.protocol import Purge, Strip, Unstrip
from tests.model import publishing
from tests.model.explore import Says, Tree
from tests.model.invariants import damage, whole_or_absent
from tests.model.publishing import FIRST, RUN
from tests.model.recorder import Recorder
from tests.model.scenario import Edge, Scenario

NAME = "optimizer.safetensors"
STATE = b"moments of the optimizer, which training goes on from"
FILES = {"model.safetensors": b"weights", NAME: STATE, "state.json": b"{}"}
BIN = "root/.ckptd-trash/one.stripped"


def _prepare(root: Path) -> None:
    publishing.publish_at(root, FIRST, FILES)


def _prepare_stripped(root: Path) -> None:
    _prepare(root)
    _strip(root)


def _about(root: Path) -> dict[str, object]:
    checkpoint = json.loads((root / FIRST / "manifest.json").read_bytes())["checkpoint"]
    about = {"root": str(root / "root"), "path": str(root / FIRST), "checkpoint": checkpoint}
    return {**about, "files": {NAME: len(STATE)}, "trash": "one.stripped"}


def _strip(root: Path) -> None:
    strip.strip(Strip(at="2030-01-01T00:00:00+00:00", **_about(root)), Context())


def _unstrip(root: Path) -> None:
    strip.unstrip(Unstrip(**_about(root)), Context())


def stripped() -> Scenario:
    """Intent, note beside the manifest, rename, answer."""

    def run(recorder: Recorder) -> None:
        recorder.say("stripping")
        _strip(recorder.root)
        recorder.say("stripped")

    edges = (
        Edge("fsync durable.replace_file", f"Move {NAME}"),
        Edge("fsync durable.make_dir_chain", f"Move {NAME}"),
        Edge("fsync durable.move", "fsync durable.move"),
        Edge("fsync durable.move", "says stripped"),
    )
    return Scenario("strip", run, check, prepare=_prepare, edges=edges)


def unstripped() -> Scenario:
    """Back from the trash; only then is the note taken away."""

    def run(recorder: Recorder) -> None:
        recorder.say("unstripping")
        _unstrip(recorder.root)
        recorder.say("unstripped")

    edges = (Edge("fsync durable.move", "Drop stripped.json"), Edge("fsync durable.remove_tree", "says unstripped"))
    return Scenario("put back what was stripped", run, check, prepare=_prepare_stripped, edges=edges)


def stripped_and_purged() -> Scenario:
    """For good, with no time between the two for the disk to catch up."""

    def run(recorder: Recorder) -> None:
        recorder.say("stripping")
        _strip(recorder.root)
        recorder.say("stripped")
        _purge(recorder)

    def again(recorder: Recorder) -> None:
        if any(getattr(op, "what", "") == "purging" for op in recorder.ops):
            _purge(recorder)
        else:
            run(recorder)

    edges = (Edge("fsync durable.move", "says stripped"), Edge("fsync durable.remove_tree", "says purged"))
    return Scenario("strip and purge", run, check, prepare=_prepare, again=again, edges=edges)


def _purge(recorder: Recorder) -> None:
    recorder.say("purging")
    trash.purge(Purge(root=str(recorder.root / "root"), trash="one.stripped"), Context())
    recorder.say("purged")


def check(tree: Tree, says: Says) -> str:
    """I1, I2: the checkpoint is whole but for what stripped.json names, and that is whole somewhere until it is purged."""
    if broken := whole_or_absent(tree, RUN):
        return broken
    if why := damage(tree, FIRST):
        return f"I1: {why}"
    here, binned = tree.get(f"{FIRST}/{NAME}") == STATE, tree.get(f"{BIN}/{NAME}") == STATE
    noted = f"{FIRST}/stripped.json" in tree
    holds, otherwise = {
        "": (here or binned, "I1: the optimizer's state is gone"),
        "stripping": (here or (binned and noted), "I4: it is neither here, nor noted and whole in the trash"),
        "stripped": (binned and noted and not here, "I4: stripped, and not noted and whole in the trash alone"),
        "unstripping": (here or (binned and noted), "I4: it is neither in the trash, noted, nor back"),
        "unstripped": (here and not noted and not binned, "I1: put back, and not in its place alone, without a note"),
        "purging": (noted and not here, "I2: it goes, and nothing says so"),
        "purged": (noted and not here and not binned, "I11: what was purged is back"),
    }[says[-1].what if says else ""]
    return "" if holds else otherwise
