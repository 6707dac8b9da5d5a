"""Links beside checkpoints: made, led elsewhere, left as they are, removed."""

from dataclasses import replace
from pathlib import Path

from ckptd.worker import link
from ckptd.worker.context import Context
from ckptd.worker.protocol import Link
from tests.model import publishing
from tests.model.explore import Says, Tree
from tests.model.invariants import damage, target_of
from tests.model.publishing import FIRST, RUN, SECOND, SMALL
from tests.model.recorder import Recorder
from tests.model.scenario import Edge, Scenario

LATEST = f"{RUN}/latest"
_MADE = Edge("fsync durable.replace_symlink", "says linked")
_GONE = Edge("fsync durable.remove_symlink", "says linked")


def _prepare(root: Path) -> None:
    for target in (FIRST, SECOND):
        publishing.publish_at(root, target, SMALL)


def _lead(recorder: Recorder, target: str) -> None:
    name = target.rpartition("/")[2]
    recorder.say("linking", name)
    link.run(Link(root=str(recorder.root / "root"), name=str(recorder.root / LATEST), target=name), Context())
    recorder.say("linked", name)


def _prepare_linked(root: Path) -> None:
    _prepare(root)
    (root / LATEST).symlink_to("step_0000000001")


def made() -> Scenario:
    """There was none."""
    return Scenario("make a link", lambda r: _lead(r, FIRST), check, prepare=_prepare, edges=(_MADE,))


def replaced() -> Scenario:
    """It led to the first; the second is durable now."""

    def run(recorder: Recorder) -> None:
        if not recorder.ops:
            recorder.say("linked", "step_0000000001")
        _lead(recorder, SECOND)

    return Scenario("replace a link", run, check, prepare=_prepare_linked, edges=(_MADE,))


def replaced_by_hand() -> Scenario:
    """The same without renameat2's flags: rename does for an exchange."""
    plain = replaced()

    def run(recorder: Recorder) -> None:
        with publishing.without_flags():
            plain.run(recorder)

    return replace(plain, name="replace a link without renameat2", run=run)


def removed() -> Scenario:
    """No checkpoint is good enough any more."""

    def run(recorder: Recorder) -> None:
        if not recorder.ops:
            recorder.say("linked", "step_0000000001")
        _lead(recorder, "")

    return Scenario("remove a link", run, check, prepare=_prepare_linked, edges=(_GONE,))


def check(tree: Tree, says: Says) -> str:
    """The link leads where it was said to lead, or, while it is changed, to the old or the new; never to nothing."""
    found = target_of(tree, LATEST) or ""
    done = [say.fact for say in says if say.what == "linked"]
    if not says:
        return ""
    allowed = {done[-1] if done else ""}
    if says[-1].what == "linking":
        allowed.add(says[-1].fact)
    if found not in allowed:
        return f"I3: latest leads to {found!r}, not to one of {sorted(allowed)}"
    if LATEST in tree and not found:
        return "I3: latest is no symlink"
    return damage(tree, f"{RUN}/{found}") if found else ""
