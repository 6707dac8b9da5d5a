"""What becomes of a node when its catalog's disk is full or failing, or its database is locked, damaged, old or gone."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disk import Disk, fill, free_bytes, tmpfs
from tests.support.node import Node, eventually, is_alive
from tests.support.signals import standing_still
from tests.support.trainer import Nursery, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
PROJECT = "faults"
RESERVE = 2 << 20
OVERLAP_S = 0.5  # how long a save may wait for the publish before it
SAVE_S = OVERLAP_S + 1.5  # and a busy machine
LOCKED_S = 6.0  # longer than one statement waits for a lock


def opened(node: Node, nursery: Nursery, name: str = "run", overlap_s: float = OVERLAP_S) -> Trainer:
    trainer = nursery.trainer(node.environ)
    trainer.open(name=name, project=PROJECT, dir=str(node.runs), overlap_wait_s=overlap_s)
    return trainer


def degraded(node: Node, what: str) -> list[str]:
    """Why a thing does not work, as status says."""
    return [d["why"] for d in node.status()["daemon"]["degraded"] if d["what"] == what]


def doctor(node: Node, name: str) -> list[str]:
    """How the checks of one name came out."""
    return [check["status"] for check in node.ask("doctor")["checks"] if check["name"] == name]


@pytest.fixture
def small_state(node: Node, short_dir: Path) -> Iterator[Path]:
    """The node's state directory on a disk of 12 MiB."""
    with tmpfs(short_dir / "small", "12m") as place:
        (place / "s").mkdir(mode=0o700)
        node.state.symlink_to(place / "s")
        yield place
        node.clean_up()


def test_a_full_disk_under_the_catalog_releases_the_reserve_and_is_survived(
    node: Node, plain_nursery: Nursery, small_state: Path
) -> None:
    """F6. What is promised is recorded all the same, what can be retired is, and it is over when there is room again."""
    node.ballast_bytes = RESERVE
    node.start()
    reserve = next(small_state.rglob("*.ballast"))
    assert reserve.stat().st_blocks * 512 >= RESERVE
    assert doctor(node, "reserve") == ["ok"]
    trainer = opened(node, plain_nursery, overlap_s=30.0)  # the spool lies on the full disk as well
    saves = {trainer.save(seed=1, step=1)["id"]: 1}
    node.wait_level(next(iter(saves)))
    node.wait_idle()
    with standing_still([node.daemon_pid]):  # a commit while the disk fills would let the filler have the reserve
        filler = fill(small_state)
        assert free_bytes(small_state) == 0
    for seed in range(2, 6):
        saves[trainer.save(seed=seed, step=seed)["id"]] = seed
    for checkpoint in saves:
        node.wait_level(checkpoint)
    assert reserve.stat().st_blocks == 0
    assert len(node.said("catalog.reserve_released")) == 1
    assert doctor(node, "reserve") == ["warn"]
    filler.unlink()
    eventually(lambda: doctor(node, "reserve") == ["ok"], "the reserve to be filled again")
    assert reserve.stat().st_blocks * 512 >= RESERVE
    assert [row["level"] for row in node.rows(PROJECT, "run")] == ["verified"] * len(saves)


@pytest.mark.faults
def test_a_full_disk_that_stays_full_refuses_politely_and_recovers_without_a_restart(
    node: Node, plain_nursery: Nursery, small_state: Path
) -> None:
    """F6. No reserve is left: a save is held in its memory, nothing raises, and it is recorded when there is room."""
    node.ballast_bytes = 0
    node.start()
    pid = node.daemon_pid
    trainer = opened(node, plain_nursery)
    node.wait_level(trainer.save(seed=1, step=1)["id"])
    filler = fill(small_state)
    saves = []
    for step in (2, 3):  # an experiment has two arenas; the spool lies on the full disk as well
        answer = trainer.save(seed=step, step=step)
        assert answer["error"] is None
        assert answer["took_s"] < SAVE_S
        saves.append(answer["id"])
    eventually(lambda: degraded(node, "catalog"), "the catalog to be called degraded")
    assert "no space" in degraded(node, "catalog")[0]
    assert "fail" in doctor(node, "catalog")
    filler.unlink()
    for checkpoint in saves:
        node.wait_level(checkpoint)
    assert node.daemon_pid == pid
    eventually(lambda: not degraded(node, "catalog"), "the catalog to be well again")


@pytest.mark.faults
def test_a_catalog_that_another_process_has_locked_delays_and_loses_nothing(node: Node, plain_nursery: Nursery) -> None:
    """F18. Saves go on within their bound, what they handed off is recorded when the lock is gone."""
    hold_lock(node, plain_nursery, LOCKED_S)


@pytest.mark.faults
def test_a_catalog_that_is_locked_for_a_minute_loses_nothing(node: Node, plain_nursery: Nursery) -> None:
    """F18, long."""
    hold_lock(node, plain_nursery, 60.0)


def hold_lock(node: Node, nursery: Nursery, locked_s: float) -> None:
    node.start()
    pid = node.daemon_pid
    trainer = opened(node, nursery)
    saves = [trainer.save(seed=0, step=0)["id"]]
    node.wait_level(saves[0])
    locker = sqlite3.connect(node.state / "catalog.sqlite", isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    try:
        begun_s = time.monotonic()
        step = 1
        while time.monotonic() - begun_s < locked_s:
            answer = trainer.save(seed=step, step=step)
            assert answer["error"] is None
            assert answer["took_s"] < SAVE_S, answer
            saves.append(answer["id"])
            step += 1
            time.sleep(locked_s / 10)
        # One statement waits for some seconds before it gives up, and the pulse may have its own word on it.
        eventually(lambda: any("another process" in why for why in degraded(node, "catalog")), "it to be told")
        assert "fail" in doctor(node, "catalog")
    finally:
        locker.execute("ROLLBACK")
        locker.close()
    for checkpoint in saves:
        node.wait_level(checkpoint)
    assert [row["step"] for row in node.rows(PROJECT, "run")] == list(range(step))
    assert node.daemon_pid == pid
    eventually(lambda: not degraded(node, "catalog"), "the catalog to be well again")


def test_a_catalog_whose_disk_is_gone_ends_no_process_and_is_told(
    node: Node, plain_nursery: Nursery, short_dir: Path
) -> None:
    """F8. EIO for every commit: training goes on, the node says what is wrong, and what was recorded is still there after."""
    with Disk(short_dir, "ext4-thin") as disk:
        (disk.path / "s").mkdir(mode=0o700)
        node.state.symlink_to(disk.path / "s")
        try:
            node.start()
            pid = node.daemon_pid
            trainer = opened(node, plain_nursery)
            kept = trainer.save(seed=1, step=1)["id"]
            node.wait_level(kept)
            node.wait_idle()
            disk.settle()
            disk.cut()
            late = trainer.save(seed=2, step=2)
            assert late["error"] is None
            assert late["took_s"] < SAVE_S
            eventually(lambda: troubled(node), "it to be told")
            assert is_alive(pid)
        finally:
            node.clean_up()
        disk.replay()
        node.start()
        row = node.row(kept)
        assert row is not None
        assert (row["state"], row["level"]) == ("live", "verified")
        node.clean_up()


def troubled(node: Node) -> bool:
    """Whether status names the catalog, or can't be answered because of it."""
    found = node.ask_once("status")
    if not found["ok"]:
        return bool(found["error"]["code"] == "catalog_fault")
    return any(d["what"] == "catalog" for d in found["daemon"]["degraded"])
