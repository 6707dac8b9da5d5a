"""A user's place with and without a daemon, and an experiment in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ckptd_client as ckptd
from ckptd_client import commits, connection, experiment, facts, finder, loader, offers, saver, session
from tests.support.fake_daemon import FakeDaemon

PATIENT_S = 30.0  # a machine that stands still for seconds must not look like a daemon that does


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wants to see what a deaf daemon costs sets the limit in question."""
    for module, limit in (
        (commits, "ANSWER_S"),
        (commits, "RESCUE_AFTER_S"),
        (connection, "HANG_S"),
        (facts, "GIT_S"),
        (finder, "HELLO_S"),
        (offers, "ANSWER_S"),
        (offers, "CONNECT_S"),
        (session, "CLOSE_S"),
    ):
        monkeypatch.setattr(module, limit, PATIENT_S)
    for module in (experiment, loader, saver, session):
        monkeypatch.setattr(module, "OPEN_S", PATIENT_S)


@pytest.fixture(autouse=True)
def no_thread_outlives(patience: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run that was closed follows its saves for half a minute more, in a thread that dials and opens descriptors."""
    made: list[connection.Connection] = []
    begin = connection.Connection.__init__

    def noted(self: connection.Connection, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        made.append(self)

    monkeypatch.setattr(connection.Connection, "__init__", noted)
    yield
    for one in made:
        one.close()


@pytest.fixture
def home(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's place without a daemon."""
    monkeypatch.setenv("CKPTD_DIR", str(short_dir / "state"))
    monkeypatch.setenv("CKPTD_SOCKET", str(short_dir / "s"))
    monkeypatch.setenv("CKPTD_AUTOSTART", "0")
    monkeypatch.delenv("CKPTD_MODE", raising=False)
    return short_dir


@pytest.fixture
def daemon(home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home / "s", spool_dir=str(home / "state" / "spool")) as fake:
        yield fake


@pytest.fixture
def run(home: Path, daemon: FakeDaemon) -> Iterator[ckptd.Experiment]:
    """An experiment with a daemon."""
    experiment = ckptd.Experiment("net", project="vision", dir=home / "runs")
    yield experiment
    experiment.close(timeout_s=5)


@pytest.fixture
def lone(home: Path) -> Iterator[ckptd.Experiment]:
    """An experiment without a daemon."""
    experiment = ckptd.Experiment("net", project="vision", dir=home / "runs")
    yield experiment
    experiment.close(timeout_s=5)
