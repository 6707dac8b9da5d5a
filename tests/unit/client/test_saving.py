"""The warm path of a save: an arena is there, one memcpy, a message; and how its handle climbs."""

import os
import time
from pathlib import Path

import pytest
import torch

import ckptd_client as ckptd
from ckptd_client import connection as connecting
from ckptd_client import control, saver
from tests.support.fake_daemon import FakeDaemon, descriptor_of
from tests.support.node import eventually
from tests.support.saving import BOUND_S, LONG_S, state, value_in


def test_a_prepared_save_needs_no_answer_from_the_daemon(
    home: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
):
    """An arena is waiting, so a daemon that stops answering can't delay the save at all."""
    for module, limit in ((connecting, "PING_AFTER_S"), (connecting, "HANG_S"), (saver, "OPEN_S")):
        monkeypatch.setattr(module, limit, LONG_S)  # whoever waits for an answer waits for long
    run = ckptd.Experiment("net", dir=home / "r", overlap_wait_s=LONG_S)
    assert run.prepare(state(1), wait_s=30)
    daemon.mute = True
    began_s = time.monotonic()
    handle = run.save(state(1), step=1)
    assert time.monotonic() - began_s < BOUND_S
    assert handle.error is None
    arena = next(a for a in daemon.arenas.values() if a.image()[12] == 3)
    assert value_in(arena.image()) == 1.0
    daemon.stop()
    run.close(timeout_s=5)


def test_two_saves_in_a_row_hold_exactly_their_own_tensors(run: ckptd.Experiment, daemon: FakeDaemon):
    live = {"model": {"w": torch.zeros(200_000)}}
    assert run.prepare(live, wait_s=30)
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
    assert handle.wait("staged", timeout=30).level == "staged"
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
    assert run._session.leases.wait_ready(30)
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
        handle.wait("durable", timeout=30)
    assert generations == [1, 2, 3, 4]
    assert len(run._session.leases._mapped) == 1, "the arena was mapped again instead of being reused"


def test_a_handle_climbs_with_the_daemon_s_pushes(run: ckptd.Experiment, daemon: FakeDaemon):
    seen: list[str] = []
    handle = run.save(state(1), step=7)
    handle.add_done_callback(lambda h: seen.append(h.level))
    daemon.wait_staged(handle.id)
    daemon.publish(handle.id)
    assert handle.wait(timeout=30) is handle
    assert (handle.level, handle.state, handle.path) == ("durable", "live", f"/runs/{handle.id}")
    daemon.publish(handle.id, "verified")
    handle.wait("verified", timeout=30)
    assert seen == ["durable"]


def test_a_failed_checkpoint_raises_what_the_daemon_said(run: ckptd.Experiment, daemon: FakeDaemon):
    handle = run.save(state(1), step=1)
    daemon.wait_staged(handle.id)
    daemon.publish(handle.id, "staged", "failed", error={"code": "no_space", "message": "full", "hint": "free space"})
    with pytest.raises(ckptd.Refused, match="full") as caught:
        handle.wait("durable", timeout=30)
    assert caught.value.code == "no_space"
    eventually(lambda: run.stats()["failed"] == 1, "it to be counted")  # those who wait are told first


def test_waiting_has_a_limit(run: ckptd.Experiment, daemon: FakeDaemon):
    handle = run.save(state(1), step=1)
    with pytest.raises(ckptd.TimedOut):
        handle.wait("durable", timeout=0.05)
    with pytest.raises(ValueError, match="level='done'"):
        handle.wait("done")


def test_an_arena_the_daemon_wants_back_is_given_back_unused(run: ckptd.Experiment, daemon: FakeDaemon):
    assert run.prepare(state(1), wait_s=30)
    daemon.wait_leased(2)
    name = next(iter(daemon.arenas))
    daemon.push({"push": "reclaim", "arena": name})
    assert daemon.wait_for("abandon")[0]["arena"] == name
    assert daemon.arenas[name].use == "free"
    handle = run.save(state(5), step=1)
    assert value_in(daemon.wait_staged(handle.id)) == 5.0


def test_an_arena_that_was_lent_to_someone_else_meanwhile_is_not_written(run: ckptd.Experiment, daemon: FakeDaemon):
    """The control page has the last word: nothing is copied under a generation that is over."""
    assert run.prepare(state(1), wait_s=30)
    daemon.arenas_max = 8
    lent = list(daemon.arenas.values())
    before = []
    for arena in lent:
        arena.generation += 1
        control.write_lease(arena.page, arena.id, arena.generation, 1)
        before.append(arena.image())
    handle = run.save(state(5), step=1)
    assert value_in(daemon.wait_staged(handle.id)) == 5.0
    assert [arena.image() for arena in lent] == before


def test_a_larger_state_gets_a_larger_arena(run: ckptd.Experiment, daemon: FakeDaemon):
    daemon.arenas_max = 4
    first = run.save(state(1), step=1)
    daemon.wait_staged(first.id)
    second = run.save(state(2, size=500_000), step=2)
    assert value_in(daemon.wait_staged(second.id)) == 2.0
