"""The daemon is killed while a person gives up a save that can't be written: it does not come back, and nothing holds memory for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import invariants, tally
from tests.support.node import Node, NotAnswering, arenas_of, eventually
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

POINTS = ("giveup.recorded", "catalog.commit")
PROJECT = "lost"


@pytest.fixture
def parked(node: Node, nursery: Nursery) -> str:
    """A save whose project's name is somebody's file."""
    node.drain_s = 0.5  # a stop has nothing to wait for
    node.reconcile_s = 3600.0  # else a scan may take the commit that is waited for
    node.start()
    node.runs.mkdir(parents=True, exist_ok=True)
    (node.runs / PROJECT).write_text("not a directory")
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project=PROJECT, dir=str(node.runs))
    saved: str = trainer.save(seed=1, step=1)["id"]
    eventually(lambda: node.status()["jobs"]["parked"] == 1, "the save to be parked")
    trainer.quit()
    return saved


def give_up(node: Node, saved: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("ckpt")
    command = [str(program), "--socket", str(node.socket), "rm", "--give-up", "--yes", saved]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def assert_gone(node: Node, saved: str) -> None:
    """It has failed, visibly; there is neither memory nor an image of it, and the way being free changes nothing."""
    row = eventually(lambda: node.row(saved), "its row")
    assert (row["state"], row["error"]["code"]) == ("failed", "given_up")
    (node.runs / PROJECT).unlink()
    status = node.wait_idle()
    assert (status["jobs"]["parked"], status["arenas"]["committed"]) == (0, 0)
    eventually(lambda: not list(node.spool.iterdir()), "the spool to be empty")
    eventually(
        lambda: len(arenas_of(node.daemon_pid)) == node.status()["arenas"]["count"], "no arena beside those told"
    )
    assert node.row(saved) == row
    assert not (node.runs / PROJECT).exists()
    assert invariants.violations(node) == []


@pytest.mark.parametrize("in_spool", [False, True])
def test_a_daemon_killed_once_it_is_written_down_leaves_the_bytes_to_the_next_which_lets_them_go(
    node: Node, parked: str, *, in_spool: bool
) -> None:
    """F1, F28. Its trainer is gone: the bytes are the service manager's, or lie in the spool."""
    if in_spool:
        assert node.stop() == 0
        assert [path.name for path in node.spool.iterdir()] == [f"{parked}.arena"]
        node.start()
        eventually(lambda: node.status()["jobs"]["parked"] == 1, "the save to be parked again")
    node.arm("giveup.recorded")
    assert give_up(node, parked).returncode != 0
    node.wait_fired()
    tally.add("kills")
    assert_gone(node, parked)


def test_a_daemon_killed_before_it_is_written_down_has_given_up_nothing(node: Node, parked: str) -> None:
    """F1: whoever asked is told that nobody answered, and asks once more."""
    node.arm("catalog.commit")
    with pytest.raises(NotAnswering):
        node.ask_once("remove", selector=parked, give_up=True)
    node.wait_fired()
    tally.add("kills")
    assert eventually(lambda: node.row(parked), "its row")["state"] == "pending"
    eventually(lambda: node.status()["jobs"]["parked"] == 1, "it to be parked still")
    done = give_up(node, parked)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"give up {PROJECT}/run" in done.stderr.replace("\n", " ")
    assert_gone(node, parked)
