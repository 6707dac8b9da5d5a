"""Experiment against a small real daemon: the promises of a save, whatever the daemon does."""

import gc
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors

import ckptd_client as ckptd
from ckptd_client import connection as connecting
from ckptd_client import finder, spool
from tests.support.fake_daemon import FakeDaemon, descriptor_of, files_of

BOUND_S = 3.0  # far below overlap_wait_s, far above what a loaded test machine needs


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


def state(value: float, size: int = 1000) -> dict[str, object]:
    return {"model": {"w": torch.full((size,), float(value)), "b": torch.arange(size)}, "epoch": int(value)}


def value_in(image: bytes) -> float:
    """The one value that fills `w`; fails when two states were mixed."""
    w = load_safetensors(files_of(image)["model.safetensors"])["w"]
    assert w.unique().numel() == 1, "the image mixes two states"
    return float(w[0])


def spooled_image(home: Path, handle: ckptd.Handle) -> bytes:
    assert handle.wait_settled(10)
    return Path(spool.arena_path(str(home / "state" / "spool"), handle.id)).read_bytes()


# the warm path ------------------------------------------------------------------------------


def test_a_prepared_save_needs_no_answer_from_the_daemon(run: ckptd.Experiment, daemon: FakeDaemon):
    """An arena is waiting, so a daemon that stops answering can't delay the save at all."""
    assert run.prepare(state(1), wait_s=5)
    daemon.mute = True
    began_s = time.monotonic()
    handle = run.save(state(1), step=1)
    assert time.monotonic() - began_s < 0.5
    assert handle.error is None
    arena = next(a for a in daemon.arenas.values() if a.image()[12] == 3)
    assert value_in(arena.image()) == 1.0
    daemon.stop()


def test_two_saves_in_a_row_hold_exactly_their_own_tensors(run: ckptd.Experiment, daemon: FakeDaemon):
    live = {"model": {"w": torch.zeros(200_000)}}
    assert run.prepare(live, wait_s=5)
    handles = []
    for step in (1, 2):
        live["model"]["w"].fill_(step)
        handles.append(run.save(live, step=step))
    live["model"]["w"].fill_(99)
    assert [value_in(daemon.wait_staged(handle.id)) for handle in handles] == [1.0, 2.0]


def test_a_save_says_everything_a_daemon_needs_to_make_its_rows(home: Path, daemon: FakeDaemon):
    """M007, M028: a daemon that never heard of the experiment can admit the image by itself."""
    run = ckptd.Experiment("net", project="vision", config={"lr": 0.1, "api_key": "x"}, tags=["t"], dir=home / "r")
    handle = run.save(state(4), 40, 2.5, {"loss": float("nan"), "acc": 0.5}, note="n", meta={"k": [1]})
    found = descriptor_of(daemon.wait_staged(handle.id))
    assert handle.wait("staged", timeout=5).level == "staged"
    experiment = found["experiment"]
    assert (found["checkpoint"], found["step"], found["epoch"]) == (handle.id, 40, 2.5)
    assert found["metrics"] == {"loss": "NaN", "acc": 0.5}
    assert (found["note"], found["meta"], found["update_best"]) == ("n", {"k": [1]}, True)
    assert (experiment["id"], experiment["name"], experiment["project"]) == (run.id, "net", "vision")
    assert (experiment["dir"], experiment["tags"]) == (str(home / "r"), ["t"])
    assert experiment["config"] == {"lr": 0.1, "api_key": "***"}
    assert experiment["facts"]["pid"] == os.getpid()
    assert [f["path"] for f in found["files"]] == ["model.safetensors", "state.json"]
    run.close()


def test_the_next_arena_is_asked_for_with_the_commit(run: ckptd.Experiment, daemon: FakeDaemon):
    """So that the save after this one finds it ready: that is what makes a save one memcpy."""
    run.save(state(1), step=1)
    daemon.wait_for("commit")
    ops = [r["op"] for r in daemon.wait_for("lease", 1) and daemon.requests if r["op"] in ("lease", "commit")]
    daemon.wait_leased(1)
    assert ops[0] == "lease"
    assert run._session.leases.wait_ready(5)
    handle = run.save(state(2), step=2)
    assert value_in(daemon.wait_staged(handle.id)) == 2.0


def test_an_arena_is_reused_under_a_new_generation_only(run: ckptd.Experiment, daemon: FakeDaemon):
    daemon.arenas_max = 1
    generations = []
    for step in range(4):
        handle = run.save(state(step), step=step)
        image = daemon.wait_staged(handle.id)
        generations.append(int.from_bytes(image[16:24], "little"))
        assert value_in(image) == float(step)
        daemon.publish(handle.id)
        handle.wait("durable", timeout=5)
    assert generations == [1, 2, 3, 4]
    assert len(run._session.leases._mapped) == 1, "the arena was mapped again instead of being reused"


def test_a_handle_climbs_with_the_daemon_s_pushes(run: ckptd.Experiment, daemon: FakeDaemon):
    seen: list[str] = []
    handle = run.save(state(1), step=7)
    handle.add_done_callback(lambda h: seen.append(h.level))
    daemon.wait_staged(handle.id)
    daemon.publish(handle.id)
    assert handle.wait(timeout=5) is handle
    assert (handle.level, handle.state, handle.path) == ("durable", "live", f"/runs/{handle.id}")
    daemon.publish(handle.id, "verified")
    handle.wait("verified", timeout=5)
    assert seen == ["durable"]


def test_a_failed_checkpoint_raises_what_the_daemon_said(run: ckptd.Experiment, daemon: FakeDaemon):
    handle = run.save(state(1), step=1)
    daemon.wait_staged(handle.id)
    daemon.publish(handle.id, "staged", "failed", error={"code": "no_space", "message": "full", "hint": "free space"})
    with pytest.raises(ckptd.Refused, match="full") as caught:
        handle.wait("durable", timeout=5)
    assert caught.value.code == "no_space"
    assert run.stats()["failed"] == 1


def test_waiting_has_a_limit(run: ckptd.Experiment, daemon: FakeDaemon):
    handle = run.save(state(1), step=1)
    with pytest.raises(ckptd.TimedOut):
        handle.wait("durable", timeout=0.05)
    with pytest.raises(ValueError, match="level='done'"):
        handle.wait("done")


def test_an_arena_the_daemon_wants_back_is_given_back_unused(run: ckptd.Experiment, daemon: FakeDaemon):
    assert run.prepare(state(1), wait_s=5)
    daemon.wait_leased(2)
    name = next(iter(daemon.arenas))
    daemon.push({"push": "reclaim", "arena": name})
    assert daemon.wait_for("abandon")[0]["arena"] == name
    assert daemon.arenas[name].use == "free"
    handle = run.save(state(5), step=1)
    assert value_in(daemon.wait_staged(handle.id)) == 5.0


def test_a_larger_state_gets_a_larger_arena(run: ckptd.Experiment, daemon: FakeDaemon):
    daemon.arenas_max = 4
    first = run.save(state(1), step=1)
    daemon.wait_staged(first.id)
    second = run.save(state(2, size=500_000), step=2)
    assert value_in(daemon.wait_staged(second.id)) == 2.0


# troubles -----------------------------------------------------------------------------------


def test_with_no_daemon_a_save_returns_at_once_and_lies_whole_in_the_spool(home: Path, lone: ckptd.Experiment):
    """M022, M007: training goes on; what was saved arrives later."""
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


def test_many_saves_without_a_daemon_are_each_their_own(home: Path, lone: ckptd.Experiment):
    """The memory is one and the same: no save may be overwritten before it is in the spool."""
    handles = [lone.save(state(value), step=value) for value in range(6)]
    assert [value_in(spooled_image(home, handle)) for handle in handles] == [float(v) for v in range(6)]


def test_a_daemon_that_accepts_and_never_answers_costs_at_most_the_hello(
    home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    """F22: SIGSTOP looks like this from outside."""
    monkeypatch.setattr(finder, "HELLO_S", 0.3)
    daemon.mute = True
    run = ckptd.Experiment("net", dir=home / "r")
    began_s = time.monotonic()
    first = run.save(state(1), step=1)
    assert time.monotonic() - began_s < BOUND_S
    began_s = time.monotonic()
    second = run.save(state(2), step=2)
    assert time.monotonic() - began_s < 0.5, "a daemon known to be hung must cost nothing"
    assert [value_in(spooled_image(home, h)) for h in (first, second)] == [1.0, 2.0]
    run.close(timeout_s=5)


def test_a_daemon_that_stops_while_a_lease_is_asked_for_is_given_up(
    home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connecting, "PING_AFTER_S", 0.2)
    monkeypatch.setattr(connecting, "HANG_S", 0.3)
    monkeypatch.setattr(finder, "HELLO_S", 0.3)
    run = ckptd.Experiment("net", dir=home / "r")
    daemon.wait_for("experiment.open")
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


def test_a_refused_experiment_spools(home: Path, daemon: FakeDaemon, run: ckptd.Experiment):
    daemon.refuse["experiment.open"] = "not_authorized"
    handle = run.save(state(1), step=1)
    assert value_in(spooled_image(home, handle)) == 1.0


def test_a_commit_without_an_answer_is_sent_again_after_a_reconnect(home: Path, daemon: FakeDaemon):
    """The daemon died between the commit and its answer; the arena outlived it."""
    run = ckptd.Experiment("net", dir=home / "r")
    run.prepare(state(1), wait_s=5)
    daemon.silent_on.add("commit")
    handle = run.save(state(6), step=6)
    daemon.wait_for("commit")
    daemon.stop()
    daemon.silent_on.clear()
    daemon.start()
    assert value_in(daemon.wait_staged(handle.id)) == 6.0
    handle.wait("staged", timeout=5)
    assert len(daemon.of("commit")) == 2
    assert len(daemon.of("experiment.open")) == 1, "a reconnect must not open a second segment"
    assert daemon.of("experiment.beat")
    run.close(timeout_s=5)


def test_a_commit_that_the_next_daemon_does_not_know_is_written_to_the_spool(home: Path, daemon: FakeDaemon):
    """Nobody kept the arena's descriptor over the daemon's death; our mapping still has the bytes."""
    run = ckptd.Experiment("net", dir=home / "r")
    run.prepare(state(1), wait_s=5)
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
    run.prepare(state(1), wait_s=5)
    daemon.silent_on.add("commit")
    handle = run.save(state(9), step=9)
    daemon.wait_for("commit")
    daemon.stop()
    run.close(timeout_s=10)
    assert value_in(spooled_image(home, handle)) == 9.0


def test_an_arena_lent_again_is_never_spooled_as_the_old_save(home: Path, daemon: FakeDaemon):
    """The answer to a commit was lost, the save was published, the arena lent to someone else: its bytes are theirs."""
    run = ckptd.Experiment("net", dir=home / "r")
    run.prepare(state(1), wait_s=5)
    daemon.silent_on.add("commit")
    handle = run.save(state(9), step=9)
    daemon.wait_for("commit")
    arena = next(a for a in daemon.arenas.values() if a.image()[12] == 3)
    daemon.stop()
    from ckptd_client import control

    control.write_lease(arena.page, arena.id, arena.generation + 1, 1)
    run.close(timeout_s=10)
    assert not handle.spooled
    assert not list((home / "state" / "spool").glob("*"))


def test_handles_are_followed_again_after_a_reconnect(home: Path, daemon: FakeDaemon, run: ckptd.Experiment):
    handle = run.save(state(1), step=1)
    daemon.wait_staged(handle.id)
    handle.wait("staged", timeout=5)
    daemon.stop()
    daemon.publish(handle.id)  # nobody is connected to hear of it
    daemon.start()
    handle.wait("durable", timeout=10)


@pytest.mark.parametrize(("policy", "state_after"), [("skip", "skipped"), ("spool", "pending")])
def test_an_overlapping_save_does_what_was_asked_for(home: Path, daemon: FakeDaemon, policy: str, state_after: str):
    daemon.arenas_max = 1
    run = ckptd.Experiment("net", dir=home / "r", on_overlap=policy)
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
    assert handle.wait_settled(5)
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


# arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "name=''"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"name": ".hidden"}, "name='.hidden'"),
        ({"name": "n", "project": "p\n"}, "project="),
        ({"name": "n", "tags": "abc"}, "tags='abc'"),
        ({"name": "n", "tags": [""]}, "tags=''"),
        ({"name": "n", "dir": ""}, "dir=''"),
        ({"name": "n", "resume": "maybe"}, "resume='maybe' must be one of allow, never, must"),
        ({"name": "n", "on_overlap": "drop"}, "on_overlap='drop'"),
        ({"name": "n", "overlap_wait_s": -1}, "overlap_wait_s=-1"),
        ({"name": "n", "format": "pickle"}, "format='pickle'"),
        ({"name": "n", "config": 5}, "config of type int"),
        ({"name": "n", "config": "/none.json"}, "config='/none.json'"),
        ({"name": "n", "socket": "/" + "x" * 200}, "107 at most"),
        ({"name": "n", "autostart": "yes"}, "autostart='yes'"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_rule(home: Path, arguments: dict[str, object], message: str):
    """M019"""
    with pytest.raises(ValueError) as caught:
        ckptd.Experiment(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step=-1"),
        ({"step": 1.5}, "step=1.5"),
        ({"step": True}, "step=True"),
        ({"step": "7"}, "step='7'"),
        ({"epoch": math.inf}, "epoch=inf"),
        ({"metrics": [1]}, "metrics=[1]"),
        ({"metrics": {"loss": "low"}}, "metrics['loss']='low'"),
        ({"metrics": {1: 1.0}}, "metric name 1"),
        ({"note": 5}, "note=5"),
        ({"meta": []}, "meta=[]"),
        ({"update_best": 1}, "update_best=1"),
        ({"format": "npz"}, "format='npz'"),
        ({"on_overlap": ""}, "on_overlap=''"),
    ],
)
def test_a_bad_argument_of_save_is_named(lone: ckptd.Experiment, arguments: dict[str, object], message: str):
    """M019"""
    with pytest.raises(ValueError) as caught:
        lone.save({}, **arguments)
    assert message in str(caught.value)


def test_numbers_of_torch_and_numpy_are_steps_and_metrics(run: ckptd.Experiment, daemon: FakeDaemon):
    import numpy as np

    handle = run.save(state(1), step=np.int64(5), metrics={"a": torch.tensor(0.5), "b": np.float32(2)})
    found = descriptor_of(daemon.wait_staged(handle.id))
    assert (found["step"], found["metrics"]) == (5, {"a": 0.5, "b": 2.0})


def test_resume_must_raises_what_the_daemon_says(home: Path, daemon: FakeDaemon):
    daemon.refuse["experiment.open"] = "not_found"
    with pytest.raises(ckptd.NotFound):
        ckptd.Experiment("net", dir=home / "r", resume="must")


# fork, threads, modes -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_saves_over_a_session_of_its_own(run: ckptd.Experiment, daemon: FakeDaemon):
    """The parent's session, its arena and its connection are none of the child's."""
    assert run.prepare(state(1), wait_s=5)
    daemon.arenas_max = 8
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            handle = run.save(state(2), step=2)
            os.write(write_end, handle.id.encode())
            handle.wait("staged", timeout=5)
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    child_save = os.read(read_end, 32).decode()
    os.close(read_end)
    assert value_in(daemon.wait_staged(child_save)) == 2.0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    handle = run.save(state(1), step=1)
    assert value_in(daemon.wait_staged(handle.id)) == 1.0
    handle.wait("staged", timeout=5)
    assert {r["pid"] for r in daemon.of("hello")} == {os.getpid(), pid}
    assert len(daemon.of("hello")) == 2, "the parent had to reconnect: the child closed its session"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_never_saves_ends_without_a_word_to_the_daemon(run: ckptd.Experiment, daemon: FakeDaemon):
    """Data loader workers are such children: the experiment must not be closed by them."""
    daemon.wait_for("experiment.open")
    pid = os.fork()
    if pid == 0:
        run._at_exit()
        os._exit(0)
    os.waitpid(pid, 0)
    handle = run.save(state(1), step=1)
    daemon.wait_staged(handle.id)
    assert not daemon.of("experiment.close")
    assert len(daemon.of("hello")) == 1


def test_saves_from_several_threads_are_all_whole(run: ckptd.Experiment, daemon: FakeDaemon):
    daemon.auto_publish = True
    handles: dict[int, ckptd.Handle] = {}

    def work(first: int) -> None:
        for step in range(first, first + 5):
            handles[step] = run.save(state(step, size=20_000), step=step)

    threads = [threading.Thread(target=work, args=(n * 10,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handles) == 20
    for step, handle in handles.items():
        assert value_in(daemon.wait_staged(handle.id)) == float(step)


def test_disabled_mode_does_nothing_with_the_same_types(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CKPTD_MODE", "disabled")
    before = threading.active_count()
    with ckptd.Experiment("net", dir=home / "r") as run:
        handle = run.save(state(1), step=1)
        assert isinstance(handle, ckptd.Handle)
        assert handle.wait("verified") is handle
        assert handle.state == "disabled"
        assert run.load() is None
        assert run.path() is None
        assert run.submit("/x").state == "disabled"
        run.log({"a": 1})
        run.tag("x")
        assert isinstance(run.stats(), dict)
        assert run.every(steps=2).due(2)
    assert threading.active_count() == before
    assert not (home / "state").exists()


def test_offline_mode_never_looks_for_a_daemon(home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CKPTD_MODE", "offline")
    run = ckptd.Experiment("net", dir=home / "r")
    handle = run.save(state(2), step=2)
    assert value_in(spooled_image(home, handle)) == 2.0
    run.close()
    assert not daemon.requests


# metrics, life --------------------------------------------------------------------------------


def test_metrics_arrive_in_batches_within_a_second(run: ckptd.Experiment, daemon: FakeDaemon):
    """M110, M111"""
    for step in range(2500):
        run.log({"loss": float(step)}, step=step)
    run.log({"loss": math.nan, "grad": math.inf}, step=2500)
    assert run.flush(5)
    batches = [request["points"] for request in daemon.of("metrics")]
    points = [point for batch in batches for point in batch]
    assert max(len(batch) for batch in batches) <= 1000
    assert [p[1] for p in points if p[0] == "loss"] == list(range(2501))
    assert [p[2] for p in points[-2:]] == ["NaN", "Infinity"]


def test_metrics_without_an_answer_are_sent_again(run: ckptd.Experiment, daemon: FakeDaemon):
    daemon.hang_up_on.add("metrics")
    run.log({"loss": 1.0}, step=1)
    daemon.wait_for("metrics")
    daemon.hang_up_on.clear()
    daemon.wait_for("metrics", 2)
    assert run.flush(5)
    assert run.stats()["metrics_waiting"] == 0


def test_an_exception_marks_the_experiment_failed(home: Path, daemon: FakeDaemon):
    """M119"""
    with pytest.raises(ZeroDivisionError), ckptd.Experiment("net", dir=home / "r"):
        raise ZeroDivisionError("x")
    (closed,) = daemon.of("experiment.close")
    assert (closed["status"], closed["error"]) == ("failed", "ZeroDivisionError: x")


def test_handles_climb_after_close(home: Path, daemon: FakeDaemon):
    with ckptd.Experiment("net", dir=home / "r") as run:
        handle = run.save(state(1), step=1)
    assert daemon.of("experiment.close")[0]["status"] == "completed"
    daemon.publish(handle.id)
    handle.wait("durable", timeout=5)
    late = run.save(state(2), step=2)
    assert late.state == "failed"


def test_a_script_that_just_ends_brings_its_save_to_the_spool(home: Path):
    """atexit: the image is written although nobody called close()."""
    script = (
        "import numpy, ckptd_client as c\n"
        f"run = c.Experiment('net', dir={str(home / 'r')!r})\n"
        "print(run.save({'model': {'w': numpy.full(50000, 7.0, 'float32')}}, step=7).id)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    image = Path(spool.arena_path(str(home / "state" / "spool"), found.stdout.strip())).read_bytes()
    assert value_in(image) == 7.0


def test_every_decides_without_asking_anyone(lone: ckptd.Experiment):
    """M008"""
    every = lone.every(steps=100, epochs=5)
    due = [step for step in range(0, 501, 10) if every.due(step)]
    assert due == [100, 200, 300, 400, 500]
    assert every.due(505, epoch=5.2)
    assert lone.stats()["not_due"] == 46
    with pytest.raises(ValueError, match="at least one"):
        lone.every()
    with pytest.raises(ValueError, match="steps=0"):
        lone.every(steps=0)


def test_every_sees_a_multiple_that_was_passed_over_and_the_clock():
    from ckptd_client.cadence import Cadence

    now_s = 0.0
    every = Cadence(steps=100, seconds=60, clock=lambda: now_s)
    assert [every.due(step) for step in (90, 130, 160)] == [False, True, False]
    now_s = 61.0
    assert every.due(170)
    assert not every.due(171)


def test_submit_offers_a_path_and_follows_it(run: ckptd.Experiment, daemon: FakeDaemon, home: Path):
    handle = run.submit(home / "ckpt.pt", step=3, metrics={"loss": 0.5})
    (request,) = daemon.wait_for("submit")
    assert request["path"] == str(home / "ckpt.pt")
    assert (request["project"], request["experiment"], request["step"]) == ("vision", "net", 3)
    daemon.publish(handle.id)
    handle.wait(timeout=5)


def test_submit_without_a_daemon_leaves_an_offer(lone: ckptd.Experiment, home: Path):
    handle = lone.submit(home / "ckpt.pt", step=3)
    assert handle.wait_settled(5)
    offer = spool.read_offer(spool.offer_path(str(home / "state" / "spool"), handle.id))
    assert offer is not None
    assert (offer["path"], offer["checkpoint"]) == (str(home / "ckpt.pt"), handle.id)


def test_a_script_submits_without_an_experiment(home: Path):
    script = f"import ckptd_client as c; h = c.submit({str(home / 'x.pt')!r}, step=1); print(h.id, h.spooled)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    checkpoint, spooled = found.stdout.split()
    assert spooled == "True"
    assert Path(spool.offer_path(str(home / "state" / "spool"), checkpoint)).exists()


def test_importing_the_package_brings_in_only_the_standard_library_and_is_quick():
    """M031"""
    script = (
        "import sys, time; before = set(sys.modules); t = time.perf_counter(); import ckptd_client\n"
        "ms = (time.perf_counter() - t) * 1000; ckptd_client.Experiment, ckptd_client.submit\n"
        "tops = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(ms, sorted(tops - set(sys.stdlib_module_names) - {'ckptd_client'}))"
    )
    command = [sys.executable, "-c", script]
    results = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(" ", 1) for _ in range(3)
    ]
    assert min(float(ms) for ms, _ in results) < 20
    assert {rest.strip() for _, rest in results} == {"[]"}


def test_a_run_leaves_no_descriptor_behind(home: Path, daemon: FakeDaemon):
    def once() -> None:
        with ckptd.Experiment("net", dir=home / "r") as run:
            handle = run.save(state(1), step=1)
            daemon.wait_staged(handle.id)
            daemon.publish(handle.id, "verified")
            handle.wait("verified", timeout=5)

    once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) - daemon.connections
    for _ in range(3):
        once()
    gc.collect()
    deadline_s = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) - daemon.connections > before and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) - daemon.connections <= before
