"""Daemon and worker are killed at every step of a repair: it ends with the bytes that were saved, and nothing beside them."""

import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import invariants, payload, rot, tally, victims
from tests.support.node import eventually
from tests.support.onlooker import Onlooker, end, make
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.xdist_group("kill_repairs")]

FILE = "model.safetensors"
SEED = 5
IN_DAEMON = {"repair.aside", "repair.written", "repair.cleared", "verify.recorded"}
IN_WORKER = [
    "retain.trashed",
    "retain.trash_fsynced",
    "copy.chunk",
    "manifest.fsynced",
    "publish.renamed",
    "retain.unlink",
]
POINTS = (*sorted(IN_DAEMON), *IN_WORKER)


@pytest.fixture(scope="module")
def node() -> Iterator[Onlooker]:
    made = make().start()
    yield made
    end(made)


@pytest.fixture
def damaged(node: Onlooker, nursery: Nursery, request: pytest.FixtureRequest) -> Iterator[tuple[Onlooker, str, Path]]:
    """A node, the id of a checkpoint that is damaged on the disk and whole in memory, and where it lies."""
    node.disarm()
    trainer = nursery.trainer(node.environ)
    trainer.open(name=f"e-{zlib.crc32(request.node.name.encode()):08x}", project="repair", dir=str(node.runs))
    assert trainer.prepare(seed=SEED)["ready"]
    one = str(trainer.save(seed=SEED, step=1)["id"])
    row = node.wait_level(one)
    node.wait_idle()
    path = Path(row["path"])
    rot.flip(path / FILE)
    yield node, one, path
    node.disarm()
    node.wait_idle()
    assert invariants.violations(node, grace_s=3600.0) == []  # orphan_age_s: what a dead publish left stays so long
    assert not [name for name in os.listdir(node.runs / ".ckptd-trash") if name.startswith("repair-")]
    tally.add("kills")
    trainer.quit()
    print(node.tail())


@pytest.mark.parametrize(("point", "action"), victims.by_turns(POINTS, IN_DAEMON))
def test_a_repair_killed_at_any_step_goes_on_from_the_memory_that_outlives_it(
    damaged: tuple[Onlooker, str, Path], point: str, action: str
) -> None:
    """The arena is kept over the death of the daemon although its checkpoint is CORRUPT, or MISSING by then."""
    node, one, path = damaged
    inode = path.stat().st_ino
    node.arm(point, action)
    with suppress(ConnectionError, OSError):
        node.ask("verify", selector=one)
    node.wait_fired()

    def good() -> bool:
        row = node.row(one)
        return row is not None and (row["state"], row["level"]) == ("live", "verified") and path.stat().st_ino != inode

    eventually(good, "the repair to be verified")
    node.wait_idle()
    payload.check_saved(path, SEED)
    assert os.readlink(path.parent / "latest") == path.name


@pytest.mark.parametrize("point", ["repair.aside", "repair.written"])
def test_a_checkpoint_removed_while_the_daemon_that_repaired_it_is_dead_leaves_nothing_under_its_name(
    damaged: tuple[Onlooker, str, Path], point: str
) -> None:
    """It is removed, or its remover is told that it was not, and then it is whole."""
    node, one, path = damaged
    node.arm(point)
    with suppress(ConnectionError, OSError):
        node.ask("verify", selector=one)
    node.wait_fired()
    removed = node.run("rm", one, "--yes")
    node.wait_idle()
    row = node.row(one)
    assert row is not None
    if removed.code == 0 and row["state"] == "trashed":
        assert not path.exists()
        assert (node.runs / ".ckptd-trash" / one).is_dir()
    else:
        node.wait_level(one)
        payload.check_saved(path, SEED)
