"""Fixtures: run the command line in this process against a daemon that says what the wire's reference page shows."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptd.cli import main, render
from tests.support.canned_daemon import CannedDaemon

PAGE = Path(__file__).parents[3] / "docs/reference/wire-control.md"
TERMINAL = render.Screen(terminal=True, colour=False, columns=160, lines=1000)


def documented() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return (requests, replies) by operation: the JSON examples of docs/reference/wire-control.md."""
    requests: dict[str, dict[str, Any]] = {}
    replies: dict[str, dict[str, Any]] = {}
    checkpoint: dict[str, Any] = {}
    op = ""
    for block in re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL):
        body = json.loads(block)
        if "op" in body:
            op = body["op"]
            requests[op] = body
        elif op == "hello":
            checkpoint = body
        elif "push" not in body:
            replies.setdefault(op, body)
    replies["unpin"] = replies["pin"]
    replies["list"] = {"checkpoints": [checkpoint], "next": None}
    replies["show"]["checkpoint"] = checkpoint
    replies["show"]["experiment"] = replies["experiments"]["experiments"][0]
    return requests, replies


@dataclass
class Ran:
    """What one run of `ckpt` came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def replies() -> dict[str, Any]:
    """The documented replies; a test changes what it is about, before or while the daemon runs."""
    return documented()[1]


@pytest.fixture
def daemon(short_dir: Path, replies: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedDaemon]:
    """A daemon that the command line finds by CKPTD_SOCKET."""
    with CannedDaemon(short_dir / "s", replies) as running:
        monkeypatch.setenv("CKPTD_SOCKET", running.path)
        yield running


@pytest.fixture(autouse=True)
def _own_places(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may see a daemon, a catalog or a configuration of the machine it runs on."""
    for variable in ("NO_COLOR", "FORCE_COLOR", "CKPTD_CONFIG", "CKPTD_DEBUG", "PAGER", "CKPTD_PAGER"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CKPTD_SOCKET", str(short_dir / "absent"))
    monkeypatch.setenv("CKPTD_DIR", str(short_dir / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(short_dir / "config"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `ckpt` with these words, output into a pipe."""

    def ckpt(*words: str) -> Ran:
        capsys.readouterr()
        code = main(words)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return ckpt


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make standard output a terminal of 160 columns without colours, as far as the command line can tell."""
    monkeypatch.setattr(render.Screen, "detect", classmethod(lambda cls, **_: TERMINAL))
