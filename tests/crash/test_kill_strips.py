"""Daemon and worker are killed at every step of a strip, of its undoing and of a restore; what is kept stays whole."""

import os
import zlib
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support import invariants, payload, tally, victims
from tests.support.node import NotAnswering, eventually
from tests.support.onlooker import Onlooker, end, make
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.xdist_group("kill_strips")]

RULES = """
[[experiments]]
project = "strip"
keep_last = 9
strip_after = 1

[[experiments]]
project = "retire"
keep_last = 1

[[experiments]]
project = "gone"
keep_last = 9
strip_after = 1
trash_grace_s = 0
"""
FULL = """
[retention]
keep_last = 1
drop = "on_pressure"
[disk]
free_bytes_min = "1024P"
look_s = 0.5
"""
NAME = "optimizer.safetensors"
STRIP = ["strip.planned", "strip.noted", "strip.file_moved", "strip.moved", "strip.recorded", "amend.renamed"]
UNDO = ["strip.file_moved", "strip.moved", "strip.recorded", "retain.trashed"]
IN_DAEMON = {"strip.planned", "strip.moved", "strip.recorded", "restore.moved"}
POINTS = (*STRIP, *UNDO, "strip.purging", "restore.moved", "space.alarmed")


@pytest.fixture(scope="module")
def node() -> Iterator[Onlooker]:
    made = make(more=RULES).start()
    yield made
    end(made)


@pytest.fixture
def two(node: Onlooker, nursery: Nursery, request: pytest.FixtureRequest) -> Iterator[tuple[Onlooker, str, str]]:
    """A node, an experiment's name, and the id of its first save; the second one is the caller's to make."""
    node.disarm()
    name = f"e-{zlib.crc32(request.node.name.encode()):08x}"
    trainer = nursery.trainer(node.environ)
    trainer.open(name=name, project="strip", dir=str(node.runs))
    first = str(trainer.save(seed=1, step=1)["id"])
    node.wait_level(first)
    node.wait_idle()
    yield node, name, first
    node.disarm()
    assert invariants.violations(node) == []
    tally.add("kills")
    print(node.tail())


def save_second(node: Onlooker, nursery: Nursery, name: str) -> None:
    trainer = nursery.trainer(node.environ)
    trainer.open(name=name, project="strip", dir=str(node.runs))
    trainer.save(seed=2, step=2)


def stripped(node: Onlooker, checkpoint: str) -> str | None:
    found = node.ask("retention.explain", selector=checkpoint)
    return found["stripped"]["state"] if found.get("stripped") else None


def names(node: Onlooker, name: str) -> set[str]:
    return set(os.listdir(node.runs / "strip" / name / "step_0000000001"))


@pytest.mark.parametrize(("point", "action"), victims.by_turns(STRIP, IN_DAEMON))
def test_a_strip_killed_at_any_step_is_carried_out_by_whoever_comes_next(
    two: tuple[Onlooker, str, str], nursery: Nursery, point: str, action: str
) -> None:
    """I1, I2: whole but for what is named, and that is whole in the trash."""
    node, name, first = two
    node.arm(point, action)
    save_second(node, nursery, name)
    node.wait_fired()
    eventually(lambda: stripped(node, first) == "stripped", "the first to be stripped")
    assert NAME not in names(node, name)
    binned = node.runs / ".ckptd-trash" / f"{first}.stripped" / NAME
    assert binned.stat().st_size > 0
    assert node.ask("verify", selector=first)["results"][0]["ok"]


@pytest.mark.parametrize("point", UNDO)
def test_an_undoing_killed_at_any_step_brings_everything_back(
    two: tuple[Onlooker, str, str], nursery: Nursery, point: str
) -> None:
    node, name, first = two
    save_second(node, nursery, name)
    eventually(lambda: stripped(node, first) == "stripped", "the first to be stripped")
    node.wait_idle()
    node.arm(point)
    with suppress(ConnectionError, OSError):
        node.ask("restore", selector=first)
    node.wait_fired()
    eventually(lambda: stripped(node, first) is None, "everything to be back")
    payload.check_saved(node.runs / "strip" / name / "step_0000000001", 1)
    assert "stripped.json" not in names(node, name)


def test_a_restore_killed_after_its_rename_leaves_a_whole_checkpoint_in_one_of_two_places(
    node: Onlooker, nursery: Nursery
) -> None:
    node.disarm()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="restored", project="retire", dir=str(node.runs))
    first = str(trainer.save(seed=1, step=1)["id"])
    node.wait_level(first)
    trainer.save(seed=2, step=2)
    node.wait_state(first, "trashed")
    node.wait_idle()
    node.arm("restore.moved")
    with suppress(ConnectionError, OSError):
        node.ask("restore", selector=first)
    node.wait_fired()
    binned = node.runs / ".ckptd-trash" / first
    eventually(
        lambda: binned.exists() or (node.row(first) or {}).get("state") == "live",
        "the next daemon to carry the tombstone out, or to be asked again",
    )
    if binned.exists():
        payload.check_saved(binned, 1)
        assert node.ask("restore", selector=first)["ok"]
    payload.check_saved(node.runs / "retire/restored/step_0000000001", 1)
    assert invariants.violations(node) == []
    tally.add("kills")


def test_a_restore_killed_after_its_rename_leaves_nothing_that_a_purge_forgets(nursery: Nursery) -> None:
    """The next daemon has no grace left to wait for: it begins with the purge, and the trash is empty."""
    node = make(more="[retention]\nkeep_last = 1\n")
    try:
        node.start()
        trainer = nursery.trainer(node.environ)
        trainer.open(name="purged", project="purged", dir=str(node.runs))
        ids = [str(trainer.save(seed=step, step=step)["id"]) for step in (1, 2)]
        node.wait_level(ids[1])
        binned = node.runs / ".ckptd-trash" / ids[0]
        eventually(binned.exists, "the tombstone to be carried out")
        node.wait_idle()
        node.configure("[retention]\nkeep_last = 1\ntrash_grace_s = 0\n")
        node.arm("restore.moved")
        with suppress(NotAnswering):
            node.ask_once("restore", selector=ids[0])  # once: nobody asks the next daemon again
        node.wait_fired()
        node.wait_state(ids[0], "dropped")
        assert not binned.exists()
        assert not (node.runs / "purged/purged/step_0000000001").exists()
        payload.check_saved(node.runs / "purged/purged/step_0000000002", 2)
        assert invariants.violations(node) == []
        tally.add("kills")
    finally:
        end(node)


def test_a_daemon_killed_while_it_unlinks_what_was_stripped_ends_it(node: Onlooker, nursery: Nursery) -> None:
    node.disarm()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="gone", project="gone", dir=str(node.runs))
    first = str(trainer.save(seed=1, step=1)["id"])
    node.wait_level(first)
    trainer.save(seed=2, step=2)
    eventually(lambda: stripped(node, first) in {"stripped", "purging", "gone"}, "the first to be stripped")
    node.arm("strip.purging")
    node.kill_daemon()
    if stripped(node, first) != "gone":
        node.wait_fired()
        tally.add("kills")
    eventually(lambda: stripped(node, first) == "gone", "the trash to be emptied")
    assert not (node.runs / ".ckptd-trash" / f"{first}.stripped").exists()
    assert node.ask("verify", selector=first)["results"][0]["ok"]
    node.disarm()
    assert invariants.violations(node) == []


def test_a_daemon_killed_after_its_alarm_makes_room_when_it_is_back_and_the_newest_stays(nursery: Nursery) -> None:
    """M101: no disk has as much room as is asked for here."""
    node = make(more=FULL)
    try:
        node.start()
        node.arm("space.alarmed")
        trainer = nursery.trainer(node.environ)
        trainer.open(name="full", project="full", dir=str(node.runs))
        ids = [str(trainer.save(seed=step, step=step)["id"]) for step in (1, 2)]
        node.wait_fired()
        node.wait_state(ids[0], "dropped")
        node.wait_level(ids[1])
        payload.check_saved(node.runs / "full/full/step_0000000002", 2)
        assert invariants.violations(node) == []
        tally.add("kills")
    finally:
        end(node)
