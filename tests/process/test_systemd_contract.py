"""The daemon as a service: no supervisor of ckptd's own, a manager that does what systemd does. F23, F28, I12"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import payload
from tests.support.managed import Managed
from tests.support.node import arenas_of, eventually, is_alive
from tests.support.trainer import Nursery, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LONG = "delay:60"


@pytest.fixture
def service(short_dir: Path) -> Iterator[Managed]:
    """A service that is not started yet."""
    made = Managed(short_dir)
    yield made
    print(made.tail())
    made.clean_up()


def opened(node: Managed, nursery: Nursery, name: str) -> Trainer:
    """A trainer with an open experiment and memory at hand."""
    trainer = nursery.trainer(node.environ)
    trainer.open(name=name, project="service", dir=str(node.runs))
    assert trainer.prepare(seed=1)["ready"]
    return trainer


def assert_arrives(node: Managed, name: str, saves: dict[str, int]) -> None:
    """Each id is there once, verified, with the bytes of its seed, which is its step as well."""
    for checkpoint in saves:
        node.wait_level(checkpoint)
    rows = node.rows("service", name)
    assert {row["checkpoint"]: row["step"] for row in rows} == saves
    assert len(rows) == len(saves)
    for row in rows:
        payload.check_saved(Path(row["path"]), row["step"])


def doctor(node: Managed, name: str) -> dict[str, Any]:
    """One line of the daemon's own examination."""
    (found,) = [check for check in node.ask("doctor")["checks"] if check["name"] == name]
    return dict(found)


def test_ready_comes_after_recovery_and_an_acknowledged_arena_was_stored_before(
    service: Managed, nursery: Nursery
) -> None:
    """F23. What the manager holds when `save()` has returned is what the next daemon starts from."""
    service.request_s = 60.0
    service.start()
    trainer = opened(service, nursery, "kept")
    service.arm("copy.fsynced", LONG)
    saved = trainer.save(seed=1, step=1)
    service.wait_fired()
    row = service.row(saved["id"])
    assert row is not None
    assert row["level"] == "staged"  # acknowledged, and nowhere but in memory
    journal = service.manager.journal
    held = [name for name, _ in service.manager.store]
    assert held
    assert all(name.startswith("arena-") for name in held)
    first = service.manager.pid
    environ = Path(f"/proc/{first}/environ").read_bytes().split(b"\0")
    assert {b"PYTHONMALLOC=malloc", b"GLIBC_TUNABLES=glibc.malloc.tcache_count=0"} <= set(environ)
    os.kill(first, signal.SIGKILL)
    service.manager.until(lambda: service.manager.pid not in {0, first}, "the next daemon")
    assert_arrives(service, "kept", {saved["id"]: 1})
    recovered = eventually(
        lambda: len(said := service.said("daemon.recovered")) == len(service.said("daemon.ready")) == 2 and said,
        "both to have said so",
    )
    assert [found["arenas"] for found in recovered] == [0, len(held)]
    assert recovered[-1]["timestamp"] <= service.said("daemon.ready")[-1]["timestamp"]
    assert journal.results == ["signal 9"]
    assert journal.said("READY") == ["1", "1"]
    assert journal.strangers == 0  # no worker speaks in the daemon's name
    assert trainer.stats()["failed"] == 0


def test_names_that_nobody_knows_leave_the_store(service: Managed, nursery: Nursery) -> None:
    """F23. What another version stored under names of its own must not be carried along for ever."""
    service.start()
    trainer = opened(service, nursery, "clean")
    saved = trainer.save(seed=1, step=1)
    service.wait_level(saved["id"])
    strange = {"future-thing": os.memfd_create("x"), "arena-" + "0" * 32: os.memfd_create("y")}
    manager = service.manager
    manager.store += list(strange.items())
    before = {name for name, _ in manager.store} - set(strange)
    manager.restart()
    eventually(lambda: not {name for name, _ in manager.store} & set(strange), "the strange names to go")
    assert {name for name, _ in manager.store} == before
    unknown = eventually(lambda: service.said("fd.unknown"), "it to be said")
    assert [entry["name"] for entry in unknown] == ["future-thing"]
    # The daemon and the manager hold the same memory: none leaked, none forgotten.
    assert arenas_of(manager.pid) == {os.fstat(fd).st_ino for _, fd in manager.store}
    assert trainer.save(seed=2, step=2)["error"] is None


def test_a_stop_empties_the_store_and_nothing_acknowledged_is_lost(service: Managed, nursery: Nursery) -> None:
    """F23. Systemd before 254 forgets descriptors at a stop: by then all is published or in the spool."""
    service.drain_s, service.request_s = 0.5, 60.0
    service.start()
    trainer = opened(service, nursery, "stopped")
    done = trainer.save(seed=1, step=1)
    service.wait_level(done["id"], "durable")
    service.arm("copy.chunk", LONG)
    held = trainer.save(seed=2, step=2)
    service.wait_fired()
    service.stop()
    assert service.manager.store == []
    assert service.manager.journal.killed == 0
    assert [path.name for path in service.spool.glob("*.arena")] == [f"{held['id']}.arena"]
    service.start()
    assert_arrives(service, "stopped", {done["id"]: 1, held["id"]: 2})
    assert trainer.save(seed=3, step=3)["error"] is None


@pytest.mark.parametrize("unit", [{"store_max": 0}, {"says_max": False}], ids=["off", "before systemd 254"])
def test_without_a_store_that_is_known_doctor_says_so(service: Managed, unit: dict[str, Any]) -> None:
    """The manager returns no error when it keeps nothing: only $FDSTORE tells."""
    service.unit = unit
    service.start()
    found = doctor(service, "fd store")
    assert found["status"] == "warn"
    assert "$FDSTORE" in found["detail"]
    assert "FileDescriptorStoreMax" in found["hint"]


def test_a_store_that_is_full_is_no_reason_to_stand_still_and_is_named(service: Managed, nursery: Nursery) -> None:
    """Beyond FileDescriptorStoreMax the manager drops descriptors without a word: no arena is lent that it would drop."""
    service.unit = {"store_max": 1}
    service.start()
    first = nursery.trainer(service.environ)
    first.open(name="one", project="service", dir=str(service.runs))
    first.prepare(seed=1, wait_s=0.5)
    second = nursery.trainer(service.environ)
    second.open(name="two", project="service", dir=str(service.runs))
    saved = second.save(seed=2, step=2)
    assert saved["error"] is None
    assert second.flush()["safe"]  # in the spool: the one arena that the manager keeps is another's
    found = doctor(service, "fd store")
    assert found["status"] == "warn"
    assert "full" in found["detail"]
    assert service.manager.journal.refused == []
    assert first.save(seed=1, step=1)["error"] is None
    assert_arrives(service, "two", {saved["id"]: 2})


def test_a_daemon_whose_writer_stands_still_is_aborted_and_comes_back(service: Managed, nursery: Nursery) -> None:
    """F30. The watchdog hears of progress or of nothing."""
    service.unit = {"watchdog_s": 10.0}
    service.start()
    trainer = opened(service, nursery, "stuck")
    first = trainer.save(seed=1, step=1)
    service.wait_level(first["id"])
    pid = service.manager.pid
    service.manager.until(lambda: "1" in service.manager.journal.said("WATCHDOG"), "a first sign of life")
    service.arm("catalog.commit", LONG)
    second = trainer.save(seed=2, step=2)
    service.manager.until(lambda: service.manager.journal.aborted == 1, "the watchdog", 60)
    service.manager.until(lambda: service.manager.pid not in {0, pid}, "the next daemon", 60)
    assert service.manager.journal.results == ["watchdog"]
    assert_arrives(service, "stuck", {first["id"]: 1, second["id"]: 2})
    assert "Fatal Python error: Aborted" in service.log.read_text(errors="replace")  # every thread's stack


@pytest.mark.faults
def test_a_second_sigterm_speeds_the_stop_up(service: Managed, nursery: Nursery) -> None:
    """I12."""
    service.request_s = 60.0
    service.start()
    trainer = opened(service, nursery, "hurried")
    service.arm("copy.chunk", LONG)
    saved = trainer.save(seed=1, step=1)
    service.wait_fired()
    service.manager.begin_stop()
    service.manager.until(lambda: service.manager.journal.said("STOPPING"), "the drain")
    begun = time.monotonic()
    service.manager.begin_stop()
    service.manager.wait("inactive")
    assert time.monotonic() - begun < 30.0
    assert service.manager.journal.killed == 0
    service.manager.empty_store()
    service.start()
    assert_arrives(service, "hurried", {saved["id"]: 1})


def test_a_stop_that_takes_longer_asks_for_time_as_it_goes(service: Managed, nursery: Nursery) -> None:
    """I12. TimeoutStopSec is shorter than the drain: every limit that the manager sets was moved before it passed."""
    service.unit = {"stop_s": 6.0}
    service.drain_s, service.request_s = 30.0, 60.0
    service.start()
    trainer = opened(service, nursery, "slow")
    service.arm("copy.fsynced", "delay:14")  # of which a slow machine spends some until it is asked to stop
    saved = trainer.save(seed=1, step=1)
    service.wait_fired()
    took_s = service.manager.stop()
    assert took_s > 6.1
    assert service.manager.journal.killed == 0
    assert service.manager.journal.results == ["exit-code 0"]
    payload.check_saved(service.runs / "service" / "slow" / "step_0000000001", 1)
    assert not list(service.spool.iterdir())
    service.start()
    assert_arrives(service, "slow", {saved["id"]: 1})


@pytest.mark.faults
def test_nothing_of_the_service_is_left_when_it_is_stopped(service: Managed, nursery: Nursery) -> None:
    """Workers end with the daemon: the manager has nobody to kill."""
    service.start()
    trainer = opened(service, nursery, "family")
    service.wait_level(trainer.save(seed=1, step=1)["id"])
    family = service.family()
    assert len(family) >= 2
    service.stop()
    assert not any(is_alive(pid) for pid in family)
    assert service.manager.journal.said("STOPPING") == ["1"]


@pytest.mark.faults
@pytest.mark.skipif(shutil.which("strace") is None or os.getuid() != 0, reason="needs root and strace")
def test_a_disk_that_never_ends_a_commit_is_no_progress_though_the_loop_goes_round(
    service: Managed, nursery: Nursery
) -> None:
    """F30. The catalog's disk hangs in fdatasync: requests that need no write are answered, the watchdog is not fed."""
    service.unit = {"watchdog_s": 4.0}
    service.start()
    trainer = opened(service, nursery, "hung")
    pid = service.manager.pid
    delay = "inject=fdatasync,fsync:delay_enter=60000000"
    with (service.dir / "strace").open("w") as log:
        strace = subprocess.Popen(
            ["strace", "-f", "-p", str(pid), "-e", "trace=fdatasync,fsync", "-e", delay], stderr=log
        )
    try:
        eventually(lambda: "attached" in (service.dir / "strace").read_text(), "strace to attach")
        saved = trainer.save(seed=1, step=1)
        service.manager.until(lambda: service.manager.journal.aborted == 1, "the watchdog", 30)
        assert service.said("loop.lag") == []
    finally:
        strace.kill()
        strace.wait()
    service.manager.until(lambda: service.manager.pid not in {0, pid}, "the next daemon", 30)
    assert service.manager.journal.results == ["watchdog"]
    assert_arrives(service, "hung", {saved["id"]: 1})
