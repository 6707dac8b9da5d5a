"""Fixtures: run the command line in this process against a daemon that says what the wire's reference page shows."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptd.cli import main, render
from tests.support.canned_daemon import CannedDaemon
from tests.support.documented_wire import documented

TERMINAL = render.Screen(terminal=True, colour=False, columns=160, lines=1000)


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
