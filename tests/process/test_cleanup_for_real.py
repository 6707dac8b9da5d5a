"""`ckpt cleanup` as its guide has it: real torch checkpoints, damaged as disks and people do it, on a real node."""

import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ckptd_client
from ckptd.cli import main
from tests.support import pages, rot
from tests.support.onlooker import Onlooker, Said, end, make

PAGE = "docs/guide/troubles.md"
ID = "6f1c0e"
SPOILED = (1, 2, 3)  # a bit flipped, cut, taken away


@pytest.fixture
def node() -> Iterator[Onlooker]:
    made = make(reconcile_s=3600.0).start()
    yield made
    end(made)


def saves(node: Onlooker, count: int) -> dict[int, str]:
    """Save a model and a moment; return the ids by step. A new supervisor has no copies in memory to repair from."""
    model = torch.nn.Linear(32, 32)
    run = ckptd_client.Experiment("resnet50", project="imagenet", dir=str(node.runs))
    state = {"model": model.state_dict(), "optimizer": {"moment": torch.rand(32, 32)}}
    for step in range(1, count + 1):
        run.save(state, step=step).wait("verified", timeout=30)
    run.close()
    node.stop()
    node.start()
    return {row["step"]: row["checkpoint"] for row in node.rows("imagenet", "resnet50")}


@dataclass
class Shell:
    """`ckpt` in this process, for the node that the environment names."""

    capsys: pytest.CaptureFixture[str]

    def run(self, *words: str) -> Said:
        self.capsys.readouterr()
        code = main(words)
        return Said(code, *self.capsys.readouterr())

    def typed(self, start: str, checkpoint: str = "") -> Said:
        """Run the line of the guide that begins so, with an id of ours for the guide's."""
        blocks = pages.blocks(PAGE, "sh")
        lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
        words = next(words for words in lines if " ".join(words).startswith(start))
        return self.run(*(word.replace(ID, checkpoint) for word in words[1:]))


def spoil(node: Onlooker, ids: dict[int, str]) -> dict[int, Path]:
    """Flip a bit of the first, cut the second, take the third away."""
    paths = {step: Path(node.row(one)["path"]) for step, one in ids.items()}  # type: ignore[index]
    rot.flip(paths[1] / "model.safetensors", at=-100, bit=2)
    os.truncate(paths[2] / "optimizer.safetensors", 100)
    shutil.rmtree(paths[3])
    for step, one in ids.items():
        assert node.ask("verify", selector=one)["results"][0]["ok"] is (step > len(SPOILED)), step
    return paths


def test_the_guide_to_cleaning_up_does_what_it_says(
    node: Onlooker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """M082, M099, M159: shown with reasons, moved to the trash, back from it as damaged as it went, and never verified."""
    for name, value in node.environ.items():
        monkeypatch.setenv(name, value)
    shell = Shell(capsys)
    ids = saves(node, 4)
    paths = spoil(node, ids)
    binned = sorted(ids[step] for step in (1, 2))
    young = shell.typed("ckpt cleanup imagenet")
    assert (young.code, young.out.count("younger than 1h")) == (0, 3)
    # What the guide types acts on what is an hour old. These are not.
    shown = shell.run("cleanup", "imagenet", "--younger-than", "0s", "--json").json["found"]
    acts = {one["step"]: (one["state"], one["action"]) for one in shown}
    assert acts == {1: ("corrupt", "trash"), 2: ("corrupt", "trash"), 3: ("missing", "forget")}
    why = {one["step"]: " ".join(one["reasons"]) for one in shown}
    assert "model.safetensors: digest MiB 0 in " in why[1]
    assert "100 bytes, recorded were" in why[2]
    assert all(paths[step].exists() for step in (1, 2)), "shown only"

    done = shell.run("cleanup", "imagenet", "--younger-than", "0s", "--confirm", "-q")
    assert (done.code, sorted(done.out.split())) == (0, sorted([*binned, ids[3]]))
    assert sorted(os.listdir(node.runs / ".ckptd-trash")) == binned
    assert sorted(line.split("\t")[0] for line in shell.typed("ckpt ls").out.splitlines()) == binned
    assert "nothing to clean up" in shell.typed("ckpt cleanup imagenet --confirm").err

    back = shell.typed("ckpt restore", ids[1])
    assert (back.code, paths[1].exists()) == (0, True)
    assert "it is damaged" in back.err
    row = node.row(ids[1])
    assert row is not None
    assert (row["state"], row["error"]["damage"][0]["file"]) == ("corrupt", "model.safetensors")
    assert shell.run("path", "imagenet/resnet50@step:1").code == 3
