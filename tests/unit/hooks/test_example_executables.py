"""The example executables of configs/hooks do what they say, once, and nothing of them is left half."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HOOKS = Path(__file__).parents[3] / "configs/hooks"
CHECKPOINT = "c" * 32


def run(name: str, path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    data = {"path": str(path), "project": "imagenet", "name": "resnet50", "step": 100}
    event = {
        "event": "checkpoint.verified",
        "key": "k",
        "checkpoint_id": CHECKPOINT,
        "experiment_id": "e",
        "data": data,
    }
    return subprocess.run(
        [sys.executable, HOOKS / name, *arguments],
        input=json.dumps(event),
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.defpath, **environment},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "runs/step_0000000100"
    (path / "extra").mkdir(parents=True)
    save_file({"w": torch.arange(6.0), "n": torch.tensor([3])}, path / "model.safetensors")
    (path / "extra/notes.txt").write_text("x")
    return path


@pytest.mark.parametrize("name", ["copy", "convert", "evaluate"])
def test_each_may_be_executed_and_says_how_it_is_configured(name):
    path = HOOKS / name
    assert path.stat().st_mode & stat.S_IXUSR
    assert path.read_text().startswith("#!/usr/bin/env python3\n")
    assert f"/hooks/{name}" in path.read_text()


def test_a_copy_is_whole_and_made_once(tmp_path, saved):
    for _ in range(2):
        done = run("copy", saved, str(tmp_path / "archive"))
        assert done.returncode == 0, done.stderr
    target = tmp_path / "archive/imagenet/resnet50/step_0000000100"
    assert (target / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert (target / "extra/notes.txt").read_text() == "x"
    assert [each.name for each in target.parent.iterdir()] == [target.name]
    assert "is there already" in done.stdout


def test_what_an_interrupted_copy_left_is_begun_anew(tmp_path, saved):
    part = tmp_path / f"archive/imagenet/resnet50/.step_0000000100.{CHECKPOINT}.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_text("half")
    assert run("copy", saved, str(tmp_path / "archive")).returncode == 0
    assert not part.exists()
    assert load_file(part.parent / "step_0000000100/model.safetensors")["w"].tolist() == list(range(6))


def test_a_single_file_is_copied_and_a_retired_one_is_no_failure(tmp_path, saved):
    assert run("copy", saved / "model.safetensors", str(tmp_path / "a")).returncode == 0
    assert (tmp_path / "a/imagenet/resnet50/model.safetensors").is_file()
    assert run("copy", tmp_path / "gone", str(tmp_path / "a")).returncode == 0


def test_weights_are_converted_and_integers_stay(tmp_path, saved):
    done = run("convert", saved, str(tmp_path / "models"), "float16")
    assert done.returncode == 0, done.stderr
    (target,) = (tmp_path / "models").iterdir()
    assert target.name == "imagenet-resnet50.float16.safetensors"
    state = load_file(target)
    assert (state["w"].dtype, state["n"].dtype) == (torch.float16, torch.int64)
    assert state["w"].tolist() == list(range(6))
    assert "no precision" in run("convert", saved, str(tmp_path), "float17").stderr


def test_an_evaluation_gives_its_numbers_to_the_checkpoint(tmp_path, saved):
    evaluation = tmp_path / "eval.sh"
    evaluation.write_text(
        '#!/bin/sh\necho "looking at $2"\necho val_loss=0.25\necho acc = 1\necho bad=nan\ntest "$1" = --fast\n'
    )
    ckpt = tmp_path / "ckpt"
    ckpt.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\n')
    for script in (evaluation, ckpt):
        script.chmod(0o755)
    done = run("evaluate", saved, str(evaluation), "--fast", CKPT=str(ckpt))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "said").read_text() == f"measured {CHECKPOINT} val_loss=0.25 acc=1.0 bad=nan\n"
    assert "ended with status 1" in run("evaluate", saved, str(evaluation), "--slow", CKPT=str(ckpt)).stderr
    assert "printed no line" in run("evaluate", saved, "/bin/true", CKPT=str(ckpt)).stderr
