"""What is read by the daemon's leave: each load has a name, which is given back once and heard of, whatever breaks."""

import gc
import time
from pathlib import Path
from typing import Any

import pytest

import ckptd_client as ckptd
from ckptd_client import hot, loader
from tests.support.fake_daemon import FakeDaemon
from tests.support.saving import state
from tests.unit.client.test_loading import hot_reply, saved

PATIENCE_S = 30.0


@pytest.fixture
def daemon(daemon: FakeDaemon) -> FakeDaemon:
    daemon.arenas_max = 8
    return daemon


def names(daemon: FakeDaemon, op: str) -> list[str]:
    return [str(request.get("read")) for request in daemon.of(op)]


def eventually(run: ckptd.Experiment, condition: Any) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        run._session.connection.tick_within(0.0)
        time.sleep(0.02)


def test_two_mappings_of_one_checkpoint_are_given_back_each_by_its_own_name(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else the daemon counts a reader more than there is, and the arena is out of use until this process ends."""
    monkeypatch.setattr(hot, "OWN_AFTER_S", 1000.0)
    checkpoint, directory, image = saved(run, daemon, home, 5)
    daemon.attach_reply = hot_reply(checkpoint, image, directory)
    first, second = run.load(), run.load(keys=["epoch", "model"])
    assert first is not None
    assert second is not None
    one, two = names(daemon, "attach")
    assert one != two
    del first
    gc.collect()
    eventually(run, lambda: names(daemon, "detach") == [one])
    del second
    gc.collect()
    eventually(run, lambda: names(daemon, "detach") == [one, two])
    assert {request["checkpoint"] for request in daemon.of("detach")} == {checkpoint}, "an older daemon knows no names"


def test_a_load_that_got_no_answer_in_time_is_given_back_all_the_same(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
):
    """The daemon may have held it, and would hold it for as long as this process lives."""
    saved(run, daemon, home, 5)
    monkeypatch.setattr(loader, "ATTACH_S", 0.1)
    daemon.silent_on.add("attach")
    assert run.load() is not None, "the disk has it"
    assert [request["read"] for request in daemon.wait_for("detach")] == names(daemon, "attach")


@pytest.mark.parametrize("when", ["attach", "detach"])
def test_what_the_daemon_did_not_hear_is_told_again_over_the_next_connection(
    run: ckptd.Experiment, daemon: FakeDaemon, home: Path, when: str
):
    checkpoint, directory, _ = saved(run, daemon, home, 5)
    daemon.attach_reply = {"checkpoint": checkpoint, "path": str(directory), "hot": False, "files": None}
    daemon.hang_up_on.add(when)
    assert run.load() is not None
    daemon.wait_for(when)
    # With the first it may be back, and have told it, before the checkpoint was read from the disk.
    unheard = len(daemon.of("detach")) if when == "detach" else 0
    daemon.hang_up_on.clear()
    eventually(run, lambda: not run._session.reads.are_open())
    assert len(daemon.of("detach")) > unheard
    assert set(names(daemon, "detach")) == set(names(daemon, "attach"))


@pytest.mark.parametrize("code", ["not_found", "busy"])
def test_what_was_refused_is_not_given_back(run: ckptd.Experiment, daemon: FakeDaemon, code: str):
    daemon.refuse["attach"] = code
    assert run.load() is None
    assert not run._session.reads.are_open()
    assert not daemon.of("detach")


def test_a_run_that_ended_hangs_up_when_the_daemon_has_heard_that_nothing_is_read(
    home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    """A process lives on after its run: what that had mapped would be kept from the saves of the next one."""
    monkeypatch.setattr(hot, "OWN_AFTER_S", 1000.0)
    run = ckptd.Experiment("net", project="vision", dir=home / "runs")
    checkpoint, directory, image = saved(run, daemon, home, 5)
    daemon.attach_reply = hot_reply(checkpoint, image, directory)
    loaded = run.load()
    run.close(timeout_s=5)
    session = run._session
    for _ in range(5):
        session._close_when_settled()
        time.sleep(0.02)
    assert session.connection.is_up, "it is mapped still"
    assert loaded is not None
    del loaded
    gc.collect()
    eventually(run, lambda: not session.connection.is_up)
    assert names(daemon, "detach") == names(daemon, "attach")


def test_a_save_that_gets_no_memory_says_in_the_daemons_words_why(
    run: ckptd.Experiment, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
):
    """What to do about it stands in the hint, and nobody else would ever read it."""
    daemon.refuse["lease"] = "no_arena"
    run.save(state(1), step=1)
    assert "the daemon lends no arena (no_arena: refused by the test: no_arena)" in caplog.text
