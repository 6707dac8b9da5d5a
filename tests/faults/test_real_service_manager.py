"""Under systemd itself: what the tests with a fake manager show holds with the real one. F1, F3, F23, F28, I12"""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import payload
from tests.support.node import eventually, is_alive
from tests.support.real_service_manager import MANAGER, RealManager
from tests.support.trainer import Nursery, Trainer

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0 or not MANAGER.exists(), reason="needs root and systemd"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare"),
]

LARGE_BYTES = 48 << 20  # long enough on its way that a kill finds it there


@pytest.fixture
def manager(short_dir: Path) -> Iterator[RealManager]:
    """A manager whose socket unit listens; the service is not started."""
    with RealManager(short_dir, {"WatchdogSec": "3s"}) as made:
        if not made.runs:
            pytest.skip(f"systemd can't run here: {made.log.read_text()[-500:]}")
        yield made
        print(
            (short_dir / "daemon.log").read_text()[-4000:] if (short_dir / "daemon.log").exists() else "no daemon ran"
        )


def opened(manager: RealManager, nursery: Nursery) -> Trainer:
    """A trainer with an open experiment and memory at hand."""
    trainer = nursery.trainer(manager.environ)
    trainer.open(name="run", project="real", dir=str(manager.dir / "runs"))
    assert trainer.prepare(seed=1, size_bytes=LARGE_BYTES)["ready"]
    return trainer


def rows(manager: RealManager) -> dict[int, dict[str, object]]:
    """Every checkpoint, by step."""
    listed = json.loads(manager.ckpt("ls", "--json", "--state", "all", "--all", "real/run"))["checkpoints"]
    return {row["step"]: row for row in listed}


def assert_whole(manager: RealManager, *steps: int) -> None:
    """These steps are there, verified, each once and bit by bit."""

    def verified() -> bool:
        return {step for step, row in rows(manager).items() if row["level"] == "verified"} >= set(steps)

    eventually(verified, f"{steps} to be verified", 60.0)
    for step in steps:
        payload.check_saved(Path(str(rows(manager)[step]["path"])), step, LARGE_BYTES)
    assert set(rows(manager)) == set(steps)


def test_a_connection_starts_the_service_and_ready_means_that_it_serves(manager: RealManager) -> None:
    assert manager.pid == 0
    assert "real" not in manager.ckpt("ls"), "the command's own connection starts it"
    assert manager.control("is-active", "ckptd.service") == "active"
    assert json.loads(manager.ckpt("status", "--json"))["daemon"]["pid"] == manager.pid


def test_saves_outlive_a_killed_daemon_and_those_of_a_trainer_that_died_with_it_too(
    manager: RealManager, nursery: Nursery
) -> None:
    """The arena is in the manager's store before save() returns: nobody else has it when both are dead."""
    manager.control("start", "ckptd.service")
    trainer = opened(manager, nursery)
    for step in (1, 2):
        pid = manager.pid
        trainer.save(seed=step, step=step, size_bytes=LARGE_BYTES)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: manager.pid not in {0, pid}, "the manager to start it again")
    assert_whole(manager, 1, 2)
    trainer.dies_of("save", seed=3, step=3, size_bytes=LARGE_BYTES, die="after", victims=[manager.pid])
    assert_whole(manager, 1, 2, 3)
    doctor = {check["name"]: check for check in json.loads(manager.ckpt("doctor", "--json"))["checks"]}
    assert doctor["fd store"]["status"] == "ok", "before systemd 254 what it kept is the only proof"
    spool = manager.dir / "state" / "ckptd" / "spool"
    assert list(spool.iterdir()) == [], "nothing had to go through the spool"


def test_saves_outlive_more_crashes_in_a_row_than_systemd_has_patience_with(
    manager: RealManager, nursery: Nursery
) -> None:
    """After five starts in ten seconds it would give the service up, and before 254 what it kept with it."""
    manager.control("start", "ckptd.service")
    trainer = opened(manager, nursery)
    trainer.dies_of("save", seed=1, step=1, size_bytes=LARGE_BYTES, die="after", victims=[manager.pid])
    pid = 0
    for _ in range(7):
        pid = eventually(lambda pid=pid: (found := manager.pid) not in {0, pid} and found, "the next daemon")
        os.kill(pid, signal.SIGKILL)
    assert_whole(manager, 1)


def test_a_daemon_that_stands_still_is_ended_by_the_watchdog_and_its_saves_arrive(
    manager: RealManager, nursery: Nursery
) -> None:
    """F28: the watchdog is fed by what goes round, so a stopped process is found."""
    manager.control("start", "ckptd.service")
    trainer = opened(manager, nursery)
    pid = manager.pid
    trainer.save(seed=1, step=1, size_bytes=LARGE_BYTES)
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: not is_alive(pid), "the watchdog to end it", 60.0)
    assert_whole(manager, 1)
    assert manager.control("show", "-p", "NRestarts", "--value", "ckptd.service") != "0"


def test_reload_and_stop_are_the_managers_and_the_socket_stays_for_the_next_one(
    manager: RealManager, nursery: Nursery
) -> None:
    manager.control("start", "ckptd.service")
    trainer = opened(manager, nursery)
    config = manager.dir / "config" / "ckptd" / "config.toml"
    config.parent.mkdir()
    config.write_text("[retention]\nkeep_last = 7\n")
    manager.control("reload", "ckptd.service")
    eventually(lambda: "keep_last" in manager.ckpt("log"), "the reload to be told of")
    pid = manager.pid
    trainer.save(seed=1, step=1, size_bytes=LARGE_BYTES)
    began_s = time.monotonic()
    manager.control("stop", "ckptd.service")
    assert not is_alive(pid)
    assert time.monotonic() - began_s < 30.0
    assert manager.control("show", "-p", "Result", "--value", "ckptd.service") == "success"
    assert_whole(manager, 1)  # its connection starts the next one
    assert manager.pid not in {0, pid}
