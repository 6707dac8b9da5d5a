"""The guide to hooks, typed as it stands, against a real daemon, a real trainer and real child hosts."""

import json
import shlex
from pathlib import Path
from typing import Any

import ckptd_client
from tests.support import pages
from tests.support.node import Node, eventually

PAGE = "docs/guide/hooks.md"
HOME = "/home/me/hooks"
BELL = "#!/bin/sh\ncat > /dev/null\n"
PREDICT = """

def predict(context):
    return Finding(Level.INFO, "seven times that", {"answer": context.data["n"] * 7})
"""


def typed(node: Node, block: str, *, only: str = "") -> list[Any]:
    """Run the `ckpt` lines of a shell block; return what each printed with --json."""
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [node.ckpt(*words[1:], "--json") for words in lines if words and only in " ".join(words)]


def configured(node: Node, home: Path) -> None:
    """Put the page's hooks and its configuration into place."""
    home.mkdir()
    # The page's two seconds are for people; a host that stands still for as long would veto nothing.
    (home / "my_hooks.py").write_text(pages.blocks(PAGE, "python")[0].replace("timeout_s=2", "timeout_s=60") + PREDICT)
    (home / "bell").write_text(BELL)
    (home / "bell").chmod(0o755)
    node.configure("\n".join(pages.blocks(PAGE, "toml")).replace(HOME, str(home)))


def test_the_guide_to_hooks_runs_as_it_is_written(node: Node, monkeypatch: Any) -> None:
    """M047, M048, M064: hooks are taken in by a reload, asked and told in a real life, tried and switched by hand."""
    node.start()
    configured(node, node.dir / "hooks")
    first, second, lift = pages.blocks(PAGE, "sh")
    for name, value in node.environ.items():
        monkeypatch.setenv(name, value)
    node.ckpt("reload")
    eventually(lambda: len(node.ckpt("hooks", "list", "--json")["hooks"]) == 4, "the module's hooks to be known")
    listed = {row["name"]: row for row in typed(node, first, only="hooks list")[0]["hooks"]}
    assert list(listed) == ["mine.log_save", "mine.not_diverged", "mine.slow_load", "bell"]
    assert listed["mine.not_diverged"]["timeout_s"] == 60
    [tried] = typed(node, first, only="hooks test")
    assert (tried["run"]["outcome"], tried["run"]["error"]) == ("vetoed", "the loss has diverged")

    run = ckptd_client.Experiment("resnet50", project="imagenet", dir=str(node.runs))
    run.save({"model": {"w": 1.5}}, step=1, metrics={"val_loss": 0.3}).wait("verified", timeout=30)
    run.save({"model": {"w": 9.9}}, step=2, metrics={"val_loss": 99.0}).wait("verified", timeout=30)
    run.log({"grad_norm": 1e6}, step=2)
    assert run.load("latest")["model"]["w"] == 1.5, "the diverged one is not the latest"
    assert run.load(2)["model"]["w"] == 9.9
    told = eventually(lambda: node.events("checkpoint.loaded"), "the load to be told")
    assert told[0]["data"]["ms"] > 0
    eventually(lambda: node.events("metric.crossed"), "the threshold to be told")
    run.close()

    def runs() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = node.ckpt("hooks", "log", "mine.log_save", "--json")["runs"]
        return found if len(found) == 2 else []

    assert "step 2 of resnet50 is durable" in eventually(runs, "both saves to be told")[0]["detail"]
    results = typed(node, second)
    figures = {row["name"]: row for row in results[0]["hooks"]}
    assert (figures["mine.not_diverged"]["ok"], figures["mine.not_diverged"]["vetoed"]) == (1, 1)
    assert [result.get("changed") for result in results[2:4]] == [True, True]
    typed(node, lift.replace("step:1000", "step:2"))
    assert node.ask("show", selector="imagenet/resnet50")["checkpoint"]["step"] == 2, "it counts after all"
    answer = node.ask("x-acme.predict", data={"n": 6})
    assert answer["run"]["findings"][0]["facts"] == {"answer": 42}, json.dumps(answer)
