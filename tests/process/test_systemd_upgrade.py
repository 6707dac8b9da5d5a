"""A new version takes over from an old one: arenas, socket and catalog; trainers notice nothing. M038, F23, F28"""

import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import payload
from tests.support.managed import Managed
from tests.support.node import eventually
from tests.support.run_version import NEXT, make_home
from tests.support.service_manager import Unit
from tests.support.trainer import Nursery, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SCRIPT = Path(__file__).parents[1] / "support" / "run_version.py"
THREADS, SAVES = 2, 15


@pytest.fixture
def service(short_dir: Path) -> Iterator[Managed]:
    """A service that is not started yet."""
    made = Managed(short_dir, drain_s=0.5)
    yield made
    print(made.tail())
    made.clean_up()


def opened(node: Managed, nursery: Nursery, name: str) -> Trainer:
    """A trainer with an open experiment and memory at hand."""
    trainer = nursery.trainer(node.environ)
    trainer.open(name=name, project="upgrade", dir=str(node.runs))
    assert trainer.prepare(seed=1)["ready"]
    return trainer


def next_version(service: Managed) -> Unit:
    """The unit after the upgrade."""
    home = service.dir / "next"
    make_home(home)
    made = replace(service, program=("-P", str(SCRIPT), "0.2.0", str(home)))
    return made.described()


def revision(service: Managed) -> str:
    """The catalog's schema, as the file says."""
    raw = sqlite3.connect(f"file:{service.state}/catalog.sqlite?mode=ro", uri=True)
    try:
        return str(raw.execute("SELECT version_num FROM alembic_version").fetchone()[0])
    finally:
        raw.close()


@pytest.mark.parametrize("how", ["restart", "crash"])
def test_a_new_version_adopts_arenas_socket_and_catalog_of_the_old_one(
    service: Managed, nursery: Nursery, how: str
) -> None:
    """Three saves, one before, one held back over the change, one after: all arrive; nobody was told of an error."""
    service.request_s = 60.0
    service.start()
    trainer = opened(service, nursery, "run")
    saves = {trainer.save(seed=1, step=1)["id"]: 1}
    service.wait_level(next(iter(saves)))
    service.arm("copy.fsynced", "delay:60")
    saves[trainer.save(seed=2, step=2)["id"]] = 2
    service.wait_fired()
    door, pid, old = os.stat(service.socket).st_ino, service.manager.pid, revision(service)
    new = next_version(service)
    if how == "restart":
        service.manager.restart(new)
    else:
        service.manager.unit = new
        os.kill(pid, signal.SIGKILL)
        service.manager.until(lambda: service.manager.pid not in {0, pid}, "the next daemon")
    assert service.status()["daemon"]["version"] == "0.2.0"
    saves[trainer.save(seed=3, step=3)["id"]] = 3
    for checkpoint in saves:
        service.wait_level(checkpoint)
    rows = service.rows("upgrade", "run")
    assert {row["checkpoint"]: row["step"] for row in rows} == saves
    for row in rows:
        payload.check_saved(Path(row["path"]), row["step"])
    eventually(lambda: len(service.said("daemon.recovered")) > 1, "the new one to say what it took over")
    assert service.said("daemon.recovered")[-1]["arenas"] >= 1
    assert os.stat(service.socket).st_ino == door
    assert (old, revision(service)) == (old, NEXT)
    assert (service.state / f"catalog.sqlite.before-{NEXT}").exists()
    eventually(lambda: trainer.stats()["connected"], "the trainer to be back")
    assert trainer.stats()["failed"] == 0
    assert service.manager.journal.killed == 0


def test_a_downgrade_is_refused_with_advice_and_nothing_is_lost_meanwhile(service: Managed, nursery: Nursery) -> None:
    """M040. The old version may not guess at a schema it has never seen; what trainers save waits for the right one."""
    old, new = service.described(), next_version(service)
    service.configure()
    service.start()
    trainer = opened(service, nursery, "run")
    service.manager.restart(new)
    saves = {trainer.save(seed=1, step=1)["id"]: 1}
    service.wait_level(next(iter(saves)))
    service.manager.restart(old, ready=False)
    service.manager.until(lambda: "exit-code 1" in service.manager.journal.results, "the refusal", 30)
    (said, *_) = eventually(lambda: service.said("daemon.ended"), "the reason")
    assert said["code"] == "catalog_fault"
    assert NEXT in said["message"]
    assert "upgrade ckptd" in said["hint"]
    assert json.loads((service.dir / "sock.error").read_bytes())["error"]["message"] == said["message"]
    answer = trainer.save(seed=2, step=2)
    assert answer["error"] is None
    saves[answer["id"]] = 2
    assert trainer.flush()["safe"]
    service.manager.unit = new
    service.manager.wait("active")
    assert not (service.dir / "sock.error").exists()
    for checkpoint in saves:
        service.wait_level(checkpoint)
    assert {row["checkpoint"]: row["step"] for row in service.rows("upgrade", "run")} == saves


def stop_at_random(service: Managed, nursery: Nursery, seed: int, stops: int = 4) -> None:
    """Stops, hurried stops, restarts, reloads and kills under load; then everything that was saved is there."""
    chance = random.Random(seed)
    print(f"seed {seed}")
    service.start()
    trainer = nursery.trainer(service.environ)
    given = {"threads": THREADS, "saves": SAVES, "project": "upgrade", "directory": str(service.runs), "first": 0}
    trainer.begin("stream", **given)
    manager = service.manager
    for _ in range(stops):
        time.sleep(chance.uniform(0.0, 0.6))
        for _ in range(chance.choice((0, 30))):
            manager.kill(signal.SIGHUP)
        how = chance.choice(("stop", "hurry", "restart", "kill"))
        if how == "restart":
            manager.restart()
        elif how == "kill":
            pid = manager.pid
            manager.kill(signal.SIGKILL)
            manager.until(lambda gone=pid: manager.pid not in {0, gone}, "the next daemon")
            manager.wait("active")
        else:
            manager.begin_stop()
            if how == "hurry":
                time.sleep(chance.uniform(0.0, 0.2))
                manager.kill(signal.SIGTERM)
            manager.wait("inactive")
            manager.empty_store()
            time.sleep(chance.uniform(0.0, 0.3))
            manager.start()
    assert manager.journal.killed == 0
    made = trainer.answer()["saves"]
    trainer.quit()  # its exit handler brings what is still its own into the spool
    saved = {checkpoint: (name, step) for name, each in made.items() for checkpoint, step, _ in each}
    assert len(saved) == THREADS * SAVES
    for checkpoint in saved:
        service.wait_level(checkpoint, patience_s=60.0)
    for name in made:
        steps = [row["step"] for row in service.rows("upgrade", name)]
        assert steps == list(range(SAVES))
    assert not service.said("daemon.broke")


def test_stops_at_random_under_load_lose_nothing(service: Managed, plain_nursery: Nursery) -> None:
    """F28, I12."""
    stop_at_random(service, plain_nursery, seed=1, stops=2)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(2, 14))
def test_stops_at_many_random_moments_under_load_lose_nothing(
    service: Managed, plain_nursery: Nursery, seed: int
) -> None:
    """F28, I12."""
    stop_at_random(service, plain_nursery, seed)
