"""What a daemon that stands could not be told at once: it is told as soon as that is possible."""

from collections.abc import Callable
from pathlib import Path

import pytest

import ckptd_client as ckptd
from ckptd_client import channel, control
from ckptd_client import connection as connecting
from ckptd_client import session as sessions
from ckptd_client.connection import Connection
from tests.support.fake_daemon import FakeDaemon
from tests.support.node import eventually
from tests.support.saving import state, value_in


@pytest.fixture
def clog(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Returns a switch: whether the daemon reads so little that nothing more may be queued for it."""
    room = channel.OUTBOX_BYTES_MAX

    def switch(is_full: bool) -> None:  # noqa: FBT001 - a switch
        monkeypatch.setattr(channel, "OUTBOX_BYTES_MAX", 0 if is_full else room)

    return switch


def test_a_commit_that_could_not_be_queued_is_sent_while_the_connection_stands(
    daemon: FakeDaemon, run: ckptd.Experiment, clog: Callable[[bool], None]
):
    assert run.prepare(state(1), wait_s=30)
    clog(True)
    handle = run.save(state(3), step=3)
    assert not daemon.of("commit")
    clog(False)
    assert value_in(daemon.wait_staged(handle.id)) == 3.0
    handle.wait("staged", timeout=30)
    assert daemon.connections == 1


def test_what_is_given_back_and_could_not_be_queued_is_told_while_the_connection_stands(
    daemon: FakeDaemon, run: ckptd.Experiment, clog: Callable[[bool], None]
):
    assert run.prepare(state(1), wait_s=30)
    leases = run._session.leases
    lease, _ = leases.take(1, 0)
    assert lease is not None
    clog(True)
    leases.give_back(lease)
    assert leases.is_unheard()
    clog(False)
    daemon.wait_for("abandon")
    eventually(lambda: not leases.is_unheard(), "heard")
    assert daemon.connections == 1


def test_a_commit_without_an_answer_is_sent_again_although_something_fails_at_the_next_hello(
    daemon: FakeDaemon, run: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
):
    """It was sent once more only if all that a hello sets off before it went well."""
    assert run.prepare(state(1), wait_s=30)
    daemon.silent_on.add("commit")
    handle = run.save(state(3), step=3)
    daemon.wait_for("commit")

    def fails() -> None:
        raise ValueError("a bug of ours")

    monkeypatch.setattr(run._session._stream, "up", fails)
    daemon.stop()
    daemon.silent_on.clear()
    daemon.start()
    assert value_in(daemon.wait_staged(handle.id)) == 3.0


def test_requests_of_other_kinds_do_not_keep_a_commit_back(
    daemon: FakeDaemon, run: ckptd.Experiment, monkeypatch: pytest.MonkeyPatch
):
    assert run.prepare(state(1), wait_s=30)
    monkeypatch.setattr(connecting, "PENDING_MAX", 0)
    handle = run.save(state(3), step=3)
    assert value_in(daemon.wait_staged(handle.id)) == 3.0


def test_a_save_that_neither_the_daemon_nor_the_spool_takes_is_offered_to_both_again(
    daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ckptd_client.commits.RESCUE_AFTER_S", 0.2)
    monkeypatch.setattr(sessions, "BEAT_S", 0.1)
    run = ckptd.Experiment("net", dir=home / "r", spool_bytes_max=1000)
    assert run.prepare(state(1), wait_s=30)
    daemon.refuse["commit"] = "no_arena"
    handle = run.save(state(5), step=5)
    daemon.wait_for("commit", 2)
    daemon.refuse.clear()
    assert value_in(daemon.wait_staged(handle.id)) == 5.0
    assert not handle.spooled
    run.close(timeout_s=5)


def test_a_run_that_ends_while_the_daemon_is_away_gives_its_memory_back_when_it_returns(home: Path, daemon: FakeDaemon):
    run = ckptd.Experiment("net", dir=home / "r")
    assert run.prepare(state(1), wait_s=30)
    for arena in daemon.arenas.values():
        arena.holder = None  # what a daemon knows of a lease after its own restart: the process, not the connection
    daemon.stop()
    run.close(timeout_s=5)
    daemon.start()
    eventually(lambda: all(arena.use == "free" for arena in daemon.arenas.values()), "given back")
    eventually(lambda: daemon.connections == 0, "hung up")


def test_what_was_given_back_without_an_answer_is_told_again_to_the_next_daemon(
    daemon: FakeDaemon, run: ckptd.Experiment
):
    assert run.prepare(state(1), wait_s=30)
    lease, _ = run._session.leases.take(1, 0)
    assert lease is not None
    daemon.silent_on.add("abandon")
    run._session.leases.give_back(lease)
    daemon.wait_for("abandon")
    daemon.stop()
    daemon.silent_on.clear()
    daemon.start()
    daemon.wait_for("abandon", 2)
    eventually(lambda: not run._session.leases.is_unheard(), "heard")
    assert control.read(lease.arena.buffer).state == control.FREE


def test_a_connection_whose_thread_could_not_be_started_says_so_and_tries_again(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_thread: object) -> None:
        raise RuntimeError("can't start new thread")

    connection = Connection(str(daemon.path))
    with monkeypatch.context() as without:
        without.setattr("threading.Thread.start", refuse)
        assert not connection.wait_up(30)
        assert "no thread" in connection.problem
    connection.start()
    eventually(lambda: connection.is_up, "up")
    connection.close()
