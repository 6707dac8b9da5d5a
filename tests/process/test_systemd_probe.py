"""How a service tells of trouble: the probe, the manager's STATUS line, doctor, the log. M162"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.managed import Managed
from tests.support.node import eventually, is_alive
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CKPT = Path(sys.executable).with_name("ckpt")


@pytest.fixture
def service(short_dir: Path, request: pytest.FixtureRequest) -> Iterator[Managed]:
    """A service that beats every six seconds unless its test wants it otherwise, without fail points: it can be well."""
    watched = short_dir / "legacy"
    watched.mkdir()
    more = f'[[roots]]\npath = "{watched}"\nkind = "watched"\n'
    made = Managed(
        short_dir, unit={"watchdog_s": getattr(request, "param", 12.0)}, armed=False, more=more, reconcile_s=0.5
    )
    made.start()
    yield made
    print(made.tail())
    made.clean_up()


def ckpt(node: Managed, *words: str) -> tuple[int, str]:
    """Run the real command; return its exit code and what it said."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "XDG_"))}
    environ = {**clean, **node.environ, "CKPTD_CONFIG": str(node.dir / "toml")}
    done = subprocess.run([CKPT, *words], capture_output=True, text=True, timeout=60, env=environ, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def check(node: Managed, name: str) -> dict[str, Any]:
    """One line of `ckpt doctor`."""
    _, said = ckpt(node, "doctor", "--json")
    (found,) = [each for each in json.loads(said)["checks"] if each["name"] == name]
    return dict(found)


def test_a_service_that_is_well_says_so_everywhere(service: Managed) -> None:
    code, line = ckpt(service, "status", "--probe")
    assert (code, line) == (0, "serving; 0 jobs queued, 0 running\n")
    service.manager.until(lambda: "WATCHDOG" in service.manager.journal.messages[-2], "a beat", 30)
    assert service.manager.status == line.strip()
    code, said = ckpt(service, "doctor", "--json")
    found = json.loads(said)
    assert (code, found["ok"]) == (0, True)
    assert [each for each in found["checks"] if each["status"] == "fail"] == []


@pytest.mark.parametrize("service", [60.0], indirect=True)  # not aborted meanwhile
def test_a_daemon_that_stands_still_fails_its_probe_in_time(service: Managed) -> None:
    service.manager.kill(signal.SIGSTOP)
    begun = time.monotonic()
    code, line = ckpt(service, "status", "--probe", "--timeout", "300ms")
    assert (code, line.count("\n")) == (1, 1)
    assert time.monotonic() - begun < 30.0  # it stands still for ever
    service.manager.kill(signal.SIGCONT)


def test_a_root_that_vanishes_is_named_until_it_is_back(service: Managed) -> None:
    """Its checkpoints are not called missing: a disk that is not mounted looks the same."""
    root = service.dir / "legacy"
    (root / "step_1.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (row,) = eventually(lambda: service.ask("list")["checkpoints"], "the file to be found")
    service.wait_level(row["checkpoint"])
    root.rename(service.dir / "away")
    eventually(lambda: ckpt(service, "status", "--probe")[0] == 1, "the probe to fail")
    found = check(service, f"root {root}")
    assert found["status"] == "fail"
    assert "mount" in found["hint"]
    eventually(lambda: f"degraded: root {root}" in service.manager.status, "the manager to hear of it")
    (service.dir / "away").rename(root)
    eventually(lambda: ckpt(service, "status", "--probe")[0] == 0, "the probe to pass")
    assert service.row(row["checkpoint"])["state"] == "live"  # type: ignore[index]


@pytest.mark.faults
def test_a_worker_that_dies_again_and_again_is_a_warning(service: Managed, nursery: Nursery) -> None:
    """Saves go on: that is worth knowing, and no reason to page anybody."""
    trainer = nursery.trainer(service.environ)
    trainer.open(name="run", project="probe", dir=str(service.runs))
    for step in range(1, 4):
        service.wait_level(trainer.save(seed=step, step=step)["id"])
        (pid,) = service.workers()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda gone=pid: not is_alive(gone), "the worker's end")
    eventually(lambda: "worker /" in service.manager.status, "the manager to hear of it")
    code, line = ckpt(service, "status", "--probe")
    assert (code, line.startswith("serving, with warnings: worker /")) == (0, True)
    assert [entry["level"] for entry in service.said("worker.lost")] == ["warning"] * 3


@pytest.mark.faults
def test_a_checkpoint_that_rots_is_critical_in_the_log_and_named_by_doctor(service: Managed, nursery: Nursery) -> None:
    trainer = nursery.trainer(service.environ)
    trainer.open(name="rots", project="probe", dir=str(service.runs))
    saved = trainer.save(seed=1, step=1)
    path = Path(service.wait_level(saved["id"])["path"]) / "model.safetensors"
    trainer.close()
    service.stop()  # and with it the copy in memory, from which it would be mended
    service.start()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    code, _ = ckpt(service, "verify", saved["id"])
    assert code == 4
    (entry,) = service.said("checkpoint.corrupt")
    assert (entry["level"], entry["checkpoint"]) == ("critical", saved["id"])
    found = check(service, "checkpoints")
    assert (found["status"], found["detail"]) == ("warn", "1 corrupt, 0 missing")
