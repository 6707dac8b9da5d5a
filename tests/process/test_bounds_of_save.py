"""Training never pays: save() returns within its bound whatever became of the daemon, and what it took arrives later.

The bounds are the client's own constants; SLACK_S is for a loaded machine, and one that stands still for up to
STALL_S may make LATE of the calls late. A trainer whose save() raised
fails its test (run_trainer tells of exceptions, and `error` is looked at).
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd_client.connection import HANG_S, PING_AFTER_S
from ckptd_client.session import OPEN_S
from tests.support import payload
from tests.support.disk import fill, tmpfs
from tests.support.node import Node, eventually, is_alive
from tests.support.signals import kill
from tests.support.trainer import Nursery, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROJECT = "bounds"
SLACK_S = 1.0
STALL_S, LATE = 10.0, 0.1  # together far below the half minute of a save that waits for its overlap
QUICK_S = 2.0  # far below any wait; a memcpy of 100 kB, and at most the spool's write of the save before
NOTICED_S = PING_AFTER_S + HANG_S + SLACK_S  # until a daemon that says nothing counts as absent


class Saves:
    """What one trainer saved, how long each call took, and what each must become."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.seeds: dict[str, int] = {}
        self.took_s: list[float] = []
        self._late = 0
        self.errors: dict[str, str] = {}

    def save(self, limit_s: float, **given: Any) -> dict[str, Any]:
        """Save once more; the call must return within `limit_s`, but for a few of many."""
        seed = len(self.took_s) + 1
        answer: dict[str, Any] = self._trainer.save(seed=seed, step=seed, scribble=True, **given)
        self.took_s.append(answer["took_s"])
        self._late += answer["took_s"] >= limit_s
        assert answer["took_s"] < limit_s + STALL_S, f"save {seed} took {answer['took_s']:.3f} s"
        assert self._late <= 1 + LATE * seed, f"too many of them were late: {self.took_s}"
        if answer["error"] is None:
            self.seeds[answer["id"]] = seed
        else:
            self.errors[answer["id"]] = answer["error"]["code"]
        return answer

    def report(self, what: str) -> None:
        """Print the distribution."""
        ordered = sorted(self.took_s)
        middle = ordered[len(ordered) // 2]
        print(
            f"save() with the daemon {what}: {len(ordered)} calls, median {middle * 1e3:.2f} ms, longest {ordered[-1] * 1e3:.1f} ms"
        )

    def assert_arrived(self, node: Node, name: str) -> None:
        """Everything that save() took is there once, with its own bytes; nothing else is."""
        for checkpoint in self.seeds:
            node.wait_level(checkpoint)
        rows = node.rows(PROJECT, name)
        assert sorted(row["checkpoint"] for row in rows) == sorted(self.seeds)
        for row in rows:
            assert row["step"] == self.seeds[row["checkpoint"]]
            payload.check_saved(Path(row["path"]), row["step"])
        node.wait_idle()
        assert not list(node.spool.iterdir())


def opened(node: Node, nursery: Nursery, name: str, *, ready: bool = True, **given: Any) -> Trainer:
    trainer = nursery.trainer({**node.environ, "TRAINER_OPEN_S": str(OPEN_S)})
    trainer.open(name=name, project=PROJECT, dir=str(node.runs), **given)
    if ready:
        assert trainer.prepare(seed=1)["ready"]
    return trainer


def test_with_no_daemon_at_all(node: Node, nursery: Nursery) -> None:
    """I6. Nobody ever listened: memory of its own, the spool, and the first daemon that comes takes all of it."""
    trainer = opened(node, nursery, "absent", ready=False)
    saves = Saves(trainer)
    for _ in range(40):
        saves.save(QUICK_S)
    saves.report("absent")
    assert trainer.flush()["safe"]
    assert trainer.stats()["spooled"] == 40
    node.start()
    saves.assert_arrived(node, "absent")


def test_with_the_daemon_killed_and_not_replaced(node: Node, nursery: Nursery) -> None:
    """I6. What was committed in its memory goes into the spool from there; the rest goes straight."""
    node.start()
    trainer = opened(node, nursery, "killed")
    saves = Saves(trainer)
    saves.save(QUICK_S)
    assert node.supervisor is not None
    pids = [node.supervisor.pid, *node.family()]
    kill(pids)
    node.supervisor.wait()
    for _ in range(40):
        saves.save(QUICK_S)
    saves.report("killed")
    eventually(lambda: not any(is_alive(pid) for pid in pids), "everything's end")
    assert trainer.flush()["safe"]
    node.start()
    saves.assert_arrived(node, "killed")


def test_with_the_daemon_stopped(node: Node, nursery: Nursery) -> None:
    """I6, F22. Its socket takes connections and nobody answers: noticed once, then as if it were absent."""
    node.timing["watchdog_s"] = 600.0  # it is stopped for longer than a supervisor bears on a slow machine
    node.start()
    trainer = opened(node, nursery, "stopped")
    saves = Saves(trainer)
    pid = node.daemon_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        saves.save(QUICK_S)
        saves.save(QUICK_S)
        saves.save(NOTICED_S)
        for _ in range(40):
            saves.save(QUICK_S)
        newcomer = opened(node, nursery, "newcomer", ready=False)
        first = Saves(newcomer)
        first.save(OPEN_S + SLACK_S)
        for _ in range(5):
            first.save(QUICK_S)
    finally:
        os.kill(pid, signal.SIGCONT)
    saves.report("stopped")
    for each in (trainer, newcomer):
        assert each.flush()["safe"]
    saves.assert_arrived(node, "stopped")
    first.assert_arrived(node, "newcomer")
    assert node.daemon_pid == pid


def test_with_a_daemon_that_dies_at_every_hand_off(node: Node, nursery: Nursery) -> None:
    """I6. A crash loop costs training nothing, and each save arrives once."""
    node.start()
    trainer = opened(node, nursery, "crashing")
    saves = Saves(trainer)
    for _ in range(8):
        node.arm("job.committed")
        saves.save(NOTICED_S)
        eventually(lambda: trainer.stats()["connected"] or node.fired(), "the next daemon")
    node.disarm()
    saves.report("crashing")
    assert trainer.flush()["safe"]
    saves.assert_arrived(node, "crashing")


@pytest.fixture
def small_disk(short_dir: Path) -> Iterator[Path]:
    """A file system of 24 MiB of its own; skips where nothing can be mounted."""
    with tmpfs(short_dir / "small", "24m") as place:
        yield place


def test_with_the_disk_of_the_checkpoints_full(node: Node, nursery: Nursery, small_disk: Path) -> None:
    """I6, F6. Publishing waits for space; arenas run out after two, the spool takes the rest; space brings all of it."""
    node.start()
    node.runs.symlink_to(small_disk)
    trainer = nursery.trainer(node.environ)
    trainer.open(name="full", project=PROJECT, dir=str(small_disk), overlap_wait_s=1.0)
    assert trainer.prepare(seed=1)["ready"]
    filler = fill(small_disk)
    saves = Saves(trainer)
    for _ in range(5):
        saves.save(1.0 + SLACK_S)
    saves.report("'s disk full")
    assert not saves.errors
    assert trainer.flush()["safe"]
    eventually(lambda: node.said("stage.failed"), "the failure to be told")
    assert all(said["code"] == "no_space" for said in node.said("stage.failed"))
    filler.unlink()
    saves.assert_arrived(node, "full")


def test_with_every_disk_full(node: Node, nursery: Nursery, small_disk: Path) -> None:
    """I6, F6. Catalog, spool and checkpoints on one full disk: nothing is raised, nothing is promised that does not come.

    A save that nobody could take says so on its handle; all others arrive when there is room.
    """
    (small_disk / "s").mkdir(mode=0o700)
    node.state.symlink_to(small_disk / "s")
    node.start()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="none", project=PROJECT, dir=str(small_disk / "runs"), overlap_wait_s=1.0)
    assert trainer.prepare(seed=1)["ready"]
    saves = Saves(trainer)
    saves.save(QUICK_S)
    node.wait_level(next(iter(saves.seeds)))
    assert trainer.prepare(seed=1)["ready"]
    filler = fill(small_disk)
    for _ in range(5):
        saves.save(1.0 + SLACK_S)
    saves.report("'s every disk full")
    trainer.flush(timeout_s=5.0)
    told = {checkpoint: trainer.handle(id=checkpoint) for checkpoint in saves.seeds}
    filler.unlink()
    refused = {checkpoint for checkpoint, handle in told.items() if handle["state"] == "failed"}
    assert all(told[checkpoint]["error"]["code"] == "no_space" for checkpoint in refused)
    assert len(refused) < len(told)
    for checkpoint in refused:
        del saves.seeds[checkpoint]
    saves.assert_arrived(node, "none")
    later = saves.save(1.0 + SLACK_S)
    assert later["error"] is None
    saves.assert_arrived(node, "none")
