"""A full disk is an alarm and a wait: nothing is deleted to make room."""

from tests.support.node import Node, eventually
from tests.support.trainer import Nursery

RULES = """
[[experiments]]
project = "p"
keep_last = 2
keep_best = { metric = "val_loss", mode = "min" }
"""


def test_a_full_disk_deletes_nothing_and_is_told(node: Node, nursery: Nursery):
    """M022: what the rules keep is kept although the save that does not fit comes again and again, and arrives when it can."""
    node.more = RULES
    node.start()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="p", dir=str(node.runs))
    for step in range(4):
        trainer.save(seed=step, step=step, metrics={"val_loss": float(step)})
        node.wait_idle()
    kept = {row["step"]: row["path"] for row in node.rows("p", "run") if row["state"] == "live"}
    assert set(kept) == {0, 2, 3}, "the best and the last two"
    retired = node.events("checkpoint.trashed")
    node.arm("copy.allocated", "enospc")
    late = trainer.save(seed=4, step=4, metrics={"val_loss": 9.0})["id"]
    node.wait_fired()
    (alarm,) = eventually(lambda: node.events("job.retried"), "an alarm")
    assert alarm["data"]["error"]["code"] == "no_space"
    assert node.events("checkpoint.trashed") == retired
    assert {
        row["step"] for row in node.rows("p", "run") if row["path"] in kept.values() and row["state"] == "live"
    } == set(kept)
    node.wait_level(late)
    node.wait_idle()
    assert {row["step"] for row in node.rows("p", "run") if row["state"] == "live"} == {0, 3, 4}
