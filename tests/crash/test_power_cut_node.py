"""A whole node on a disk whose power fails: state directory and root both lie there."""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import invariants, payload, tally
from tests.support.disk import Disk
from tests.support.node import Node, eventually
from tests.support.trainer import Nursery, Trainer

pytestmark = [pytest.mark.xdist_group("loop"), pytest.mark.slow, pytest.mark.timeout(300)]

LONG_CUTS = int(os.environ.get("CKPTD_FAULT_NODE_CUTS", "25"))
SAVES = 4
PROJECT = "power"


@dataclass
class DiskNode(Node):
    """A node whose state and roots are on `disk`, and its socket, log and fail points are not."""

    disk: Disk | None = None

    @property
    def state(self) -> Path:
        assert self.disk is not None
        return self.disk.path / "s"

    @property
    def runs(self) -> Path:
        assert self.disk is not None
        return self.disk.path / "runs"

    def cut_power(self) -> None:
        """The disk loses what it does not hold, every process is gone, the machine comes up again."""
        assert self.disk is not None
        self.disk.cut()
        self.clean_up()

    def come_up(self) -> None:
        """Mount again and start."""
        assert self.disk is not None
        self.disk.replay()
        invariants.digest.cache_clear()
        self.plan.write_text("")
        self.start()


@pytest.fixture(params=["ext4", "xfs"])
def node(disks: Callable[[str], Disk], request: pytest.FixtureRequest) -> Iterator[DiskNode]:
    disk = disks(request.param)
    cuts, home = disk.cuts, Path(tempfile.mkdtemp(prefix="ck"))
    made = DiskNode(home, disk=disk)
    yield made
    print(made.tail())
    made.clean_up()
    made.remove()
    for path in (made.state, made.runs):
        shutil.rmtree(path, ignore_errors=True)
    tally.add(disk.counted, disk.cuts - cuts)


def told(trainer: Trainer, ids: list[str]) -> dict[str, str]:
    """What a trainer was told of each save: from durable on it must be so for ever."""
    levels = {each: trainer.handle(id=each)["level"] for each in ids}
    return {each: level for each, level in levels.items() if invariants.RANK[level] >= invariants.RANK["durable"]}


def assert_kept(node: DiskNode, acknowledged: dict[str, str], seeds: dict[str, int]) -> None:
    """Everything acknowledged is there, byte for byte; nothing is there in part; nothing waits for ever."""
    node.wait_idle()
    for checkpoint in acknowledged:
        row = node.wait_level(checkpoint)
        payload.check_saved(Path(row["path"]), seeds[checkpoint])
    wrong = invariants.violations(node, acknowledged)
    tally.add("violations", len(wrong))
    assert not wrong, "\n".join(wrong)


def one_cut(node: DiskNode, nursery: Nursery, name: str, after_s: float, seeds: dict[str, int]) -> dict[str, Any]:
    """Save a few times, cut the power `after_s` later; return what was told by then."""
    trainer = nursery.trainer(node.environ)
    trainer.open(name=name, project=PROJECT, dir=str(node.runs))
    ids = []
    for step in range(1, SAVES + 1):
        seed = len(seeds) + 1
        ids.append(trainer.save(seed=seed, step=step)["id"])
        seeds[ids[-1]] = seed
        if step == 1:
            trainer.wait(id=ids[0], level="durable")  # what it was told counts, not what the catalog says
    time.sleep(after_s)
    found: dict[str, Any] = told(trainer, ids)
    node.cut_power()
    trainer.end()
    return found


def test_what_a_trainer_was_told_to_be_durable_is_there_after_the_power_failed(
    node: DiskNode, nursery: Nursery
) -> None:
    """F3, I1, I2, I5: four saves, cut while they are on their way; the next boot finishes or finds them."""
    node.start()
    seeds: dict[str, int] = {}
    acknowledged = one_cut(node, nursery, "run", 0.02, seeds)
    assert acknowledged
    node.come_up()
    assert_kept(node, acknowledged, seeds)


@pytest.mark.parametrize("node", ["ext4"], indirect=True)
def test_a_checkpoint_that_was_named_before_the_power_failed_and_not_written_down_is_found(
    node: DiskNode, nursery: Nursery
) -> None:
    """F3, I5: its memory is gone and its row was pending, but its name and every byte below it are durable."""
    node.start()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="named", project=PROJECT, dir=str(node.runs))
    assert trainer.prepare(seed=1)["ready"]
    node.arm("catalog.durable", "delay:2")
    saved = trainer.save(seed=1, step=1)["id"]
    node.wait_fired()
    node.cut_power()
    trainer.end()
    node.come_up()
    eventually(lambda: (node.row(saved) or {}).get("level") == "verified", "the scan to find it")
    assert_kept(node, {saved: "verified"}, {saved: 1})


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_node_keeps_its_word_over_power_cuts_at_random_times(node: DiskNode, nursery: Nursery) -> None:
    """F3, long: one state directory and one root, cut again and again."""
    seed = int(os.environ.get("CKPTD_FAULT_SEED", "1"))
    print(f"seed {seed}, {LONG_CUTS} cuts")
    dice = random.Random(seed)
    seeds: dict[str, int] = {}
    acknowledged: dict[str, str] = {}
    node.start()
    for number in range(LONG_CUTS):
        acknowledged |= one_cut(node, nursery, f"run-{number}", dice.random() * 0.2, seeds)
        node.come_up()
        assert_kept(node, acknowledged, seeds)
    assert len(acknowledged) >= LONG_CUTS
