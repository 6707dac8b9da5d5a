"""What is recorded of a run: configs of every kind, secrets masked, nothing slow."""

import argparse
import dataclasses
import enum
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ckptd_client import capture, facts


@dataclasses.dataclass
class Model:
    width: int = 8
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    model: Model = dataclasses.field(default_factory=Model)
    hf_token: str = "secret!"


EXPECTED = {"lr": 0.1, "model": {"width": 8, "betas": [0.9, 0.95]}, "hf_token": "***"}


def test_a_dataclass_a_namespace_and_a_dict_say_the_same():
    """M116"""
    as_dict = dataclasses.asdict(Config())
    assert capture.config_of(Config()) == EXPECTED
    assert capture.config_of(argparse.Namespace(**as_dict)) == EXPECTED
    assert capture.config_of(as_dict) == EXPECTED
    assert capture.config_of(None) == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", '{"lr": 0.1, "db": {"password": "x"}}'),
        ("c.yaml", "lr: 0.1\ndb:\n  password: x\n"),
        ("c.toml", 'lr = 0.1\n[db]\npassword = "x"\n'),
    ],
)
def test_a_file_is_read(tmp_path: Path, name: str, text: str):
    """M116"""
    (tmp_path / name).write_text(text)
    expected = {"lr": 0.1, "db": {"password": "***"}}
    assert capture.config_of(tmp_path / name) == expected
    assert capture.config_of(str(tmp_path / name)) == expected


@pytest.mark.parametrize(("name", "text"), [("c.json", "{"), ("c.yaml", "a: [1"), ("c.toml", "x"), ("c.json", "[1]")])
def test_a_file_that_is_no_config_is_a_clear_error(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="config"):
        capture.config_of(tmp_path / name)


@pytest.mark.parametrize(
    "name",
    ["token", "hf_token", "HF_TOKEN", "apiKey", "api-key", "aws_secret_access_key", "password", "db_passwd", "auth",
     "wandb_api_key", "client_secret", "private_key", "bearer", "slack_webhook"],
)  # fmt: skip
def test_secrets_are_masked_by_name(name: str):
    assert capture.config_of({"a": {name: "hunter2"}}) == {"a": {name: "***"}}


@pytest.mark.parametrize(
    "name", ["max_tokens", "token_ids", "tokenizer", "n_tokens", "key_dim", "monkey", "keyboard", "author",
             "tokens_per_batch", "compass"]
)  # fmt: skip
def test_training_words_are_not_secrets(name: str):
    assert capture.config_of({name: 5, "x": {name: "v"}}) == {name: 5, "x": {name: "v"}}


def test_a_number_under_a_weak_name_is_a_size_and_under_a_strong_one_a_secret():
    assert capture.config_of({"num_keys": 5, "key": "v", "password": 1234}) == {
        "num_keys": 5,
        "key": "***",
        "password": "***",
    }


def test_passwords_in_urls_and_command_lines_are_masked():
    assert capture.config_of({"db": "postgres://me:pw@host/x"}) == {"db": "postgres://me:***@host/x"}
    argv = ["train.py", "--lr", "0.1", "--api-key", "abc", "--hf-token=abc", "password=abc", "http://u:p@h"]
    assert capture.mask_arguments(argv) == [
        "train.py", "--lr", "0.1", "--api-key", "***", "--hf-token=***", "password=***", "http://u:***@h",
    ]  # fmt: skip


def test_anything_else_becomes_text_and_never_an_error():
    class Angry:
        def __str__(self) -> str:
            raise RuntimeError

    class Color(enum.Enum):
        RED = 1

    loop: dict[str, object] = {}
    loop["self"] = loop
    config = capture.config_of(
        {
            1: torch.float16,
            "p": Path("/x"),
            "s": {3, 1, 2},
            "a": Angry(),
            "e": Color.RED,
            "nan": float("nan"),
            "l": loop,
        }
    )
    json.dumps(config, allow_nan=False)
    assert (config["1"], config["p"], config["s"]) == ("torch.float16", "/x", [1, 2, 3])
    assert (config["a"], config["nan"]) == ("<Angry: RuntimeError>", "nan")


def test_a_huge_config_is_cut_and_says_so():
    config = capture.config_of({f"k{i}": "x" * 4000 for i in range(500)})
    assert "_cut" in config
    assert len(config["_keys"]) == 500


def test_param_groups_are_captured_without_their_parameters():
    """M116"""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": [layer.weight], "lr": 0.5}, {"params": [layer.bias]}], lr=0.1)
    found = capture.optimizer_config(optimizer)
    assert found["class"] == "AdamW"
    assert [(g["lr"], g["params"]) for g in found["param_groups"]] == [(0.5, 1), (0.1, 1)]
    json.dumps(found)
    with pytest.raises(ValueError, match="param_groups"):
        capture.optimizer_config({})


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("GIT_"):
            monkeypatch.delenv(name)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    (tmp_path / "train.py").write_text("a = 1\n")
    for command in (["init", "-q", "-b", "trunk"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def test_commit_and_dirty_diff_are_recorded(repository: Path):
    """M117"""
    clean = facts.git_facts(str(repository))
    assert len(clean["git_commit"]) == 40
    assert (clean["git_branch"], clean["git_dirty"], clean["git_dirty_sha256"]) == ("trunk", False, None)
    (repository / "train.py").write_text("a = 2\n")
    dirty = facts.git_facts(str(repository))
    assert dirty["git_dirty"] is True
    (repository / "train.py").write_text("a = 3\n")
    other = facts.git_facts(str(repository))
    assert len({dirty["git_dirty_sha256"], other["git_dirty_sha256"]}) == 2
    assert dirty["git_commit"] == clean["git_commit"]


def test_no_repository_is_no_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert facts.git_facts(str(tmp_path)) == {}
    assert facts.git_facts(str(tmp_path / "none")) == {}
    monkeypatch.setenv("PATH", "")
    assert facts.git_facts(str(tmp_path)) == {}


def test_a_git_that_hangs_costs_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(facts, "GIT_S", 0.2)
    began_s = time.monotonic()
    assert "longer than" in facts.git_facts(str(tmp_path))["git_problem"]
    assert time.monotonic() - began_s < 20


def test_facts_name_host_command_packages_and_chosen_variables(monkeypatch: pytest.MonkeyPatch):
    """M117"""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("NCCL_SECRET", "x")
    monkeypatch.setenv("HOME_MADE_PASSWORD", "x")
    monkeypatch.setattr(sys, "argv", ["train.py", "--token", "abc"])
    found = {**facts.quick_facts(), **facts.slow_facts()}
    assert found["pid"] == os.getpid()
    assert found["argv"] == ["train.py", "--token", "***"]
    assert found["env"]["CUDA_VISIBLE_DEVICES"] == "3"
    assert found["env"]["NCCL_SECRET"] == "***"
    assert "HOME_MADE_PASSWORD" not in found["env"]
    assert found["packages"]["torch"] == torch.__version__
    assert found["torch_seed"] == torch.initial_seed()
    json.dumps(found)
