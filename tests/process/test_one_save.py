"""One save from the trainer's hands to the catalog: each stage once, in order, by somebody else."""

from datetime import datetime
from pathlib import Path
from typing import Any

from tests.support.node import Node, eventually
from tests.support.trainer import Nursery

RULES = """
[[experiments]]
project = "p"
keep_last = 1
keep_best = { metric = "val_loss", mode = "min" }
trash_grace_s = 0
"""
WAY = ["checkpoint.staged", "checkpoint.published", "best.changed", "checkpoint.verified", "latest.changed"]
STAGES = ["publish", "verify", "link", "retain"]
SIZE_BYTES = 64 << 20


def at(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["at"])


def test_a_save_passes_every_stage_once_and_none_of_them_in_the_trainer(node: Node, nursery: Nursery):
    """M208: the trainer is killed as soon as save() has returned: whatever happens then is not its doing."""
    node.more = RULES
    node.start()
    first = nursery.trainer(node.environ)
    first.open(name="run", project="p", dir=str(node.runs))
    assert first.prepare(seed=1)["ready"]
    first.dies_of("save", seed=1, step=1, metrics={"val_loss": 2.0}, die="after")
    node.wait_idle()
    (row,) = node.rows("p", "run")
    assert row["level"] == "verified"
    told = [event for event in node.events() if event["checkpoint"] == row["checkpoint"]]
    assert sorted(event["event"] for event in told) == sorted(WAY)
    order = [event["event"] for event in told if event["event"].startswith("checkpoint.")]
    assert order == ["checkpoint.staged", "checkpoint.published", "checkpoint.verified"]
    assert [at(event) for event in told] == sorted(at(event) for event in told)

    def done() -> list[dict[str, Any]]:
        return [entry for entry in node.said("stage.done") if entry["checkpoint"] == row["checkpoint"]]

    stages = eventually(lambda: len(done()) >= len(STAGES) and done(), "the last of them to be said")
    assert [entry["stage"] for entry in stages] == STAGES
    assert all(entry["ms"] > 0 for entry in stages)
    assert row["staged_at"] <= row["durable_at"] <= row["verified_at"]


def read_bytes(pids: list[int]) -> int:
    """What these processes have read so far, from wherever it came."""
    counts = (Path(f"/proc/{pid}/io").read_text().partition("rchar:")[2].split()[0] for pid in pids)
    return sum(int(count) for count in counts)


def test_a_save_is_hashed_while_it_is_written_and_read_back_once(node: Node, nursery: Nursery):
    """Its SHA-256 comes from the memory that is written; the only reading is the one that proves the disk."""
    node.start()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="p", dir=str(node.runs))
    assert trainer.prepare(seed=0)["ready"]  # what comes through the spool is read once more
    node.wait_level(trainer.save(seed=0, step=0)["id"])  # the worker runs
    everybody = [node.daemon_pid, *node.workers()]
    before = read_bytes(everybody)
    node.wait_level(trainer.save(seed=1, step=1, size_bytes=SIZE_BYTES)["id"])
    assert [node.daemon_pid, *node.workers()] == everybody
    assert SIZE_BYTES <= read_bytes(everybody) - before < SIZE_BYTES * 1.2
