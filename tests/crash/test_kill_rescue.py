"""Deaths while the supervisor, at its end, writes what no daemon took over: of the writer, of the supervisor, of both."""

import os
import signal
from pathlib import Path

import pytest

from tests.support import invariants, payload, tally
from tests.support.node import Node, children, eventually, is_alive
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

POINTS = ("rescue.written", "rescue.spooled")
SEED, STEP = 3, 1


@pytest.fixture
def held(node: Node, nursery: Nursery) -> str:
    """A save that its dead trainer was told to be staged, and that only the supervisor of a dead daemon holds."""
    node.timing["restart_s"] = node.timing["restart_s_max"] = 600.0
    node.start()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="rescue", dir=str(node.runs))
    assert trainer.prepare(seed=SEED)["ready"]
    node.arm("ack.accepted")
    saved: str = trainer.save(seed=SEED, step=STEP)["id"]
    node.wait_fired()
    trainer.kill()
    eventually(lambda: node.said("supervisor.daemon_died"), "the daemon to be buried")
    tally.add("kills", 1)
    return saved


def stopped(node: Node, point: str, action: str) -> int:
    """Tell the supervisor to stop, with `point` armed; return its pid once the point is reached."""
    assert node.supervisor is not None
    node.arm(point, action)
    node.signal(signal.SIGTERM)
    node.wait_fired()
    tally.add("kills", 1)
    return node.supervisor.pid


def assert_there_once(node: Node, saved: str) -> None:
    """Verified, also when it had FAILED before its image came, under one name, and nothing else is left of it."""
    eventually(lambda: (node.row(saved) or {}).get("level") == "verified", "the save to be verified")
    (row,) = node.rows("rescue", "run")
    payload.check_saved(Path(row["path"]), SEED)
    node.wait_idle()
    assert list(node.spool.iterdir()) == []
    assert invariants.violations(node, {saved: "verified"}) == []


@pytest.mark.parametrize("point", POINTS)
def test_a_writer_killed_at_any_step_loses_and_doubles_nothing(node: Node, held: str, point: str) -> None:
    """F1, F28: it is started once more, and finds what the first had done."""
    stopped(node, point, "kill")
    assert node.ended() == 0
    node.start()
    assert_there_once(node, held)


@pytest.mark.parametrize("point", POINTS)
def test_a_supervisor_killed_while_it_rescues_has_its_writer_go_on(node: Node, held: str, point: str) -> None:
    """F1, F28: and nothing of it keeps the next supervisor out."""
    stopped(node, point, "kill-parent")
    assert node.ended() == -signal.SIGKILL
    node.start()
    assert_there_once(node, held)


def test_a_supervisor_and_its_writer_killed_over_an_image_leave_no_half_one(node: Node, held: str) -> None:
    """F1, F28, I1: nothing holds the save any more; what is left of it is taken for none, and swept."""
    pid = stopped(node, "rescue.written", "delay:600")
    (writer,) = children(pid)
    assert node.supervisor is not None
    node.supervisor.kill()
    node.supervisor.wait()
    os.kill(writer, signal.SIGKILL)
    eventually(lambda: not is_alive(writer), "the writer's end")
    assert [path.name for path in node.spool.iterdir()] == [f"{held}.arena.tmp-{writer}"]
    node.start()
    eventually(lambda: (node.row(held) or {}).get("state") == "failed", "the loss to be said")
    eventually(lambda: not list(node.spool.iterdir()), "what the writer left to be swept")
    assert not list((node.runs / "rescue").glob("run/step_*"))
    assert invariants.violations(node) == []


def test_an_image_that_arrives_after_the_next_daemon_has_given_it_up_is_its_save_all_the_same(
    node: Node, held: str
) -> None:
    """The writer is slower than the next start: the row has FAILED by then, for its bytes were nowhere."""
    pid = stopped(node, "rescue.written", "delay:600")
    (writer,) = children(pid)
    os.kill(writer, signal.SIGSTOP)
    assert node.supervisor is not None
    node.supervisor.kill()
    node.supervisor.wait()
    node.start()
    eventually(lambda: (node.row(held) or {}).get("state") == "failed", "the loss to be said")
    assert [path.name for path in node.spool.iterdir()] == [f"{held}.arena.tmp-{writer}"], "its writer lives"
    path = node.spool / f"{held}.arena"
    path.with_name(f"{held}.arena.tmp-{writer}").rename(path)  # as the writer does next
    os.kill(writer, signal.SIGKILL)
    assert_there_once(node, held)
