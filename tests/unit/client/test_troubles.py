"""What a save promises while the daemon is absent, hung, full or dying: training goes on, nothing is lost."""

import json
import logging
import threading
import time
from pathlib import Path

import pytest

import ckptd_client as ckptd
from ckptd_client import connection as connecting
from ckptd_client import control, facts, finder, saver, spool
from ckptd_client import session as sessions
from tests.support.fake_daemon import FakeDaemon, descriptor_of, files_of
from tests.support.saving import BOUND_S, LONG_S, spooled_image, state, value_in


def test_with_no_daemon_a_save_returns_at_once_and_lies_whole_in_the_spool(home: Path, monkeypatch: pytest.MonkeyPatch):
    """M022, M007: training goes on; what was saved arrives later."""
    monkeypatch.setattr(saver, "OPEN_S", LONG_S)
    lone = ckptd.Experiment("net", dir=home / "r", overlap_wait_s=LONG_S)
    began_s = time.monotonic()
    handle = lone.save(state(3), step=3)
    assert time.monotonic() - began_s < BOUND_S
    assert (handle.level, handle.state, handle.error) == ("none", "pending", None)
    image = spooled_image(home, handle)
    assert handle.spooled
    assert value_in(image) == 3.0
    assert descriptor_of(image)["checkpoint"] == handle.id
    assert json.loads(files_of(image)["state.json"])["v"] == 1
    assert lone.stats()["spooled"] == 1
    lone.close(timeout_s=5)


def test_many_saves_without_a_daemon_are_each_their_own(home: Path, lone: ckptd.Experiment):
    """The memory is one and the same: no save may be overwritten before it is in the spool."""
    handles = [lone.save(state(value), step=value) for value in range(6)]
    assert [value_in(spooled_image(home, handle)) for handle in handles] == [float(v) for v in range(6)]


@pytest.mark.parametrize(("policy", "state_after"), [("skip", "skipped"), ("wait", "failed")])
def test_one_image_at_a_time_is_on_its_way_to_the_spool(
    home: Path, monkeypatch: pytest.MonkeyPatch, policy: str, state_after: str
):
    """A daemon that is away must not cost a trainer one more copy of its state with each save."""
    gate, reached = threading.Event(), threading.Event()
    real = spool.write_arena

    def slow(*arguments: object, **more: object) -> str:
        reached.set()
        assert gate.wait(LONG_S)
        return real(*arguments, **more)

    monkeypatch.setattr(spool, "write_arena", slow)
    run = ckptd.Experiment("net", dir=home / "r", on_overlap=policy, overlap_wait_s=0.2)
    first = run.save(state(1), step=1)
    assert reached.wait(30)
    began_s = time.monotonic()
    second = run.save(state(2), step=2)
    assert time.monotonic() - began_s < BOUND_S
    assert second.state == state_after
    gate.set()
    assert value_in(spooled_image(home, first)) == 1.0
    third = run.save(state(3), step=3)
    assert value_in(spooled_image(home, third)) == 3.0
    run.close(timeout_s=5)


def test_a_daemon_that_accepts_and_never_answers_costs_at_most_the_hello(
    home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    """F22: SIGSTOP looks like this from outside."""
    monkeypatch.setattr(finder, "HELLO_S", 0.3)
    monkeypatch.setattr(saver, "OPEN_S", LONG_S)
    daemon.mute = True
    run = ckptd.Experiment("net", dir=home / "r", overlap_wait_s=LONG_S)
    began_s = time.monotonic()
    first = run.save(state(1), step=1)
    assert time.monotonic() - began_s < BOUND_S
    monkeypatch.setattr(finder, "HELLO_S", LONG_S)
    began_s = time.monotonic()
    second = run.save(state(2), step=2)
    assert time.monotonic() - began_s < BOUND_S, "a daemon known to be hung must cost nothing"
    assert [value_in(spooled_image(home, h)) for h in (first, second)] == [1.0, 2.0]
    daemon.stop()
    run.close(timeout_s=5)


def test_a_daemon_that_stops_while_a_lease_is_asked_for_is_given_up(
    home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connecting, "PING_AFTER_S", 0.2)
    monkeypatch.setattr(connecting, "HANG_S", 0.3)
    run = ckptd.Experiment("net", dir=home / "r", overlap_wait_s=LONG_S)
    daemon.wait_for("experiment.open")
    monkeypatch.setattr(finder, "HELLO_S", 0.3)
    daemon.mute = True
    began_s = time.monotonic()
    handle = run.save(state(1), step=1)
    assert time.monotonic() - began_s < BOUND_S
    assert value_in(spooled_image(home, handle)) == 1.0
    run.close(timeout_s=5)


def test_a_daemon_that_hangs_up_in_the_middle_loses_nothing(home: Path, daemon: FakeDaemon, run: ckptd.Experiment):
    daemon.hang_up_on.add("lease")
    handle = run.save(state(1), step=1)
    assert value_in(spooled_image(home, handle)) == 1.0


def test_no_arena_within_the_bound_goes_to_the_spool(home: Path, daemon: FakeDaemon):
    run = ckptd.Experiment("net", dir=home / "r", overlap_wait_s=0.3)
    daemon.arenas_max = 0
    daemon.wait_for("experiment.open")
    began_s = time.monotonic()
    handle = run.save(state(1), step=1)
    assert 0.2 < time.monotonic() - began_s < BOUND_S
    # the bound is spent: the memory for the spool is free, so the copy itself still happens
    assert value_in(spooled_image(home, handle)) == 1.0
    run.close(timeout_s=5)


def test_a_refused_experiment_spools(home: Path, daemon: FakeDaemon):
    daemon.refuse["experiment.open"] = "not_authorized"
    run = ckptd.Experiment("net", project="vision", dir=home / "runs")
    handle = run.save(state(1), step=1)
    assert value_in(spooled_image(home, handle)) == 1.0
    run.close(timeout_s=5)


def test_a_commit_without_an_answer_is_sent_again_after_a_reconnect(home: Path, daemon: FakeDaemon):
    """The daemon died between the commit and its answer; the arena outlived it."""
    run = ckptd.Experiment("net", dir=home / "r")
    run.prepare(state(1), wait_s=30)
    daemon.silent_on.add("commit")
    handle = run.save(state(6), step=6)
    daemon.wait_for("commit")
    daemon.stop()
    daemon.silent_on.clear()
    daemon.start()
    assert value_in(daemon.wait_staged(handle.id)) == 6.0
    handle.wait("staged", timeout=30)
    assert len(daemon.of("commit")) == 2
    assert len(daemon.of("experiment.open")) == 1, "a reconnect must not open a second segment"
    assert daemon.of("experiment.beat")
    run.close(timeout_s=5)


def test_a_commit_that_the_next_daemon_does_not_know_is_written_to_the_spool(home: Path, daemon: FakeDaemon):
    """Nobody kept the arena's descriptor over the daemon's death; our mapping still has the bytes."""
    run = ckptd.Experiment("net", dir=home / "r")
    run.prepare(state(1), wait_s=30)
    daemon.silent_on.add("commit")
    handle = run.save(state(8), step=8)
    daemon.wait_for("commit")
    daemon.stop()
    daemon.lose_arenas()
    daemon.silent_on.clear()
    daemon.start()
    assert value_in(spooled_image(home, handle)) == 8.0
    run.close(timeout_s=5)


def test_an_unacknowledged_commit_is_in_the_spool_when_the_process_ends(home: Path, daemon: FakeDaemon):
    run = ckptd.Experiment("net", dir=home / "r")
    run.prepare(state(1), wait_s=30)
    daemon.silent_on.add("commit")
    handle = run.save(state(9), step=9)
    daemon.wait_for("commit")
    daemon.stop()
    run.close(timeout_s=30)
    assert value_in(spooled_image(home, handle)) == 9.0


def test_an_arena_lent_again_is_never_spooled_as_the_old_save(home: Path, daemon: FakeDaemon):
    """The answer to a commit was lost, the save was published, the arena lent to someone else: its bytes are theirs."""
    run = ckptd.Experiment("net", dir=home / "r")
    run.prepare(state(1), wait_s=30)
    daemon.silent_on.add("commit")
    handle = run.save(state(9), step=9)
    daemon.wait_for("commit")
    arena = next(a for a in daemon.arenas.values() if a.image()[12] == 3)
    daemon.stop()
    control.write_lease(arena.page, arena.id, arena.generation + 1, 1)
    run.close(timeout_s=30)
    assert not handle.spooled
    assert not list((home / "state" / "spool").glob("*"))


def test_handles_are_followed_again_after_a_reconnect(home: Path, daemon: FakeDaemon, run: ckptd.Experiment):
    handle = run.save(state(1), step=1)
    daemon.wait_staged(handle.id)
    handle.wait("staged", timeout=30)
    daemon.stop()
    daemon.publish(handle.id)  # nobody is connected to hear of it
    daemon.start()
    handle.wait("durable", timeout=30)


@pytest.mark.parametrize(("policy", "state_after"), [("skip", "skipped"), ("spool", "pending")])
def test_an_overlapping_save_does_what_was_asked_for(home: Path, daemon: FakeDaemon, policy: str, state_after: str):
    daemon.arenas_max = 1
    run = ckptd.Experiment("net", dir=home / "r", on_overlap=policy, overlap_wait_s=LONG_S)
    first = run.save(state(1), step=1)
    daemon.wait_staged(first.id)
    began_s = time.monotonic()
    second = run.save(state(2), step=2)
    assert time.monotonic() - began_s < BOUND_S
    assert second.state == state_after
    if policy == "skip":
        assert run.stats()["skipped"] == 1
        with pytest.raises(ckptd.Refused, match="on its way"):
            second.wait(timeout=1)
    else:
        assert value_in(spooled_image(home, second)) == 2.0
    run.close(timeout_s=5)


def test_replace_asks_the_daemon_to_drop_the_oldest_staged_save(home: Path, daemon: FakeDaemon):
    daemon.arenas_max = 1
    run = ckptd.Experiment("net", dir=home / "r", on_overlap="replace")
    first = run.save(state(1), step=1)
    daemon.wait_staged(first.id)
    threading.Thread(
        target=lambda: daemon.wait_for("replace") and daemon.publish(first.id, "staged", "replaced")
    ).start()
    second = run.save(state(2), step=2)
    assert value_in(daemon.wait_staged(second.id)) == 2.0
    assert first.wait_settled(30)
    assert first.state == "replaced"
    run.close(timeout_s=5)


def test_a_waiting_save_takes_the_arena_that_the_publish_before_sets_free(home: Path, daemon: FakeDaemon):
    daemon.arenas_max = 1
    run = ckptd.Experiment("net", dir=home / "r")
    first = run.save(state(1), step=1)
    daemon.wait_staged(first.id)
    timer = threading.Timer(0.2, daemon.publish, (first.id,))
    timer.start()
    second = run.save(state(2), step=2)
    assert value_in(daemon.wait_staged(second.id)) == 2.0
    assert not second.spooled
    timer.join()
    run.close(timeout_s=5)


def test_a_full_spool_fails_the_save_and_not_the_training(home: Path):
    run = ckptd.Experiment("net", dir=home / "r", spool_bytes_max=1000)
    handle = run.save(state(1), step=1)
    assert handle.wait_settled(30)
    assert handle.state == "failed"
    assert "limit" in str(handle.error)
    assert run.stats()["failed"] == 1
    run.close(timeout_s=5)


def test_an_object_that_can_t_be_kept_is_an_error_on_the_handle(
    lone: ckptd.Experiment, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "ckptd"):
        handles = [lone.save({"model": {"hook": object()}}, step=step) for step in range(3)]
    assert all(isinstance(h.error, ckptd.UnsupportedValue) and "hook" in str(h.error) for h in handles)
    assert sum("hook" in record.getMessage() for record in caplog.records) == 1, "logged once, counted always"
    assert lone.stats()["failed"] == 3


def test_raise_errors_lets_it_out(home: Path):
    run = ckptd.Experiment("net", dir=home / "r", raise_errors=True)
    with pytest.raises(ckptd.UnsupportedValue):
        run.save({"x": object()}, step=1)
    run.close()


def test_facts_that_hang_hold_up_neither_the_opening_nor_the_spool(
    home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    """git on a hung disk can't even be killed."""
    gate = threading.Event()
    monkeypatch.setattr(facts, "slow_facts", lambda: {"late": gate.wait(LONG_S)})
    monkeypatch.setattr(sessions, "FACTS_S", 0.1)
    run = ckptd.Experiment("net", dir=home / "r")
    handle = run.save(state(1), step=1)
    assert value_in(daemon.wait_staged(handle.id)) == 1.0
    daemon.stop()
    handle = run.save(state(2), step=2)
    run.close(timeout_s=30)
    assert handle.spooled or value_in(daemon.wait_staged(handle.id)) == 2.0
    gate.set()


def test_a_refused_experiment_is_tried_again(home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
    """The root was added, the disk was mounted: nobody restarts a training for that."""
    monkeypatch.setattr(sessions, "BEAT_S", 0.1)
    daemon.refuse["experiment.open"] = "not_authorized"
    began_s = time.monotonic()
    run = ckptd.Experiment("net", dir=home / "r")
    daemon.wait_for("experiment.open")
    daemon.refuse.clear()
    daemon.wait_for("experiment.open", 2)
    # The second request may have been on its way when the refusal was lifted: then the third one opens it.
    assert any(run.prepare(state(1), wait_s=5) or time.sleep(0.1) for _ in range(50))
    most = 5 + 2 * (time.monotonic() - began_s) / sessions.BEAT_S
    assert len(daemon.of("experiment.open")) < most, "it asks without a pause"
    run.close(timeout_s=5)
