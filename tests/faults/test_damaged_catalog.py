"""A node whose catalog is damaged, foreign, from the future, read-only, or gone: it refuses with advice, or finds all again. F19"""

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.node import Node, eventually, is_alive
from tests.support.signals import kill
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(180)]
PROJECT = "damage"
SAVES = 4
START_S = 30.0


def flipped(catalog: Path) -> None:
    """One page in the middle is no page any more."""
    raw = bytearray(catalog.read_bytes())
    middle = len(raw) // 2 // 4096 * 4096
    raw[middle : middle + 4096] = bytes(b ^ 0xFF for b in raw[middle : middle + 4096])
    catalog.write_bytes(raw)


def foreign(catalog: Path) -> None:
    catalog.write_text("Dear diary,\n" * 1000)


def from_the_future(catalog: Path) -> None:
    with sqlite3.connect(catalog) as other:
        other.execute("UPDATE alembic_version SET version_num = '9999'")
    other.close()


def somebody_elses(catalog: Path) -> None:
    catalog.unlink()
    with sqlite3.connect(catalog) as other:
        other.execute("CREATE TABLE recipe (name TEXT)")
    other.close()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flipped, "ckpt rebuild"),
    "foreign": (foreign, "ckpt rebuild"),
    "from the future": (from_the_future, "upgrade ckptd"),
    "somebody else's": (somebody_elses, "catalog.url"),
}


@pytest.fixture
def saved(node: Node, plain_nursery: Nursery) -> dict[str, int]:
    """What lies under the node's root, by id; the node is stopped."""
    node.start()
    trainer = plain_nursery.trainer(node.environ)
    trainer.open(name="run", project=PROJECT, dir=str(node.runs))
    found = {trainer.save(seed=step, step=step)["id"]: step for step in range(SAVES)}
    for checkpoint in found:
        node.wait_level(checkpoint)
    node.wait_idle()
    trainer.end()
    return found


def refused(node: Node) -> str:
    """Start the daemon itself; return what it says when it refuses."""
    places = ["--config", str(node.dir / "toml"), "--state-dir", str(node.state), "--socket", str(node.dir / "other")]
    words = [sys.executable, "-P", "-m", "ckptd.daemon", *places, "--log-format", "json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode not in {0, 78}, done.stderr
    return done.stderr


@pytest.mark.parametrize(("damage", "advice"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_catalog_is_refused_with_advice_and_left_as_it_is(
    node: Node, saved: dict[str, int], damage: Callable[[Path], None], advice: str
) -> None:
    """F19. The daemon does not run on it, says what to do, and changes not one byte of the evidence."""
    assert node.stop() == 0
    catalog = node.state / "catalog.sqlite"
    damage(catalog)
    evidence = catalog.read_bytes()
    assert advice in refused(node)
    assert catalog.read_bytes() == evidence


@pytest.mark.parametrize("gone", ["catalog.sqlite*", "catalog.sqlite-wal"])
def test_a_lost_catalog_or_log_is_made_again_from_the_manifests(node: Node, saved: dict[str, int], gone: str) -> None:
    """F19, I5. After a crash somebody removes the files, or only the log with the last commits in it."""
    assert node.supervisor is not None
    pids = [node.supervisor.pid, *node.family()]
    kill(pids)
    node.supervisor.wait()
    eventually(lambda: not any(is_alive(pid) for pid in pids), "everything's end")
    removed = [path.unlink() for path in node.state.glob(gone)]
    assert removed
    node.start()
    node.ckpt("rebuild", str(node.runs))
    for checkpoint, step in saved.items():
        row = node.wait_level(checkpoint)
        assert row["step"] == step
    assert len(node.rows(PROJECT, "run")) == SAVES
