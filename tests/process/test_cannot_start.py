"""A daemon that can't start is named, with the way out, by everything that people type; mended, it is forgotten. F19"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.node import Node, eventually, is_alive

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def noise(catalog: Path) -> None:
    raw = catalog.read_bytes()
    catalog.write_bytes(os.urandom(4096) + raw[4096:])


def newer(catalog: Path) -> None:
    with sqlite3.connect(catalog) as other:
        other.execute("UPDATE alembic_version SET version_num = '9999'")
    other.close()


COMMANDS = {("doctor", "-q"): 1, ("status",): 5, ("status", "--probe"): 1}
DAMAGES = [
    pytest.param(noise, "is damaged", "ckpt rebuild", id="noise"),
    pytest.param(newer, "9999", "upgrade ckptd", id="newer", marks=pytest.mark.faults),
]


def said(node: Node, *commands: tuple[str, ...]) -> dict[tuple[str, ...], tuple[int, str]]:
    """Run the real `ckpt`, all at once; return exit codes and all that was printed."""
    program = [str(Path(sys.executable).with_name("ckpt")), "--socket", str(node.socket), "--timeout", "3s"]
    started = {
        words: subprocess.Popen([*program, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for words in commands
    }
    told = {words: process.communicate(timeout=60)[0] for words, process in started.items()}
    return {words: (process.returncode, told[words]) for words, process in started.items()}


@pytest.mark.parametrize(("damage", "reason", "advice"), DAMAGES)
def test_a_catalog_that_no_daemon_takes_is_named_until_one_does(
    node: Node, damage: Callable[[Path], None], reason: str, advice: str
) -> None:
    """F19. The supervisor holds the socket and tries again and again: connecting succeeds, and nobody answers."""
    node.start()
    assert node.stop() == 0
    catalog, words = node.state / "catalog.sqlite", node.dir / "sock.error"
    sound = catalog.read_bytes()
    assert not words.exists()
    damage(catalog)
    node.start(ready=False)
    eventually(words.exists, "the reason")
    for command, (ended, told) in said(node, *COMMANDS).items():
        assert ended == COMMANDS[command], told
        assert reason in told
        assert "the last one ended" in told
        assert advice in told or "--probe" in command
    catalog.write_bytes(sound)
    node.status()
    eventually(lambda: not words.exists(), "the words to be taken back")
    assert said(node, ("status",))["status",][0] == 0


def test_a_configuration_that_no_daemon_takes_is_named_when_everything_has_ended(node: Node) -> None:
    """The supervisor ends as well, and the socket goes with it."""
    node.more = '[web]\nport = "lots of"'
    node.start(ready=False)
    assert node.ended() == 78
    assert not node.socket.exists()
    for command, (ended, told) in said(node, *COMMANDS).items():
        assert ended == COMMANDS[command], told
        assert str(node.dir / "toml") in told
    node.more = ""
    node.start()
    assert not (node.dir / "sock.error").exists()


def test_a_daemon_that_dies_before_it_can_say_why_is_named_all_the_same(node: Node) -> None:
    """An upgrade that was cut short: nothing of it can be loaded. Its supervisor speaks for it, and for what killed it."""
    broken = node.dir / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import os\nif 'ckptd.daemon' in os.sys.orig_argv: os.kill(os.getpid(), 9)\n"
    )
    node.prefix = ("env", f"PYTHONPATH={broken}")
    node.start(ready=False)
    eventually((node.dir / "sock.error").exists, "the reason")
    ended, told = said(node, ("status",))["status",]
    assert ended == 5
    assert "the daemon ended with signal 9 before it served" in told


def test_a_command_that_refuses_to_supervise_leaves_word_where_nobody_serves_and_nowhere_else(node: Node) -> None:
    """A trainer's client that starts a missing daemon reads nothing of what it says."""
    node.configure("this is no TOML")
    words = node.dir / "sock.error"
    command = [sys.executable, "-P", "-m", "ckptd", *node.command()[3:]]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 78
    ended, told = said(node, ("status",))["status",]
    assert ended == 5
    assert str(node.dir / "toml") in told
    node.more = ""
    node.start()
    assert not words.exists()
    node.configure("this is no TOML")
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 78
    assert not words.exists(), "that daemon is well"


def test_going_to_the_background_says_why_it_can_not_be_done_after_a_few_tries(node: Node) -> None:
    node.start()
    assert node.stop() == 0
    noise(node.state / "catalog.sqlite")
    environ = {**os.environ, "NODE_TIMING": json.dumps(node.timing)}
    done = subprocess.run(
        node.command("--detach"),
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    holder = int((node.state / "supervisor.lock").read_text())
    try:
        told = done.stderr.decode()
        assert done.returncode == 1
        assert "can't start, and goes on trying: the catalog" in told
        assert "ckpt rebuild" in told
        assert "ckptd.log" in told
    finally:
        os.kill(holder, signal.SIGTERM)
        eventually(lambda: not is_alive(holder), "the supervisor's end")
