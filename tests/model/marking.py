"""The mark of a root: none, or a whole one, and it stays once its root is published to."""

import json
import os
from pathlib import Path

from ckptd.worker import rootmark
from ckptd.worker.context import Context
from ckptd.worker.protocol import Publish, RootMark
from tests.model.explore import Says, Tree
from tests.model.invariants import said
from tests.model.recorder import Recorder
from tests.model.scenario import Edge, Scenario

MARK = f"root/{rootmark.NAME}"
OLD = "0d" * 16
HALF = b'{"v":1,"root":"0d'
EDGES = (Edge("fsync durable.write_mark", "Move"), Edge("fsync durable.write_mark", "says marked"))


def _mark(recorder: Recorder, known: RootMark) -> None:
    """As a publish begins. A mark that is found is nobody's promise yet: the chain of directories is fsynced after it."""
    root = str(recorder.root / "root")
    request = Publish(root=root, target=f"{root}/p", files=[], manifest={}, mark=known)
    context = Context()
    with rootmark.checked(request, context):
        found = context.root
        os.close(rootmark.make_root(request, context))
    if found is None and context.root is not None:
        recorder.say("marked", context.root.id)


def marked() -> Scenario:
    """Root and mark are new."""

    def run(recorder: Recorder) -> None:
        _mark(recorder, RootMark())

    return Scenario("mark a root", run, check, edges=(*EDGES, Edge("fsync durable.make_root", "says marked")))


def marked_again() -> Scenario:
    """Its user has emptied it; what lies in the mark's place is half a mark."""

    def prepare(root: Path) -> None:
        (root / "root").mkdir()
        (root / MARK).write_bytes(HALF)

    def run(recorder: Recorder) -> None:
        _mark(recorder, RootMark(id=OLD, device=os.stat(recorder.root).st_dev))

    return Scenario("mark a root again", run, check, prepare=prepare, edges=EDGES)


def check(tree: Tree, says: Says) -> str:
    """I1, I2: what was made stays; before that there is none, a whole one, or the half that was there."""
    text = tree.get(MARK)
    if not isinstance(text, bytes) or text == HALF:
        return f"I1: {MARK} is lost" if said(says, "marked") else ""
    try:
        found = json.loads(text)["root"]
    except (ValueError, KeyError, TypeError):
        return "I2: half a mark"
    told = said(says, "marked")
    return "" if not told or found == told[-1] else f"I1: another mark than {told[-1]}"
