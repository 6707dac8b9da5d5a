"""The supervisor ends while it alone holds a save: each lies in the spool then, and the next daemon has it once."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.support import invariants, payload
from tests.support.node import Node, children, eventually, is_alive
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

PAUSE = {"restart_s": 600.0, "restart_s_max": 600.0}
TYPO = '[arenas.typo]\nbytes_max = "lots of'
SEED, STEP = 7, 1


def orphaned(node: Node, nursery: Nursery, point: str = "ack.accepted", *, more: str = "") -> str:
    """Save once; its trainer was told that it is staged, the daemon died at `point`, and then the trainer did.

    `more` is what somebody adds to the configuration meanwhile.
    """
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="ends", dir=str(node.runs))
    assert trainer.prepare(seed=SEED)["ready"]
    node.configure(more)
    node.arm(point)
    saved: str = trainer.save(seed=SEED, step=STEP)["id"]
    node.wait_fired()
    trainer.kill()
    node.more = ""
    return saved


def spooled(node: Node) -> list[str]:
    return sorted(path.name for path in node.spool.iterdir())


def assert_arrives_once(node: Node, saved: str) -> None:
    """The next daemon has it, whole, under one name and in one row, and nothing is left over."""
    node.start()
    row = node.wait_level(saved)
    payload.check_saved(Path(row["path"]), SEED)
    assert [each["checkpoint"] for each in node.rows("ends", "run")] == [saved]
    assert [path.name for path in (node.runs / "ends" / "run").glob("step_*")] == ["step_0000000001"]
    node.wait_idle()
    assert spooled(node) == []
    assert invariants.violations(node, {saved: "verified"}) == []


@pytest.fixture
def hold(node: Node, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that stops each daemon to come before it can take over what is stored."""
    path = node.dir / "hold"
    monkeypatch.setenv("NODE_HOLD", str(path))
    return path


def held_up(node: Node) -> int:
    """Wait for the next daemon, which `hold` stops; return its pid."""

    def stopped() -> int | None:
        assert node.supervisor is not None
        for pid in children(node.supervisor.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    return pid
        return None

    found: int = eventually(stopped, "the next daemon to stand still")
    return found


def paused(node: Node) -> None:
    """The daemon is dead and the next one far away."""
    eventually(lambda: node.said("supervisor.daemon_died"), "the daemon to be buried")


def test_a_save_of_a_dead_daemon_outlives_a_stop_in_the_pause_before_the_next(node: Node, nursery: Nursery) -> None:
    node.timing |= PAUSE
    saved = orphaned(node.start(), nursery)
    paused(node)
    assert node.stop() == 0
    assert spooled(node) == [f"{saved}.arena"]
    assert [said["checkpoint"] for said in node.said("supervisor.save_spooled")] == [saved]
    assert_arrives_once(node, saved)


def test_a_save_outlives_a_configuration_that_no_daemon_takes(node: Node, nursery: Nursery) -> None:
    """78 is final: the daemon that would have taken it over has not even looked at its descriptors."""
    node.timing["restart_s"] = 1.0
    saved = orphaned(node.start(), nursery, more=TYPO)
    assert node.ended() == 78
    assert spooled(node) == [f"{saved}.arena"]
    assert_arrives_once(node, saved)


def test_a_save_outlives_a_stop_that_finds_the_next_daemon_deaf(node: Node, nursery: Nursery, hold: Path) -> None:
    """It has the memory and no handler yet: it dies of the signal."""
    node.start()
    hold.touch()
    saved = orphaned(node, nursery)
    pid = held_up(node)
    hold.unlink()
    node.signal(signal.SIGTERM)
    eventually(lambda: node.said("supervisor.stopping"), "the signal to be passed on")
    os.kill(pid, signal.SIGCONT)
    assert node.ended() == 128 + signal.SIGTERM
    assert spooled(node) == [f"{saved}.arena"]
    assert_arrives_once(node, saved)


@pytest.mark.parametrize(("signals", "timing"), [(1, {"stop_s": 0.3}), (2, {"stop_s": 600, "hurry_s": 0.3})])
def test_a_save_outlives_a_daemon_that_hangs_over_it_and_is_killed(
    node: Node, nursery: Nursery, hold: Path, signals: int, timing: dict[str, float]
) -> None:
    """F28: at the deadline of a stop, or of a second SIGTERM. A stopped process hears neither."""
    node.timing |= timing
    node.start()
    hold.touch()
    saved = orphaned(node, nursery)
    held_up(node)
    hold.unlink()
    for times in range(1, signals + 1):
        node.signal(signal.SIGTERM)
        eventually(lambda n=times: len(node.said("supervisor.stopping")) == n, "the signal to be heard")
    assert node.ended() == 128 + signal.SIGKILL
    assert spooled(node) == [f"{saved}.arena"]
    assert_arrives_once(node, saved)


def test_a_save_outlives_a_daemon_that_was_to_be_run_once(node: Node, nursery: Nursery) -> None:
    saved = orphaned(node.start("--once"), nursery)
    assert node.ended() == 128 + signal.SIGKILL
    assert spooled(node) == [f"{saved}.arena"]
    assert_arrives_once(node, saved)


def test_a_save_that_was_published_already_is_taken_in_as_the_same_one(node: Node, nursery: Nursery) -> None:
    """Its daemon died between the row and the arena's word: only the catalog knows, and it is asked by id."""
    node.timing |= PAUSE
    saved = orphaned(node.start(), nursery, "ack.durable")
    paused(node)
    assert node.stop() == 0
    assert spooled(node) == [f"{saved}.arena"]
    assert_arrives_once(node, saved)
    assert len(node.events("checkpoint.published")) == 1


def test_a_save_that_its_daemon_spilled_before_it_died_is_not_written_again(node: Node, nursery: Nursery) -> None:
    node.drain_s, node.request_s = 0.05, 60.0
    node.start()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="ends", dir=str(node.runs))
    assert trainer.prepare(seed=SEED)["ready"]
    node.arm("dir.fsynced=delay:60,stop.spilled")
    saved = trainer.save(seed=SEED, step=STEP)["id"]
    eventually(lambda: "dir.fsynced" not in node.plan.read_text(), "the publish to be held up")
    node.stop()
    assert node.fired()
    trainer.kill()
    assert spooled(node) == [f"{saved}.arena"]
    assert node.said("supervisor.save_spooled") == []
    assert_arrives_once(node, saved)


def test_what_is_only_a_copy_of_a_published_save_is_let_go(node: Node, nursery: Nursery) -> None:
    node.timing |= PAUSE
    node.start()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="ends", dir=str(node.runs))
    saved = trainer.save(seed=SEED, step=STEP)["id"]
    node.wait_level(saved)
    node.wait_idle()
    trainer.kill()
    node.kill_daemon()
    paused(node)
    assert node.stop() == 0
    assert spooled(node) == []


def without_spool(node: Node) -> None:
    """Something else lies where the spool was: nothing can be written there."""
    node.spool.rmdir()
    node.spool.write_text("in the way")


def test_a_save_that_can_not_be_brought_to_safety_is_said_and_the_end_is_no_success(
    node: Node, nursery: Nursery
) -> None:
    node.timing |= PAUSE
    saved = orphaned(node.start(), nursery)
    paused(node)
    without_spool(node)
    assert node.stop() == 1
    (said,) = node.said("supervisor.save_not_spooled")
    assert (said["checkpoint"], said["level"]) == (saved, "critical")
    assert str(node.spool) in said["error"] + said["do"]


def test_while_a_save_can_not_be_brought_to_safety_a_bad_configuration_ends_nothing(
    node: Node, nursery: Nursery, hold: Path
) -> None:
    """Nobody asked for the end: the memory is kept until a person has put one thing or the other right."""
    node.timing |= {"restart_s": 1.0, "restart_s_max": 1.0}
    node.start()
    hold.touch()
    saved = orphaned(node, nursery, more=TYPO)
    pid = held_up(node)
    without_spool(node)
    hold.unlink()
    os.kill(pid, signal.SIGCONT)
    said = eventually(lambda: node.said("supervisor.holds_on"), "it to hold on")
    assert said[0]["saves"] == 1
    eventually(lambda: len(node.said("supervisor.holds_on")) > 1, "the next try")
    assert node.supervisor is not None
    assert is_alive(node.supervisor.pid)
    node.spool.unlink()
    assert node.ended() == 78
    assert spooled(node) == [f"{saved}.arena"]
    assert_arrives_once(node, saved)
