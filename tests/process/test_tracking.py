"""An experiment as its trainer knows it and as the catalog does: one identity, whatever dies in between."""

import time

from tests.support.node import Node, eventually
from tests.support.trainer import Nursery


def test_one_call_opens_an_experiment_and_its_id_outlives_every_daemon(node: Node, plain_nursery: Nursery):
    """M109."""
    node.start()
    trainer = plain_nursery.trainer(node.environ)
    trainer.open(name="run", project="p", dir=str(node.runs), tags=["baseline"], config={"lr": 0.1})
    assert trainer.prepare(seed=1)["ready"]
    trainer.save(seed=1, step=1)
    known = node.experiment("p", "run")
    assert (known["experiment"], known["tags"]) == (trainer.stats()["experiment"], ["baseline"])
    node.kill_daemon()
    node.status()
    eventually(lambda: trainer.stats()["connected"], "the trainer's return")
    trainer.save(seed=2, step=2)
    trainer.close()
    again = node.experiment("p", "run")
    assert again["experiment"] == known["experiment"] == trainer.stats()["experiment"]
    assert again["status"] == "completed"
    resumed = plain_nursery.trainer(node.environ)
    resumed.open(name="run", project="p", dir=str(node.runs))
    assert resumed.prepare(seed=3)["ready"]
    resumed.save(seed=3, step=3)
    assert resumed.stats()["experiment"] == known["experiment"]
    assert node.experiment("p", "run")["segment"] == known["segment"] + 1


def test_a_logged_value_can_be_read_soon_with_no_save_and_no_flush_between(node: Node, plain_nursery: Nursery):
    """M111. The median, so that a busy machine does not decide the test."""
    node.start()
    trainer = plain_nursery.trainer(node.environ)
    trainer.open(name="run", project="p", dir=str(node.runs))
    eventually(lambda: node.ask("experiments", project="p")["experiments"], "the experiment")

    def newest() -> float | None:
        points = node.ask("metrics.tail", project="p", name="run")["points"]
        return points[-1]["value"] if points else None

    took_s = []
    for step in range(5):
        trainer.log(metrics={"loss": float(step)}, step=step)
        logged_s = time.monotonic()
        eventually(lambda wanted=float(step): newest() == wanted, "the point")
        took_s.append(time.monotonic() - logged_s)
    assert sorted(took_s)[2] < 3.0, took_s
