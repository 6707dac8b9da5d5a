"""Somebody listens and nobody answers: every command says why the last daemon ended, in seconds. M162"""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.cli import daemon_socket, watching
from ckptd.errors import BadConfig, CatalogFault
from ckptd.intake import lastwords
from tests.support.canned_daemon import HANG_UP, HELLO, CannedDaemon

DAMAGED = CatalogFault("the catalog is:\n  damaged\n  and old", hint="move it aside")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_socket, "GREETING_S", 0.2)
    monkeypatch.setattr(daemon_socket, "_LOOK_S", 0.05)


@pytest.fixture
def door(short_dir: Path) -> Iterator[str]:
    """A socket that a service manager holds, with no daemon behind it."""
    path = str(short_dir / "absent")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        (short_dir / "absent").chmod(0o600)
        listening.listen(16)
        yield path


def test_doctor_names_what_keeps_the_daemon_from_starting_and_what_to_do(run, door):
    lastwords.leave(door, DAMAGED)
    ran = run("doctor", "--json")
    assert ran.code == 1
    (check,) = [check for check in ran.json["checks"] if check["name"] == "daemon"]
    assert check["status"] == "fail"
    assert check["detail"].startswith(f"no daemon answers at {door}; the last one ended ")
    assert check["detail"].endswith("the catalog is: damaged; and old")
    assert check["hint"] == "move it aside; another is started by itself, again and again"


@pytest.mark.parametrize("words", [["status"], ["ls"], ["show", "latest"], ["wait", "latest"], ["rebuild"], ["stop"]])
def test_every_command_says_it_and_ends_as_without_a_daemon(run, door, words):
    lastwords.leave(door, DAMAGED)
    ran = run(*words)
    assert ran.code == 5
    assert "the catalog is: damaged; and old [unreachable]" in ran.err
    assert "hint: move it aside" in ran.err


def test_a_probe_has_it_in_its_one_line(run, door):
    lastwords.leave(door, DAMAGED)
    ran = run("status", "--probe")
    assert ran.code == 1
    assert len(ran.out.splitlines()) == 1
    assert "the catalog is: damaged; and old" in ran.out


def test_a_program_gets_the_daemons_own_error_as_the_cause(run, door):
    lastwords.leave(door, DAMAGED)
    ran = run("status", "--json")
    assert '"code": "unreachable"' in ran.err
    assert '"cause": {"code": "catalog_fault", "message": "the catalog is:\\n  damaged\\n  and old"' in ran.err


def test_what_needs_no_daemon_goes_on_without_one(run, door, short_dir):
    """A save must not wait until somebody has mended the catalog."""
    lastwords.leave(door, DAMAGED)
    (short_dir / "last.ckpt").write_bytes(b"weights")
    assert run("submit", str(short_dir / "last.ckpt"), "--spool").code == 0
    assert len(list((short_dir / "state" / "spool").iterdir())) == 1


def test_the_supervisor_that_tries_again_can_be_stopped_by_its_number(run, door, monkeypatch):
    monkeypatch.setattr(lastwords, "_keeper", lambda _: 4711)
    lastwords.leave(door, DAMAGED)
    assert "`kill 4711` stops that" in run("status").err


def test_a_daemon_that_answers_late_is_believed_more_than_the_one_before_it(run, short_dir, replies, monkeypatch):
    """The next one may be starting: what is left of the last one is no answer yet."""
    monkeypatch.setattr(daemon_socket, "GREETING_S", 20.0)
    place = str(short_dir / "absent")
    lastwords.leave(place, DAMAGED)

    def late(_request):
        time.sleep(0.4)
        return HELLO

    with CannedDaemon(short_dir / "absent", {**replies, "hello": late}):
        assert run("doctor").code == 0


@pytest.mark.parametrize("words", [["log", "-f"], ["wait", "latest"]])
def test_whoever_follows_a_daemon_that_can_not_start_again_is_told_when_it_stays_away(
    run, door, short_dir, monkeypatch, words
):
    """Connecting succeeds each time: that alone must not be taken for a daemon that is back."""
    monkeypatch.setattr(watching, "AWAY_S", 0.3)
    monkeypatch.setattr(watching, "AWAY_PAUSE_S", 0.05)
    lastwords.leave(door, DAMAGED)
    first = CannedDaemon(short_dir / "first", {"events": HANG_UP, "wait": HANG_UP})
    real, dialled = daemon_socket.connect, []

    def once_well(**given):
        dialled.append(1)
        monkeypatch.setenv("CKPTD_SOCKET", first.path if len(dialled) == 1 else door)
        return real(**given)

    monkeypatch.setattr(watching, "connect", once_well)
    with first:
        ran = run(*words)
    assert ran.code == 5
    assert "the catalog is: damaged; and old [unreachable]" in ran.err
    assert 1 < len(dialled) < 10, "each connection counted as a daemon that is back"


def test_without_any_word_the_wait_is_the_whole_timeout_and_the_log_is_named(run, door):
    ran = run("status", "--timeout", "300ms")
    assert ran.code == 6
    assert "did not answer 'hello' in time [timeout]" in ran.err
    assert "its log says which" in ran.err
    assert "ckpt status" not in ran.err


def test_with_no_socket_left_the_reason_is_told_as_well(run, short_dir):
    """The supervisor ends with a daemon whose configuration is wrong, and takes the socket away."""
    lastwords.leave(str(short_dir / "absent"), BadConfig("a typo", hint="mend it"))
    ran = run("status")
    assert ran.code == 5
    assert "no daemon answers: " in ran.err
    assert "the last one ended" in ran.err
    assert "a typo" in ran.err
    assert "hint: mend it; then start one with `ckptd`" in ran.err
