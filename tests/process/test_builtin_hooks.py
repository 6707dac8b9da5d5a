"""The built-in hooks on a real node: what is found reaches the catalog, the command line and a person. M059, M061, M062, M202"""

import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file

from ckptd.model import new_id
from tests.support.node import Node, eventually
from tests.support.trainer import Nursery

HOOKS = """
[[hooks]]
builtin = "numeric-health"
[[hooks]]
builtin = "recovery"
[[hooks]]
builtin = "grid"
[[hooks]]
builtin = "notify"
options = {{ rules = {{ stalled = {{ burst = 1, per = "1h" }} }} }}
[[hooks]]
name = "pager"
exec = ["{pager}"]
events = ["hook.finding"]
when = "data.hook == 'notify'"
"""


def findings(node: Node, hook: str) -> list[dict[str, object]]:
    events = node.ask("events", limit=500)["events"]
    return [event["data"] for event in events if event["event"] == "hook.finding" and event["data"]["hook"] == hook]


def test_a_nan_and_a_killed_trainer_reach_a_person_once_each(node: Node, plain_nursery: Nursery, tmp_path: Path):
    pager, paged = tmp_path / "pager", tmp_path / "paged"
    pager.write_text(f"#!/bin/sh\ncat >> {paged}\necho >> {paged}\n")
    pager.chmod(0o755)
    node.more = HOOKS.format(pager=pager)
    node.start()

    broken = tmp_path / "model_step_7.safetensors"
    save_file({"w": torch.tensor([1.0, float("nan")] * 20)}, broken)
    node.ask("submit", path=str(broken), checkpoint=new_id(), project="p", experiment="legacy", told=True)
    (health,) = eventually(lambda: findings(node, "numeric-health"), "the verdict about the submitted file")
    assert (health["level"], health["facts"]["problems"]["nan"]) == ("error", 1)

    assert [one["text"] for one in node.ask("show", selector="latest", project="p", name="legacy")["findings"]] == [
        health["text"]
    ]

    trainers = [plain_nursery.trainer(node.environ) for _ in range(2)]
    for number, trainer in enumerate(trainers):
        trainer.open(name=f"lr{number}", project="p", dir=str(node.runs), tags=["sweep"], config={"max_steps": 1000})
        assert trainer.prepare(seed=1)["ready"]
        node.wait_level(trainer.save(seed=1, step=100)["id"])
    os.kill(trainers[0].pid, signal.SIGKILL)
    eventually(lambda: findings(node, "recovery"), "how to go on")
    os.kill(trainers[1].pid, signal.SIGKILL)
    eventually(lambda: len(findings(node, "recovery")) == 2, "how to go on with the other")

    grid = node.ask("grid", tag="sweep")
    assert {row["name"]: (row["condition"], row["progress"]) for row in grid["rows"]} == {
        "lr0": ("lost", 0.1),
        "lr1": ("lost", 0.1),
    }
    found = node.ask("recovery", project="p", name="lr0")
    assert (found["status"], found["checkpoint"]["step"], found["facts"]["host"]) == ("lost", 100, os.uname().nodename)
    assert found["command"].startswith(f"cd {found['facts']['cwd']} && ")
    assert node.ask("show", selector="latest", project="p", name="lr0")["recovery"]["command"] == found["command"]
    eventually(lambda: len(findings(node, "grid")) == 2, "the grid's")

    def told() -> list[dict[str, str]]:
        lines = paged.read_text().splitlines() if paged.exists() else []
        return [json.loads(line)["data"] for line in lines if line]

    notices = eventually(
        lambda: (said := told()) and {one["facts"]["notice"] for one in said} >= {"findings", "stalled"} and said,
        "the pager",
    )
    by_rule = [one["facts"]["notice"] for one in notices]
    assert by_rule.count("stalled") == 1  # the second trainer's end is held back for an hour
    assert any("resume with: cd " in one["text"] for one in notices)
    assert any("1 nan" in one["text"] for one in notices)
