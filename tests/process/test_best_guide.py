"""The guide to the best, typed as it stands, against a real daemon and a real trainer."""

import os
from pathlib import Path
from typing import Any

import ckptd_client
from tests.process.test_hooks_guide import typed
from tests.support import pages
from tests.support.node import Node, eventually

PAGE = "docs/guide/best.md"
SAVES = (  # val_loss, acc
    (0.50, 0.800),
    (0.30, 0.803),
    (0.40, 0.900),
    (0.35, 0.902),
)


def test_the_guide_to_the_best_runs_as_it_is_written(node: Node, monkeypatch: Any) -> None:
    """M102, M103, M104, M106, M107, M108: six rules at once, each with its winner; a late metric; load by rule."""
    node.configure("\n".join(pages.blocks(PAGE, "toml")))
    node.start()
    for name, value in node.environ.items():
        monkeypatch.setenv(name, value)
    run = ckptd_client.Experiment("resnet50", project="imagenet", dir=str(node.runs))
    for step, (loss, acc) in enumerate(SAVES, start=1):
        run.save({"w": {"step": step}}, step=step, metrics={"val_loss": loss, "acc": acc}).wait("verified", timeout=30)
    assert run.load("best:record")["w"]["step"] == 2
    [sh] = pages.blocks(PAGE, "sh")

    def winners() -> dict[str, int]:
        [listed] = typed(node, sh, only="best list")
        [one] = listed["experiments"]
        return {board["rule"]: board["places"][0]["step"] for board in one["boards"]}

    assert winners() == {"val_loss": 2, "steady": 3, "record": 2, "balanced": 4, "accurate": 4, "front": 2}
    [shown] = typed(node, sh, only="best show")
    assert [place["step"] for place in shown["boards"][0]["places"]] == [2, 4]
    assert run.load("best:steady")["w"]["step"] == 3
    assert run.load("best_val_loss")["w"]["step"] == run.load("best")["w"]["step"] == 2
    assert typed(node, sh, only="ckpt path")[0]["step"] == 3
    typed(node, sh, only="ckpt measured")
    assert winners() == {"val_loss": 3, "steady": 3, "record": 3, "balanced": 3, "accurate": 3, "front": 3}
    link = node.runs / "imagenet/best_record"
    eventually(lambda: os.readlink(link) == "resnet50/step_0000000003", "the link to follow")
    assert typed(node, sh, only="best recompute")[0]["experiments"] == []
    run.close()


def test_the_script_of_the_guide_runs_as_it_is_written(node: Node, monkeypatch: Any, tmp_path: Path) -> None:
    """M106: what a script tells after the save decides, also while no daemon is there to hear it."""
    node.configure("\n".join(pages.blocks(PAGE, "toml")))
    node.start()
    monkeypatch.chdir(tmp_path)
    for name, value in node.environ.items():
        monkeypatch.setenv(name, value)
    [script] = pages.blocks(PAGE, "python")
    names: dict[str, Any] = {"model": {"w": 1.5}, "step": 7}
    exec(script, names)
    run = names["run"]
    run.flush()
    handle = names["handle"].wait("verified", timeout=30)
    best = eventually(lambda: run.load("best:val_loss"), "the metric to decide")
    assert best["model"] == {"w": 1.5}
    other = run.save({"model": {"w": 2.5}}, step=8).wait("verified", timeout=30)
    node.stop()
    run.measured(other, {"val_loss": 0.1})
    run.measured(other, {"val_loss": 0.2})
    node.start()
    eventually(lambda: run._session.wait_open(1), "the client to come back")
    assert run.flush(timeout_s=60)
    shown = node.ckpt("show", other.id, "--json")["checkpoint"]
    assert shown["metrics"] == {"val_loss": 0.2}
    assert run.load("best:val_loss")["model"] == {"w": 2.5}
    assert handle.step == 7
    run.close()
