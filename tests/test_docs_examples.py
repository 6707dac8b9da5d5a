"""What the documents tell people to type works: Python blocks run against a real node, shell and TOML blocks parse."""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from ckptd import config, supervisor
from ckptd.cli import ckpt
from ckptd.cli.options import Globals
from ckptd_client import offers
from tests.support import pages, tree
from tests.support.node import Node

SAID = [path for path in tree.documents() if not path.startswith(("docs/reference/wire", "docs/decisions"))]
BUILTIN_HOOKS = "docs/guide/builtin-hooks.md"
OURS = {"ckpt", "ckptd", "make", "pip"}
WIDTH = 4


class Page:
    """One page's Python blocks, run in order as one script would, in a directory and with names of its own."""

    def __init__(self, path: str) -> None:
        torch.manual_seed(7)
        self.model = torch.nn.Linear(WIDTH, WIDTH)
        optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.ones(1, WIDTH)).sum().backward()
        optimizer.step()
        # What stands for the reader's own: every page may use these names without making them.
        self.names: dict[str, Any] = {
            "model": self.model,
            "optimizer": optimizer,
            "cfg": {"lr": 0.1},
            "loss": 0.5,
            "v": 0.3,
        }
        self.names |= {"start": 0, "steps": 201, "step": 0}
        self.path = path

    def run(self, *blocks: int) -> None:
        """Run these blocks, all when none is named."""
        every = pages.blocks(self.path, "python")
        for number in blocks or range(len(every)):
            exec(compile(every[number], f"{self.path}, block {number}", "exec"), self.names)

    def same_weights(self, other: "Page") -> bool:
        return all(
            torch.equal(a, b)
            for a, b in zip(self.model.state_dict().values(), other.model.state_dict().values(), strict=True)
        )


@pytest.fixture
def at(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Page]]:
    """Makes pages whose code meets a running node and an empty directory."""
    node.start()
    monkeypatch.chdir(tmp_path)
    for name, value in node.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(offers, "ANSWER_S", 60.0)
    made: list[Page] = []

    def make(path: str) -> Page:
        made.append(Page(path))
        return made[-1]

    yield make
    for page in made:
        if "run" in page.names:
            page.names["run"].close(timeout_s=10)


def steps(node: Node, name: str = "resnet50") -> list[int]:
    """The steps of one experiment once every checkpoint is verified."""
    node.wait_idle()
    rows = node.rows("imagenet", name)
    assert {row["level"] for row in rows} == {"verified"}, rows
    return [row["step"] for row in rows]


def test_the_training_loop_of_the_front_page_saves_and_resumes(at, node):
    first = at("README.md")
    first.run()
    first.names["run"].close()
    assert steps(node) == [0, 100, 200]
    again = at("README.md")
    with torch.no_grad():
        again.model.weight.zero_()
    again.run()
    assert again.names["state"]["progress"]["step"] == 201, "it began anew"
    assert again.same_weights(first)
    assert steps(node) == [0, 100, 200], "it saved again what it had"


def test_the_page_of_the_client_runs_as_it_is_written(at, node, tmp_path):
    (tmp_path / "out").mkdir()
    page = at("client/README.md")
    torch.save(page.model.state_dict(), tmp_path / "out/epoch3.pt")
    page.run()
    assert steps(node) == [3, 100, 200]


def test_the_guide_to_memory_runs_as_it_is_written(at, node):
    first = at("docs/guide/memory.md")
    first.run(0)
    assert first.names["handle"].wait("verified", timeout=60).level == "verified"
    again = at("docs/guide/memory.md")
    with torch.no_grad():
        again.model.weight.zero_()
    again.names["run"] = first.names["run"]
    again.run(1)
    assert again.names["start"] == 1200
    assert again.same_weights(first)


def test_the_guide_to_files_runs_as_it_is_written(at, node, tmp_path):
    (tmp_path / "runs").mkdir()
    page = at("docs/guide/memory.md")
    torch.save(page.model.state_dict(), tmp_path / "runs/model_500.pt")
    page.run(0)
    files = at("docs/guide/files.md")
    files.names["run"] = page.names["run"]
    files.run()
    files.names["run"].flush()
    assert steps(node) == [500, 1200]


def test_the_guide_to_built_in_hooks_runs_as_it_is_written(at, node):
    page = at(BUILTIN_HOOKS)
    page.run()
    assert steps(node) == [100, 200]


def test_every_python_block_is_run_by_a_test_above():
    """A new page with Python needs its test; the reference shows signatures only."""
    with_python = {path for path in tree.documents() if pages.blocks(path, "python")}
    with_python -= {"docs/guide/hooks.md"}  # tests/process/test_hooks_guide.py
    with_python -= {"docs/guide/best.md"}  # tests/process/test_best_guide.py
    with_python -= {"docs/reference/hooks.md"}  # tests/unit/hooks/test_documented_example.py
    assert with_python == {
        "README.md",
        "client/README.md",
        "docs/guide/memory.md",
        "docs/guide/files.md",
        BUILTIN_HOOKS,
    }


def commands(path: str) -> Iterator[list[str]]:
    """Every command of a page's shell blocks, as words: the first of each line, and those of ours behind it."""
    for block in pages.blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.commenters, lexer.whitespace_split = "#", True
            parts: list[list[str]] = [[]]
            inner: list[list[str]] = []
            tokens = iter(lexer)
            for token in tokens:
                if token == ">":
                    next(tokens)
                elif token in {";", "|", "&&", "||"}:
                    parts.append([])
                else:
                    parts[-1].append(token)
                    inner += [shlex.split(token[2:-1])] if token.startswith("$(") else []
            said = [part for part in parts if part] + inner
            yield from (words for number, words in enumerate(said) if number == 0 or words[0] in OURS)


@pytest.mark.parametrize("path", [path for path in SAID if pages.blocks(path, "sh")])
def test_every_command_that_a_page_shows_can_be_typed(path, monkeypatch, tmp_path):
    understood: list[str] = []
    monkeypatch.setattr(click.Command, "invoke", lambda _self, context: understood.append(context.command_path))
    targets = re.findall(r"^([a-z-]+):", tree.text("Makefile"), re.MULTILINE)
    for words in commands(path):
        program, given = words[0], [word for word in words[1:] if word != "$"]
        if program == "ckpt":
            before = len(understood)
            with ckpt.make_context("ckpt", given, obj=Globals()) as context:
                ckpt.invoke(context)
            assert len(understood) > before, words
        elif program == "ckptd":
            monkeypatch.chdir(tmp_path)
            supervisor._parse(given)
        elif program == "make":
            assert given[0] in targets, words
        elif program == "pip":
            assert all((tree.ROOT / word / "pyproject.toml").is_file() for word in given[1:]), words
        else:
            assert program == "python" or program.startswith(".venv/bin/"), words


@pytest.mark.parametrize("path", SAID)
def test_every_verb_named_in_running_text_exists(path):
    """`ckpt rebuild DIR` in a sentence is a promise too; placeholders stand for any word."""
    context = ckpt.make_context("ckpt", ["status"], obj=Globals())
    for span in pages.spans(path):
        words = span.split()
        if words[:1] == ["ckpt"] and len(words) > 1 and words[1].islower():
            assert ckpt.get_command(context, words[1]) is not None, span
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", tree.text("Makefile"), re.MULTILINE), span


@pytest.mark.parametrize("path", [path for path in SAID if pages.blocks(path, "toml")])
def test_every_configuration_that_a_page_shows_is_accepted(path):
    for block in pages.blocks(path, "toml"):
        config.Settings.model_validate(tomllib.loads(block))
