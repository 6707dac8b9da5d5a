"""Starting a missing daemon: once, detached, and only where the user lets it."""

import os
import sys
import time
from pathlib import Path

import pytest

from ckptd_client import autostart
from ckptd_client.connection import Connection


@pytest.fixture
def installed(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `ckptd` that answers one hello and notes who started it, in a state directory of its own."""
    script = short_dir / "ckptd"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, sys\n"
        "path = os.environ['CKPTD_SOCKET']\n"
        f"note = open({str(short_dir / 'started')!r}, 'a')\n"
        "note.write(f'{os.getppid()} {os.getsid(0) == os.getpid()} {os.getcwd()} {os.environ.get(\"NOTIFY_SOCKET\")}\\n')\n"
        "note.close()\n"
        "print('says hello to its log', flush=True)\n"
        "listening = socket.socket(socket.AF_UNIX); listening.bind(path); listening.listen(8)\n"
        "listening.settimeout(20)\n"
        "peers = []\n"
        "while True:\n"  # until nobody came for a while
        "    peer, _ = listening.accept(); peer.recv(4096); peers.append(peer)\n"
        '    peer.sendall(b\'{"v":1,"id":0,"ok":true,"version":1}\\n\')\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CKPTD_DIR", str(short_dir / "state"))
    monkeypatch.setenv("CKPTD_SOCKET", str(short_dir / "s"))
    monkeypatch.setenv("NOTIFY_SOCKET", "/not/ours")
    monkeypatch.delenv("CKPTD_AUTOSTART", raising=False)
    monkeypatch.setattr(autostart, "command", lambda: [str(script)])
    monkeypatch.setattr(autostart, "START_S", 40.0)  # a busy machine takes its time to start a program
    return short_dir


def test_a_missing_daemon_is_started_detached_from_the_trainer(installed: Path):
    connection = Connection(autostart=True)
    assert connection.wait_up(60)
    parent, _, directory, notify = (installed / "started").read_text().split()
    assert int(parent) != os.getpid(), "the daemon is a child of the trainer"
    assert (directory, notify) == ("/", "None")
    assert "says hello" in (installed / "state" / "ckptd.log").read_text()
    connection.close()


def test_several_processes_start_one_daemon(installed: Path):
    """The ranks of a node begin at the same moment."""
    connections = [Connection(autostart=True) for _ in range(3)]
    for connection in connections:
        connection.start()
    assert all(connection.wait_up(60) for connection in connections)
    for connection in connections:
        connection.close()
    assert len((installed / "started").read_text().splitlines()) == 1


def test_nothing_is_started_where_the_user_forbids_it(installed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CKPTD_AUTOSTART", "0")
    connection = Connection(autostart=True)
    assert not connection.wait_up(60)
    connection.close()
    assert not (installed / "started").exists()


def test_nothing_is_started_at_the_system_s_socket(installed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ckptd_client.places.SYSTEM_SOCKET", str(installed / "s"))
    connection = Connection(autostart=True)
    assert not connection.wait_up(60)
    connection.close()
    assert not (installed / "started").exists()


def test_a_daemon_that_can_t_start_costs_its_bound_once(installed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autostart, "command", lambda: ["/bin/false"])
    monkeypatch.setattr(autostart, "START_S", 0.3)
    monkeypatch.setattr("ckptd_client.connection.BACKOFF_S", 60.0)  # a second try has another reason to fail
    connection = Connection(autostart=True)
    began_s = time.monotonic()
    assert not connection.wait_up(60)
    assert time.monotonic() - began_s < 20
    assert "did not answer" in connection.problem or "timed out" in connection.problem
    connection.close()


def test_the_package_beside_this_interpreter_is_what_gets_started():
    assert autostart.command() == [sys.executable, "-m", "ckptd"]
