"""The real daemon's life: drained, hurried, reloaded, started twice, orphaned; and what it says of its trainers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import payload
from tests.support.node import Node, eventually, is_alive
from tests.support.signals import kill
from tests.support.trainer import Nursery, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LONG = "delay:60"
HELD_S = 60.0  # for so long a worker may be held up before it is given up


def opened(node: Node, nursery: Nursery, name: str, **given: Any) -> Trainer:
    """A trainer with an open experiment and memory at hand."""
    trainer = nursery.trainer(node.environ)
    trainer.open(name=name, project="life", dir=str(node.runs), **given)
    assert trainer.prepare(seed=1)["ready"]
    return trainer


def spooled(node: Node) -> list[str]:
    """The checkpoints that lie in the spool."""
    return sorted(path.name.removesuffix(".arena") for path in node.spool.glob("*.arena"))


def assert_arrives(node: Node, name: str, saves: dict[str, tuple[int, int]]) -> None:
    """Each id is there once, verified, with its step and the bytes of its seed."""
    for checkpoint in saves:
        node.wait_level(checkpoint)
    rows = node.rows("life", name)
    assert sorted((r["checkpoint"], r["step"]) for r in rows) == sorted((i, step) for i, (_, step) in saves.items())
    for row in rows:
        payload.check_saved(Path(row["path"]), saves[row["checkpoint"]][0])
    node.wait_idle()
    assert not list(node.spool.iterdir())


def test_sigterm_lets_running_publishes_finish(node: Node, nursery: Nursery) -> None:
    """F28, I12. The save is under its final name when the node has ended; nothing had to be spilled."""
    node.start()
    trainer = opened(node, nursery, "drained")
    node.arm("copy.fsynced", "delay:1")
    saved = trainer.save(seed=5, step=1)
    node.wait_fired()
    assert node.stop() == 0
    path = node.runs / "life" / "drained" / "step_0000000001"
    payload.check_saved(path, 5)
    assert spooled(node) == []
    assert not node.socket.exists()
    node.start()
    assert_arrives(node, "drained", {saved["id"]: (5, 1)})


def test_a_second_sigterm_ends_it_at_once_and_loses_nothing(node: Node, nursery: Nursery) -> None:
    """I12. What was not written yet lies in the spool, whole, and arrives with the next daemon."""
    node.request_s = HELD_S
    node.start()
    trainer = opened(node, nursery, "hurried")
    node.arm("copy.chunk", LONG)
    saves = {trainer.save(seed=seed, step=seed)["id"]: (seed, seed) for seed in (1, 2)}
    node.wait_fired()
    trainer.flush()
    node.signal(signal.SIGTERM)
    eventually(lambda: node.said("daemon.draining"), "the drain to begin")
    begun_s = time.monotonic()
    node.signal(signal.SIGTERM)
    assert node.ended() == 0
    assert time.monotonic() - begun_s < 20.0
    assert spooled(node) == sorted(saves)
    assert len(node.said("save.spilled")) == 2
    trainer.kill()
    node.start()
    assert_arrives(node, "hurried", saves)


def test_the_drain_ends_at_its_deadline_and_loses_nothing(node: Node, nursery: Nursery) -> None:
    """I12. A disk that hangs does not hold up the machine's shutdown for longer than drain_s."""
    node.drain_s, node.request_s = 0.5, HELD_S
    node.start()
    trainer = opened(node, nursery, "hung")
    node.arm("dir.fsynced", LONG)
    saved = trainer.save(seed=3, step=1)
    node.wait_fired()
    begun_s = time.monotonic()
    assert node.stop() == 0
    assert time.monotonic() - begun_s < 25.0
    assert spooled(node) == [saved["id"]]
    node.start()
    assert_arrives(node, "hung", {saved["id"]: (3, 1)})


def test_a_save_made_while_the_daemon_drains_arrives_later(node: Node, nursery: Nursery) -> None:
    """The trainer holds a leased arena: its save() must neither fail nor vanish with the daemon's memory."""
    node.start()
    trainer = opened(node, nursery, "late")
    node.arm("copy.chunk", "delay:1.5")
    saves = {trainer.save(seed=1, step=1)["id"]: (1, 1)}
    node.wait_fired()
    assert trainer.prepare(seed=1)["ready"]
    node.signal(signal.SIGTERM)
    eventually(lambda: node.said("daemon.draining"), "the drain to begin")
    for step in (2, 3):
        answer = trainer.save(seed=step, step=step)
        assert answer["error"] is None
        saves[answer["id"]] = (step, step)
    assert node.ended() == 0
    assert trainer.flush()["safe"]
    node.start()
    assert_arrives(node, "late", saves)
    assert trainer.stats()["failed"] == 0


def test_a_trainer_that_dies_after_its_commit_while_the_daemon_drains_has_saved(node: Node, nursery: Nursery) -> None:
    """H2: save() had returned. Its arena is looked at once more before the daemon lets go of its memory."""
    node.request_s = HELD_S
    node.start()
    trainer = opened(node, nursery, "lastbreath")
    other = opened(node, nursery, "busy")
    node.arm("copy.chunk", LONG)
    busy = other.save(seed=9, step=1)
    node.wait_fired()
    held = list(node.workers())
    node.signal(signal.SIGTERM)
    eventually(lambda: node.said("daemon.draining"), "the drain to begin")
    trainer.dies_of("save", seed=4, step=1, die="before_message")
    kill(held)
    assert node.ended() == 0
    node.start()
    (row,) = eventually(lambda: node.rows("life", "lastbreath"), "the save of the dead")
    assert_arrives(node, "lastbreath", {row["checkpoint"]: (4, 1)})
    node.wait_level(busy["id"])


def test_a_daemon_whose_supervisor_was_killed_drains_and_leaves_nothing_behind(node: Node, nursery: Nursery) -> None:
    """Nobody would keep its arenas any more: the kernel tells it, it ends, and a new node has everything."""
    node.drain_s, node.request_s = 1.0, HELD_S
    node.start()
    trainer = opened(node, nursery, "orphaned")
    node.arm("copy.chunk", LONG)
    saved = trainer.save(seed=6, step=1)
    node.wait_fired()
    family = node.family()
    assert len(family) >= 2
    assert node.supervisor is not None
    node.supervisor.kill()
    node.supervisor.wait()
    eventually(lambda: not any(is_alive(pid) for pid in family), "the daemon and its workers to end")
    assert spooled(node) == [saved["id"]]
    node.start()
    assert_arrives(node, "orphaned", {saved["id"]: (6, 1)})


def test_sighup_reloads_and_trainers_notice_nothing(node: Node, nursery: Nursery) -> None:
    """New rules hold from the next save on; connections, leases and jobs stay."""
    node.start()
    trainer = opened(node, nursery, "reloaded")
    pid = node.daemon_pid
    first = trainer.save(seed=1, step=1)
    node.wait_level(first["id"])
    node.configure("[retention]\nkeep_last = 1\ntrash_grace_s = 3600\n")
    node.signal(signal.SIGHUP)
    (said,) = eventually(lambda: node.said("config.reloaded"), "the reload")
    assert said["changed"] == ["retention.keep_last", "retention.trash_grace_s"]
    assert said["restart_needed"] == []
    second = trainer.save(seed=2, step=2)
    assert trainer.wait(id=second["id"])["level"] == "verified"
    eventually(lambda: (node.row(first["id"]) or {}).get("state") == "trashed", "the first to be retired")
    assert node.daemon_pid == pid
    assert trainer.stats()["connected"]


def test_a_broken_configuration_is_told_and_the_old_one_goes_on(node: Node, nursery: Nursery) -> None:
    """A typo on a Friday evening must not end anybody's training."""
    node.start()
    trainer = opened(node, nursery, "typo")
    pid = node.daemon_pid
    node.configure("[retention]\nkeep_lost = 1\n")
    node.signal(signal.SIGHUP)
    (said,) = eventually(lambda: node.said("config.not_reloaded"), "the refusal")
    assert said["code"] == "bad_config"
    assert "keep_lost" in said["message"]
    saved = trainer.save(seed=1, step=1)
    assert trainer.wait(id=saved["id"])["level"] == "verified"
    assert node.daemon_pid == pid


def test_a_storm_of_sighups_costs_no_save(node: Node, nursery: Nursery) -> None:
    """F28."""
    node.start()
    trainer = opened(node, nursery, "storm")
    saves = {}
    for step in range(1, 6):
        for _ in range(20):
            node.signal(signal.SIGHUP)
        saves[trainer.save(seed=step, step=step)["id"]] = (step, step)
    assert_arrives(node, "storm", saves)
    eventually(lambda: node.said("config.reloaded"), "a reload")


def test_a_second_node_on_one_state_directory_ends_with_the_holders_pid(node: Node, short_dir: Path) -> None:
    """F25. Within a second or so, with its own exit code, and the first one never notices."""
    node.start()
    pid = node.daemon_pid
    assert node.supervisor is not None
    places = ["--config", str(short_dir / "toml"), "--state-dir", str(node.state), "--socket", str(short_dir / "other")]
    second = subprocess.run(
        [sys.executable, "-P", "-m", "ckptd", *places], capture_output=True, text=True, timeout=60, check=False
    )
    assert second.returncode == 1
    assert str(node.supervisor.pid) in second.stderr
    daemon = subprocess.run(
        [sys.executable, "-P", "-m", "ckptd.daemon", *places], capture_output=True, text=True, timeout=60, check=False
    )
    assert daemon.returncode == 1
    assert f"process {pid} holds" in daemon.stderr
    assert node.daemon_pid == pid
    assert not (short_dir / "other").exists()


def test_a_node_starts_after_a_crash_of_everything(node: Node, nursery: Nursery) -> None:
    """F25. Locks are the kernel's: a stale file, socket or pid is no obstacle."""
    node.start()
    trainer = opened(node, nursery, "again")
    saved = trainer.save(seed=1, step=1)
    node.wait_level(saved["id"])
    assert node.supervisor is not None
    pids = [node.supervisor.pid, *node.family()]
    kill(pids)
    node.supervisor.wait()
    eventually(lambda: not any(is_alive(pid) for pid in pids), "everything's end")
    assert node.socket.exists()
    node.start()
    assert_arrives(node, "again", {saved["id"]: (1, 1)})


def test_an_experiment_is_completed_failed_or_lost_as_its_process_ended(node: Node, nursery: Nursery) -> None:
    """Closed, closed with an error, ended like a script, killed: each has its word, within seconds."""
    node.start()
    ends: dict[str, str] = {}
    closed = opened(node, nursery, "closed")
    closed.close()
    ends["closed"] = "completed"
    failed = opened(node, nursery, "failed")
    failed.close(status="failed", error="ValueError: loss is NaN")
    ends["failed"] = "failed"
    script = opened(node, nursery, "script")
    script.quit()
    ends["script"] = "completed"
    killed = opened(node, nursery, "killed")
    assert node.experiment("life", "killed")["status"] == "running"
    killed.kill()
    ends["killed"] = "lost"
    for name, status in ends.items():
        eventually(lambda n=name, s=status: node.experiment("life", n)["status"] == s, f"{name} to be {status}")
    assert [e["name"] for e in node.events("experiment.lost")] == ["killed"]


def test_a_trainer_that_dies_while_the_daemon_is_away_is_lost_too(node: Node, nursery: Nursery) -> None:
    """No connection was ever seen closing: silence of lost_after_s says it."""
    node.start()
    trainer = opened(node, nursery, "unseen")
    pid = node.daemon_pid
    os.kill(pid, signal.SIGSTOP)
    trainer.kill()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_alive(pid), "the daemon's end")
    eventually(lambda: node.experiment("life", "unseen")["status"] == "lost", "the trainer to be lost")


def test_a_trainer_goes_on_after_any_number_of_daemons(node: Node, nursery: Nursery) -> None:
    """One handle, three daemons: the experiment stays one, in one segment, and running."""
    node.start()
    trainer = opened(node, nursery, "patient")
    saves = {}
    for step in (1, 2, 3):
        saves[trainer.save(seed=step, step=step)["id"]] = (step, step)
        node.kill_daemon()
    assert_arrives(node, "patient", saves)
    # "lost" for a moment, where the trainer is not back within lost_after_s of the third daemon.
    eventually(lambda: node.experiment("life", "patient")["status"] == "running", "the trainer to be back")
    assert node.experiment("life", "patient")["segment"] == 1
    for checkpoint in saves:
        assert trainer.wait(id=checkpoint)["level"] == "verified"
    assert trainer.close()["took_s"] < 40.0
    eventually(lambda: node.experiment("life", "patient")["status"] == "completed", "the experiment's end")
