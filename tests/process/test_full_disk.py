"""A full disk is an alarm and a wait: nothing is deleted to make room."""

from tests.support.node import Node, eventually
from tests.support.trainer import Nursery

RULES = """
[[experiments]]
project = "p"
keep_last = 2
keep_best = { metric = "val_loss", mode = "min" }
"""
PINNED = 1


def test_a_full_disk_deletes_nothing_and_is_told(node: Node, nursery: Nursery):
    """M022: what the rules keep is kept although the save that does not fit comes again and again, and arrives when it can."""
    node.more = RULES
    node.start()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="p", dir=str(node.runs))
    for step in range(5):
        saved = trainer.save(seed=step, step=step, metrics={"val_loss": float(step)})["id"]
        node.wait_level(saved)
        if step == PINNED:
            node.ckpt("pin", saved)
        node.wait_idle()
    kept = {row["step"]: row["path"] for row in node.rows("p", "run") if row["state"] == "live"}
    assert set(kept) == {0, PINNED, 3, 4}, "the best, the pinned one, the last two"
    retired = node.events("checkpoint.trashed")
    node.arm("copy.allocated", "enospc")
    late = trainer.save(seed=5, step=5, metrics={"val_loss": 9.0})["id"]
    node.wait_fired()
    alarm = eventually(lambda: [e for e in node.events("job.retried") if e["checkpoint"] == late], "an alarm")[0]
    assert alarm["data"]["error"]["code"] == "no_space"
    node.wait_level(late)
    node.wait_idle()
    told = node.events()
    arrived = next(n for n, e in enumerate(told) if (e["event"], e["checkpoint"]) == ("checkpoint.published", late))
    assert [e for e in told[:arrived] if e["event"] == "checkpoint.trashed"] == retired
    assert {row["step"] for row in node.rows("p", "run") if row["state"] == "live"} == {0, PINNED, 4, 5}
