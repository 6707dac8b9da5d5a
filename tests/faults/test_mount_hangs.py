"""A mount whose server is gone: it hangs its own worker, and nothing else (promise 9)."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import Node, eventually
from tests.support.sleepy_disk import SleepyDisk, sleepy_disk
from tests.support.trainer import Nursery, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
PROJECT = "hang"
QUICK_S = 5.0  # what hangs here hangs until it is woken; a machine that does much else stands still for a second
STUCK_MAX = 2
PATIENCE_S = 60.0  # the same
STOP_S = 15.0  # the drain, three graces of 2 s for a worker that can't die, and this machine's other work


@pytest.fixture
def disk(node: Node, short_dir: Path) -> Iterator[SleepyDisk]:
    home = short_dir / "fuse"
    home.mkdir()
    with sleepy_disk(home) as made:
        yield made
        made.wake()
        node.clean_up()


def opened(node: Node, nursery: Nursery, name: str, directory: Path) -> Trainer:
    trainer = nursery.trainer(node.environ)
    trainer.open(name=name, project=PROJECT, dir=str(directory), overlap_wait_s=0.2)
    return trainer


def mount_of(node: Node, disk: SleepyDisk) -> dict[str, Any]:
    """What status says of the mount."""
    (found,) = [worker for worker in node.status()["workers"] if worker["mount"] == str(disk.path)]
    return found


@pytest.mark.parametrize("operation", ["getattr", pytest.param("flush", marks=pytest.mark.faults)])
def test_a_hung_mount_hangs_nothing_else(node: Node, plain_nursery: Nursery, disk: SleepyDisk, operation: str) -> None:
    """F17. Saves elsewhere are verified meanwhile; those to the mount are held, wait for nothing, and arrive when it is back."""
    node.drain_s = 2.0
    node.start()
    good = opened(node, plain_nursery, "good", node.runs)
    hung = opened(node, plain_nursery, "hung", disk.path / "runs")
    node.wait_level(hung.save(seed=0, step=0)["id"])
    disk.hang(operation)
    waiting = {}
    for step in (1, 2):
        answer = hung.save(seed=step, step=step)
        assert answer["error"] is None
        assert answer["took_s"] < QUICK_S
        waiting[answer["id"]] = step
    eventually(lambda: mount_of(node, disk)["state"] == "stuck", "the mount to be given up")
    begun_s = time.monotonic()
    for step in range(1, 4):
        node.wait_level(good.save(seed=step, step=step)["id"], patience_s=PATIENCE_S)
    assert time.monotonic() - begun_s < PATIENCE_S
    assert mount_of(node, disk)["stuck"] <= STUCK_MAX
    assert any(str(disk.path) in d["what"] for d in node.status()["daemon"]["degraded"])
    assert [node.row(checkpoint)["level"] for checkpoint in waiting] == ["staged"] * 2  # type: ignore[index]
    disk.wake()
    for checkpoint in waiting:
        node.wait_level(checkpoint, patience_s=60.0)
    eventually(lambda: mount_of(node, disk)["state"] == "ok", "the mount to be trusted again")


@pytest.mark.faults
def test_a_node_stops_in_time_although_a_mount_hangs(node: Node, plain_nursery: Nursery, disk: SleepyDisk) -> None:
    """F17, I12. What could not be published lies in the spool, and the next daemon publishes it."""
    node.drain_s = 2.0
    node.start()
    trainer = opened(node, plain_nursery, "stop", disk.path / "runs")
    node.wait_level(trainer.save(seed=0, step=0)["id"])
    disk.hang("getattr")
    held = trainer.save(seed=1, step=1)["id"]
    eventually(lambda: node.row(held), "the save to be known")
    begun_s = time.monotonic()
    assert node.stop(STOP_S) == 0
    print(f"stopped {time.monotonic() - begun_s:.1f} s after SIGTERM, with a mount that hangs")
    disk.wake()
    node.start()
    node.wait_level(held)
