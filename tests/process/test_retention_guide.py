"""The guide to retention, typed as it stands, against a real daemon and a real trainer."""

from typing import Any

import pytest

import ckptd_client
from tests.process.test_hooks_guide import typed
from tests.support import pages
from tests.support.node import Node, eventually

PAGE = "docs/guide/retention.md"
STEPS = (50, 60, 70, 100, 200, 300, 400, 500, 600, 700, 800, 1200, 1300)
LAST_TEN = list(STEPS[3:])


def metrics(step: int) -> dict[str, float]:
    """The longer it trains the better: what is best is among the newest."""
    return {"val_loss": 1 / step, "acc": step / 1e4}


def test_the_guide_to_retention_runs_as_it_is_written(node: Node, monkeypatch: Any) -> None:
    """M093, M098, M100, M210: plans, reasons, holds, the trash and bulk acts, by the rules that the page begins with."""
    rules, *_ = pages.blocks(PAGE, "toml")
    look, brake, bulk = pages.blocks(PAGE, "sh")
    node.configure(rules)
    node.start()
    for name, value in node.environ.items():
        monkeypatch.setenv(name, value)
    ids: dict[int, str] = {}
    with ckptd_client.Experiment("resnet50", project="imagenet", dir=str(node.runs)) as run:
        for step in STEPS:
            saved = run.save({"w": {"step": step}}, step=step, metrics=metrics(step)).wait("verified", timeout=60)
            ids[step] = str(saved.id)
        with ckptd_client.Experiment("debug", project="imagenet", dir=str(node.runs)) as other:
            for step in (1, 2):
                other.save({"w": 1}, step=step).wait("verified", timeout=60)

    def live() -> list[int]:
        return sorted(row["step"] for row in node.rows("imagenet", "resnet50") if row["state"] == "live")

    eventually(lambda: live() == LAST_TEN, "what no rule keeps to be retired")

    plan, applied, explained, pinned, tagged, dry, restored = typed(
        node, look.replace("6f1c0e", ids[500]).replace("9b2d41", ids[60])
    )
    dropped = {one["name"]: [each["step"] for each in one["drop"]] for one in (*plan["plans"], *applied["plans"])}
    assert dropped == {"resnet50": [], "debug": []}, "each save has done it already"
    assert (explained["verdict"], explained["changes"][0]) == ("keep", "without keep_last: drop")
    assert (pinned["checkpoint"], tagged["checkpoint"]) == (ids[1200], ids[1300])
    assert live() == [60, *LAST_TEN], "restored, and nothing was removed dry"
    assert (dry["dry_run"], restored["checkpoint"]) == (True, ids[60])

    typed(node, brake)
    assert live() == [60, *LAST_TEN], "what is restored is pinned"

    # A person is asked; here nobody is there to answer.
    [tagged] = typed(node, bulk.replace("--level verified", "--level verified --yes"), only="bulk tag")
    assert len(tagged["done"]) == len([60, *LAST_TEN]) + 2
    rows = {row["step"]: row for row in node.rows("imagenet", "resnet50")}
    assert all("sweep-7" in rows[step]["tags"] for step in LAST_TEN)
    with pytest.raises(AssertionError, match="remove: 1 checkpoint"):  # exit code 1: one can't be removed, and is named
        typed(node, bulk, only="bulk rm")
    assert typed(node, bulk, only="bulk verify")[0]["wanted"] == [], "nothing here is a week old"
