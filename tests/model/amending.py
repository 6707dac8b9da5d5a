"""What became known after a publish: a small file beside the manifest, replaced whole."""

import json
from pathlib import Path

from ckptd.worker import amend
from ckptd.worker.context import Context
from ckptd.worker.protocol import Amend
from tests.model import publishing
from tests.model.explore import Says, Tree
from tests.model.invariants import damage
from tests.model.publishing import FIRST, SMALL
from tests.model.recorder import Recorder
from tests.model.scenario import Edge, Scenario

LATE = f"{FIRST}/late.json"
EDGES = (Edge("fsync durable.replace_file", "Move"), Edge("fsync durable.replace_file", "says amended"))


def _prepare(root: Path) -> None:
    publishing.publish_at(root, FIRST, SMALL)


def _amend(root: Path, loss: float) -> None:
    checkpoint = json.loads((root / FIRST / "manifest.json").read_bytes())["checkpoint"]
    amend.run(
        Amend(root=str(root / "root"), path=str(root / FIRST), checkpoint=checkpoint, metrics={"loss": loss}), Context()
    )


def amended() -> Scenario:
    """The first metric that came late."""

    def run(recorder: Recorder) -> None:
        recorder.say("amending", 0.25)
        _amend(recorder.root, 0.25)
        recorder.say("amended", 0.25)

    return Scenario("amend", run, check, prepare=_prepare, edges=EDGES)


def amended_again() -> Scenario:
    """A better figure in the place of the first."""

    def prepare(root: Path) -> None:
        _prepare(root)
        _amend(root, 0.25)

    def run(recorder: Recorder) -> None:
        if not recorder.ops:
            recorder.say("amended", 0.25)
        recorder.say("amending", 0.125)
        _amend(recorder.root, 0.125)
        recorder.say("amended", 0.125)

    return Scenario("amend again", run, check, prepare=prepare, edges=EDGES)


def check(tree: Tree, says: Says) -> str:
    """I1, I2: the file holds what was said last, or, while it is replaced, the old or the new; never half of one."""
    if why := damage(tree, FIRST):
        return f"I1: {why}"
    done = [say.fact for say in says if say.what == "amended"]
    allowed = {done[-1] if done else None}
    if says and says[-1].what == "amending":
        allowed.add(says[-1].fact)
    text = tree.get(LATE)
    try:
        found = json.loads(text)["metrics"]["loss"] if isinstance(text, bytes) else None
    except (ValueError, KeyError, TypeError):
        return "I2: late.json is damaged"
    return "" if found in allowed or not says else f"I1: late.json says {found}, not one of {allowed}"
