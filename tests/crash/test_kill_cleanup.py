"""Daemon and worker are killed while damaged checkpoints are cleaned up, and while one is restored: none is lost, none is whole."""

import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import invariants, rot, tally, victims
from tests.support.node import eventually
from tests.support.onlooker import Onlooker, end, make
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.xdist_group("kill_cleanup")]

FILE = "model.safetensors"
IN_DAEMON = {"retain.tombstone", "retain.moved", "restore.moved"}
POINTS = ("retain.tombstone", "retain.trashed", "retain.trash_fsynced", "retain.moved", "restore.moved")


@pytest.fixture(scope="module")
def node() -> Iterator[Onlooker]:
    made = make().start()
    yield made
    end(made)


@pytest.fixture
def damaged(node: Onlooker, nursery: Nursery, request: pytest.FixtureRequest) -> Iterator[tuple[Onlooker, str, Path]]:
    """A node, the id of a damaged checkpoint beside a whole one, and where it lies; no memory holds a copy of it."""
    node.disarm()
    trainer = nursery.trainer(node.environ)
    trainer.open(name=f"e-{zlib.crc32(request.node.name.encode()):08x}", project="clean", dir=str(node.runs))
    ids = [str(trainer.save(seed=step, step=step)["id"]) for step in (1, 2)]
    for one in ids:
        node.wait_level(one)
    trainer.quit()
    node.stop()
    node.start()
    row = node.row(ids[0])
    assert row is not None
    path = Path(row["path"])
    rot.flip(path / FILE)
    assert node.ask("verify", selector=ids[0])["results"][0]["state"] == "corrupt"
    yield node, ids[0], path
    node.disarm()
    assert invariants.violations(node) == []
    tally.add("kills")
    print(node.tail())


def clean_up(node: Onlooker) -> None:
    """Ask until a daemon is there; whatever was cut short is gone on with."""
    eventually(lambda: node.run("cleanup", "clean", "--younger-than", "0s", "--confirm").code == 0, "a clean-up to end")


@pytest.mark.parametrize(("point", "action"), victims.by_turns(POINTS[:-1], IN_DAEMON))
def test_a_clean_up_killed_at_any_step_ends_with_the_damaged_bytes_in_the_trash(
    damaged: tuple[Onlooker, str, Path], point: str, action: str
) -> None:
    """M082: they are under their name or in the trash, never in neither, and come back as they went."""
    node, one, path = damaged
    body = (path / FILE).read_bytes()
    binned = node.runs / ".ckptd-trash" / one
    node.arm(point, action)
    node.run("cleanup", "clean", "--younger-than", "0s", "--confirm")
    node.wait_fired()
    eventually(lambda: path.exists() != binned.exists(), "it to be in one place of the two")
    clean_up(node)
    eventually(binned.exists, "the tombstone to be carried out")
    assert not path.exists()
    assert (binned / FILE).read_bytes() == body
    assert node.run("restore", one).code == 0
    node.wait_state(one, "corrupt")
    assert (path / FILE).read_bytes() == body


def test_a_restore_of_damaged_bytes_killed_after_its_rename_makes_nothing_whole(
    damaged: tuple[Onlooker, str, Path],
) -> None:
    """M082: in the trash or damaged under its name; verified at no time."""
    node, one, path = damaged
    body = (path / FILE).read_bytes()
    clean_up(node)
    node.wait_state(one, "trashed")
    node.arm("restore.moved")
    with suppress(ConnectionError, OSError):
        node.ask("restore", selector=one)
    node.wait_fired()
    binned = node.runs / ".ckptd-trash" / one
    eventually(
        lambda: binned.exists() or (node.row(one) or {}).get("state") == "corrupt",
        "the next daemon to carry the tombstone out, or to be asked again",
    )
    if binned.exists():
        assert node.run("restore", one).code == 0
    node.wait_state(one, "corrupt")
    assert (path / FILE).read_bytes() == body
