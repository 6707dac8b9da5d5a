"""A state of the model laid out as real files, and the real code asked again in it."""

import os
from pathlib import Path
from typing import Any

from ckptd.worker import scan
from ckptd.worker.context import Context
from ckptd.worker.durable import TEMPORARY
from ckptd.worker.protocol import Scan
from tests.model.disk import Profile
from tests.model.explore import How, Says, Symlink, Tree, explore
from tests.model.recorder import Recorder
from tests.model.scenario import Scenario, place


def shape(tree: Tree, whole: frozenset[bytes]) -> tuple[tuple[str, str], ...]:
    """What makes one state behave unlike another: which names there are, and how each file is broken."""
    return tuple((path, _kind(found, whole)) for path, found in tree.items())


def _kind(found: bytes | Symlink | None, whole: frozenset[bytes]) -> str:
    if found is None:
        return "directory"
    if isinstance(found, Symlink):
        return f"leads to {found}"
    if not found:
        return "empty"
    if not found.strip(b"\0"):
        return "zeros"
    return "whole" if found in whole else "torn"


def lay_out(tree: Tree, root: Path) -> None:
    """Make these files."""
    for path, found in sorted(tree.items()):
        if found is None:
            (root / path).mkdir()
        elif isinstance(found, Symlink):
            (root / path).symlink_to(str(found))
        else:
            (root / path).write_bytes(found)


def recovers(scenario: Scenario, tree: Tree, says: Says) -> None:
    """Ask again after a cut under these promises, and cut the power at every instant of that as well."""
    with place() as root:
        lay_out(tree, root)
        recorder = Recorder(root, randoms=1000)
        recorder.next_life()
        recorder.ops += says
        with recorder.recording():
            (scenario.again or scenario.run)(recorder)
        found = explore(recorder.log(cuts_from=len(says)), How(Profile.WEAKEST), scenario.check)
        assert not found.violations, (tree, found.violations[0])
        left = [name for _, names, files in os.walk(root) for name in (*names, *files) if TEMPORARY in name]
        assert not (scenario.clean and left), (tree, left)


def rebuilt(tree: Tree) -> list[str]:
    """Which checkpoints a rebuild of the catalog would find after this cut, as paths below the root."""
    found: list[str] = []

    def send(frame: dict[str, Any]) -> None:
        if "part" in frame:
            found.extend(one.path for one in frame["part"].found if one.manifest is not None)

    with place() as root:
        lay_out(tree, root)
        if (root / "root").is_dir():
            scan.run(Scan(root=str(root / "root"), managed=True), Context(send=send))
        return [os.path.relpath(path, root) for path in found]
