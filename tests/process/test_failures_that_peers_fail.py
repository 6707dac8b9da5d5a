"""What other checkpointers were seen to get wrong, each with the real processes: here it must not happen.

A second save that overwrites the first one's tensors, saves that vanish when they overlap, a second job on
the node whose saves vanish, SIGBUS where /dev/shm is small, a helper that died and is never missed, and
memory that nobody gives back.
"""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import payload
from tests.support.node import Node, arenas_of, eventually, is_alive
from tests.support.trainer import Nursery, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MIB = 1 << 20
PROJECT = "peers"


def opened(node: Node, nursery: Nursery, name: str, **given: Any) -> Trainer:
    trainer = nursery.trainer(node.environ)
    trainer.open(name=name, project=PROJECT, dir=str(node.runs), **given)
    return trainer


def assert_saved(node: Node, name: str, saves: dict[str, int], size_bytes: int = payload.SMALL_BYTES) -> None:
    """Every id is a verified checkpoint with its seed's bytes, and there are no others."""
    for checkpoint in saves:
        node.wait_level(checkpoint)
    rows = node.rows(PROJECT, name)
    assert sorted(row["checkpoint"] for row in rows) == sorted(saves)
    for row in rows:
        payload.check_saved(Path(row["path"]), saves[row["checkpoint"]], size_bytes)


def test_two_back_to_back_saves_hold_exactly_their_own_tensors(node: Node, nursery: Nursery) -> None:
    """The state is written over the moment save() returns, while the publish before is still under way."""
    node.start()
    trainer = opened(node, nursery, "exact")
    size = 24 * MIB
    assert trainer.prepare(seed=1, size_bytes=size)["ready"]
    node.arm("copy.chunk", "delay:0.5")
    saves = {}
    for seed in (1, 2):
        answer = trainer.save(seed=seed, step=seed, size_bytes=size, scribble=True)
        assert not answer["spooled"]
        saves[answer["id"]] = seed
    assert_saved(node, "exact", saves, size)


@pytest.mark.parametrize("on_overlap", ["wait", "spool"])
def test_three_overlapping_saves_all_land(node: Node, nursery: Nursery, on_overlap: str) -> None:
    """Two arenas per experiment, and a disk that takes half a second for each file: the third waits or spools."""
    node.start()
    trainer = opened(node, nursery, "overlap")
    assert trainer.prepare(seed=1)["ready"]
    node.arm("copy.fsynced", "delay:1")
    saves = {}
    for seed in (1, 2, 3):
        answer = trainer.save(seed=seed, step=seed, on_overlap=on_overlap, scribble=True)
        assert answer["error"] is None
        saves[answer["id"]] = seed
    assert trainer.flush()["safe"]
    assert_saved(node, "overlap", saves)
    found = trainer.stats()
    assert (found["saves"], found["failed"], found["skipped"]) == (3, 0, 0)


def test_a_save_that_was_not_wanted_says_so(node: Node, nursery: Nursery) -> None:
    """on_overlap="skip" and "replace" lose a save on purpose: the handle and the counters name it, nothing is silent."""
    node.request_s = 60.0
    node.start()
    trainer = opened(node, nursery, "unwanted")
    assert trainer.prepare(seed=1)["ready"]
    node.arm("copy.fsynced", "delay:60")
    first = trainer.save(seed=1, step=1)
    node.wait_fired()
    held = list(node.workers())
    second = trainer.save(seed=2, step=2)
    skipped = trainer.save(seed=3, step=3, on_overlap="skip")
    assert (skipped["state"], skipped["error"]["code"]) == ("skipped", "skipped")
    fourth = trainer.save(seed=4, step=4, on_overlap="replace")
    assert fourth["error"] is None
    for pid in held:
        os.kill(pid, signal.SIGKILL)
    replaced = trainer.wait(id=second["id"])
    assert (replaced["state"], replaced["error"]["code"]) == ("replaced", "replaced")
    for good in (first, fourth):
        assert trainer.wait(id=good["id"])["level"] == "verified"
    states = {row["step"]: row["state"] for row in node.rows(PROJECT, "unwanted")}
    assert states == {1: "live", 2: "replaced", 4: "live"}
    assert trainer.stats()["skipped"] == 1
    assert node.wait_idle()["arenas"]["committed"] == 0


def test_two_jobs_on_one_node_keep_their_saves_apart(node: Node, nursery: Nursery) -> None:
    """No launcher, no run id, the same script twice: the same project, names and steps, at the same time."""
    node.start()
    trainers = [opened(node, nursery, "twin") for _ in range(2)] + [opened(node, nursery, "other")]
    saves: list[dict[str, int]] = [{}, {}, {}]
    for step in (1, 2, 3):
        for number, trainer in enumerate(trainers):
            trainer.begin("save", seed=10 * number + step, step=step, scribble=True)
        for number, trainer in enumerate(trainers):
            saves[number][trainer.answer()["id"]] = 10 * number + step
    assert_saved(node, "twin", {**saves[0], **saves[1]})
    assert_saved(node, "other", saves[2])
    names = sorted(Path(row["path"]).name for row in node.rows(PROJECT, "twin"))
    assert names == sorted(f"step_{step:010d}{revision}" for step in (1, 2, 3) for revision in ("", "_r2"))
    for trainer in trainers:
        trainer.kill()
    eventually(lambda: node.status()["arenas"]["leased"] == 0, "the leases of both jobs to end")


def small_shm() -> tuple[str, ...]:
    """A command prefix that runs a program where /dev/shm has 64 MiB, as in a container; skips where that can't be had."""
    if os.getuid() != 0:
        pytest.skip("needs root: a private mount namespace with a small /dev/shm")
    words = ('mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")
    prefix = ("unshare", "-m", "--propagation", "private", "sh", "-c", *words)
    tried = subprocess.run([*prefix, "df", "--output=size", "/dev/shm"], capture_output=True, text=True, check=False)
    if tried.returncode or tried.stdout.split()[-1] != "65536":
        pytest.skip(f"no private mount namespace here: {tried.stderr.strip()}")
    return prefix


def test_nothing_needs_dev_shm(node: Node, short_dir: Path) -> None:
    """Docker gives 64 MiB. Daemon, worker and trainer live in such a place, and a state of 256 MiB is saved and read."""
    node.prefix = small_shm()
    node.start()
    size = 256 * MIB
    with Nursery(short_dir, prefix=node.prefix) as nursery:
        trainer = opened(node, nursery, "small-shm")
        for pid in (trainer.pid, node.daemon_pid):
            assert "size=65536k" in Path(f"/proc/{pid}/mountinfo").read_text()
        saved = trainer.save(seed=7, step=1, size_bytes=size)
        assert saved["error"] is None
        assert trainer.wait(id=saved["id"], timeout=100)["level"] == "verified"
        assert trainer.load(selector="latest", seed=7, size_bytes=size) == {"found": True, "same": True}
        assert list(Path(f"/proc/{node.daemon_pid}/root/dev/shm").iterdir()) == []
    payload.check_saved(Path(node.rows(PROJECT, "small-shm")[0]["path"]), 7, size)


def test_a_killed_worker_is_reported_and_replaced(node: Node, nursery: Nursery) -> None:
    """F24. The next save lands as if nothing had been; the log and `status` say that something was."""
    node.start()
    trainer = opened(node, nursery, "worker")
    first = trainer.save(seed=1, step=1)
    node.wait_level(first["id"])
    node.wait_idle()
    (pid,) = node.workers()
    os.kill(pid, signal.SIGKILL)
    (lost,) = eventually(lambda: node.said("worker.lost"), "the log to name the worker")
    assert lost["pid"] == pid
    assert "SIGKILL" in lost["why"]
    second = trainer.save(seed=2, step=2)
    assert trainer.wait(id=second["id"])["level"] == "verified"
    ((new, facts),) = node.workers().items()
    assert new != pid
    assert facts["restarts"] == 1
    assert_saved(node, "worker", {first["id"]: 1, second["id"]: 2})


def test_a_killed_daemon_is_reported_and_replaced(node: Node, nursery: Nursery) -> None:
    """save() right after the kill is neither an error nor a no-op: the handle says where the save is, and it arrives."""
    node.start()
    trainer = opened(node, nursery, "daemon")
    first = trainer.save(seed=1, step=1)
    node.wait_level(first["id"])
    pid = node.kill_daemon()
    second = trainer.save(seed=2, step=2)
    assert second["error"] is None
    assert trainer.wait(id=second["id"])["level"] == "verified"
    assert [said["pid"] for said in node.said("supervisor.daemon_died")] == [pid]
    assert node.daemon_pid != pid
    assert trainer.stats()["connected"]
    assert_saved(node, "daemon", {first["id"]: 1, second["id"]: 2})


def test_nothing_stays_in_memory_after_a_killed_job(node: Node, nursery: Nursery) -> None:
    """A gigabyte of shared memory and an orphan agent, for ever: not here.

    What was lent is free within a second, what is free is given back after idle_s, and what stays is a hot
    copy of a checkpoint, within the budget, until somebody wants the memory.
    """
    size = 32 * MIB
    node.arena_bytes = 3 * 40 * MIB
    node.start()
    trainer = opened(node, nursery, "killed")
    assert trainer.prepare(seed=1, size_bytes=size)["ready"]
    for seed in (1, 2):
        saved = trainer.save(seed=seed, step=seed, size_bytes=size)
        node.wait_level(saved["id"])
    pid = trainer.pid
    trainer.kill()
    eventually(lambda: node.status()["arenas"]["leased"] == 0, "the leases of the dead", 20.0)
    found = node.wait_idle()["arenas"]
    assert found["bytes_used"] <= found["bytes_max"]
    assert found["hot"] >= 1
    assert arenas_of(pid) == set()
    heir = opened(node, nursery, "heir")
    assert heir.prepare(seed=3)["ready"]
    answer = heir.save(seed=3, step=1, size_bytes=3 * size)  # nearly all there is
    assert not answer["spooled"], "the hot copies of the dead were not given up"
    node.wait_level(answer["id"])
    assert [row["hot"] for row in node.rows(PROJECT, "killed")] == [False, False]
    heir.kill()
    eventually(lambda: node.status()["arenas"]["leased"] == 0, "the leases of the dead", 20.0)
    supervisor = node.supervisor
    assert supervisor is not None
    eventually(
        lambda: (
            arenas_of(node.daemon_pid) == arenas_of(supervisor.pid)
            and len(arenas_of(supervisor.pid)) == node.status()["arenas"]["count"]
        ),
        "the store and the daemon to hold the same arenas",
    )


def test_free_memory_goes_back_to_the_machine_after_idle_s(node: Node, nursery: Nursery) -> None:
    """An arena that was leased and never used, by a trainer that died."""
    node.idle_s = 1.0
    node.start()
    trainer = opened(node, nursery, "unused")
    assert trainer.prepare(seed=1, size_bytes=8 * MIB)["ready"]
    assert node.status()["arenas"]["bytes_used"] > 8 * MIB
    trainer.kill()
    eventually(lambda: node.status()["arenas"]["bytes_used"] == 0, "the memory to come back")
    supervisor = node.supervisor
    assert supervisor is not None
    eventually(lambda: arenas_of(node.daemon_pid) == arenas_of(supervisor.pid) == set(), "both to let go of it")


def test_a_save_whose_place_is_taken_waits_in_memory_and_arrives_when_it_is_free(node: Node, nursery: Nursery) -> None:
    """Somebody's file stands where the project's directory belongs: it stays, and what was acknowledged is not given up."""
    node.start()
    node.runs.mkdir()
    (node.runs / PROJECT).write_text("a file")
    trainer = opened(node, nursery, "blocked")
    assert trainer.prepare(seed=1)["ready"]
    saved = trainer.save(seed=1, step=1)
    eventually(lambda: node.said("stage.failed"), "the first try to fail")
    assert {entry["code"] for entry in node.said("stage.failed")} <= {"bad_path", "exists"}
    assert node.row(saved["id"])["state"] == "pending"
    assert node.status()["arenas"]["committed"] == 1
    assert (node.runs / PROJECT).read_text() == "a file"
    (node.runs / PROJECT).unlink()
    node.wait_level(saved["id"])


def test_no_process_outlives_its_node(node: Node, nursery: Nursery) -> None:
    """An orphan agent is what people find on their machines after a week."""
    node.start()
    trainer = opened(node, nursery, "orphans")
    saved = trainer.save(seed=1, step=1)
    node.wait_level(saved["id"])
    family = node.family()
    assert node.stop() == 0
    eventually(lambda: not any(is_alive(pid) for pid in family), "every process to end")
