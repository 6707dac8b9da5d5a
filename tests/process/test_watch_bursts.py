"""Nothing is missed: bursts, nested directories, trees that come and go, a daemon that was away. Promise 5, F12, F14"""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import eventually
from tests.support.onlooker import Onlooker, end, make
from tests.support.trainer import Nursery

PATIENCE_S = 200.0  # hundreds of files: some seconds, on a machine that is slow and does much else a minute and more
pytestmark = [pytest.mark.xdist_group("watch_bursts"), pytest.mark.timeout(PATIENCE_S + 80)]
ROUNDS, DEPTH, FILES = 60, 3, 4
ROUNDS_LONG = 200
MANY, MANY_LONG = 4_000, 20_000
MANY_S = 900
BODY = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
SMALL = struct.pack("<Q", len(BODY)) + BODY + struct.pack("<f", 1.0)  # the smallest whole safetensors file
HASTY = """
import os, sys
root, rounds, depth, files, body = sys.argv[1], *map(int, sys.argv[2:5]), bytes.fromhex(sys.argv[5])
for number in range(rounds):
    directory = os.path.join(root, *(f"{number}-{level}" for level in range(depth)))
    os.makedirs(directory)
    for index in range(files):
        with open(os.path.join(directory, f"model_{index}.safetensors"), "wb") as file:
            file.write(body)
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Onlooker]:
    made = make().start()
    yield made
    end(made)


@pytest.fixture
def root(node: Onlooker, tmp_path: Path) -> Iterator[Path]:
    yield node.watch(tmp_path / "root", tmp_path.name)
    print(node.tail())


def hurry(root: Path, rounds: int = ROUNDS) -> set[str]:
    """Make nested directories with files in them as fast as a process can; return the files."""
    words = (str(root), str(rounds), str(DEPTH), str(FILES), SMALL.hex())
    subprocess.run([sys.executable, "-S", "-c", HASTY, *words], check=True)
    return {str(path) for path in root.rglob("*.safetensors")}


def levels(node: Onlooker, project: str) -> Counter[str]:
    """How many rows of a project are in which state, and how many of them are verified."""
    found = node.ask("summary", project=project)
    return Counter(found.get("by_state", {})) + Counter(verified=found.get("by_level", {}).get("verified", 0))


def states(node: Onlooker, project: str) -> Counter[str]:
    """How many rows of a project are in which state."""
    return Counter(node.ask("summary", project=project).get("by_state", {}))


def check_all(node: Onlooker, project: str, paths: set[str], patience_s: float = PATIENCE_S) -> None:
    """Every path has exactly one row, and it is verified."""
    eventually(lambda: levels(node, project)["verified"] >= len(paths), f"{len(paths)} to be verified", patience_s)
    rows = rows_of(node, project)
    assert Counter(row["path"] for row in rows) == Counter(dict.fromkeys(paths, 1))
    assert {(row["state"], row["level"]) for row in rows} == {("live", "verified")}


def rows_of(node: Onlooker, project: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        page = node.ask("list", project=project, limit=500, after=after)
        found += page["checkpoints"]
        after = page["next"]
        if after is None:
            return found


@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(ROUNDS_LONG, marks=pytest.mark.faults)])
def test_nested_directories_made_in_a_burst_are_all_found(node: Onlooker, root: Path, rounds: int) -> None:
    """A directory that is made and filled before it is watched has no event of its own: rounds of just that."""
    paths = hurry(root, rounds)
    assert len(paths) == rounds * FILES
    check_all(node, root.parent.name, paths)


def test_a_burst_while_the_daemon_and_its_watcher_stand_still_is_found(node: Onlooker, root: Path) -> None:
    """F12: nobody reads the kernel's queue meanwhile."""
    family = [node.daemon_pid, *node.workers()]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    try:
        paths = hurry(root)
    finally:
        for pid in family:
            os.kill(pid, signal.SIGCONT)
    check_all(node, root.parent.name, paths)


def test_a_tree_that_is_moved_in_is_found(node: Onlooker, root: Path) -> None:
    """One event for its top, none for what is in it."""
    hurry(root.parent / "elsewhere", 20)
    os.rename(root.parent / "elsewhere", root / "moved")
    check_all(node, root.parent.name, {str(path) for path in root.rglob("*.safetensors")})


def test_a_root_that_is_removed_and_made_again_is_watched_on(node: Onlooker, root: Path) -> None:
    """What was in it is missing, what comes is found, and the root is whole again for `ckpt roots`."""
    before = hurry(root, 5)
    check_all(node, root.parent.name, before)
    shutil.rmtree(root)
    root.mkdir()
    after = hurry(root / "new", 6)
    wanted = Counter(live=len(after), missing=len(before), verified=len(after) + len(before))
    eventually(lambda: levels(node, root.parent.name) == wanted, "the new ones alone to be live")
    rows = rows_of(node, root.parent.name)
    assert {row["path"] for row in rows if row["state"] == "missing"} == before
    assert {row["path"] for row in rows if row["state"] == "live"} == after
    (found,) = [r for r in node.ask("roots")["roots"] if r["path"] == str(root)]
    assert found["problem"] == ""
    late = root / "late_1.safetensors"
    late.write_bytes(SMALL)
    node.wait_done(late)


def test_a_root_that_is_not_there_loses_nothing_and_comes_back(node: Onlooker, root: Path) -> None:
    """A disk that is not mounted looks just like this: nothing of it is called missing."""
    paths = hurry(root, 3)
    check_all(node, root.parent.name, paths)
    os.rename(root, root.parent / "away")
    eventually(
        lambda: [r["state"] for r in node.ask("roots")["roots"] if r["path"] == str(root)] == ["degraded"],
        "the root to be called degraded",
    )
    assert levels(node, root.parent.name) == Counter(live=len(paths), verified=len(paths))
    os.rename(root.parent / "away", root)
    eventually(
        lambda: [r["state"] for r in node.ask("roots")["roots"] if r["path"] == str(root)] != ["degraded"],
        "the root to be well again",
    )
    node.wait_scans(root)
    check_all(node, root.parent.name, paths)


def test_files_written_while_no_daemon_runs_are_found_by_the_next(tmp_path: Path) -> None:
    node = make().start()
    try:
        root = node.watch(tmp_path / "root", "away")
        first = hurry(root, 5)
        check_all(node, "away", first)
        assert node.stop() == 0
        (root / "0-0" / "0-1" / "0-2" / "model_0.safetensors").unlink()
        hurry(root / "second", 20)
        node.start()
        paths = {str(path) for path in root.rglob("*.safetensors")}
        wanted = Counter(live=len(paths), verified=len(paths) + 1, missing=1)
        eventually(lambda: levels(node, "away") == wanted, "all to be verified, and one to be missing")
        assert {row["path"] for row in rows_of(node, "away") if row["state"] == "live"} == paths
    finally:
        end(node)


def away_while_many_come(tmp_path: Path, count: int) -> Onlooker:
    """Return a node that has just been started, over a root that got `count` small whole files since it was stopped."""
    node = make(reconcile_s=30.0).start()
    root = node.watch(tmp_path / "root", "many")
    assert node.stop() == 0
    for number in range(count):
        directory = root / f"run-{number // 100}"
        if number % 100 == 0:
            directory.mkdir()
        (directory / f"model_{number}.safetensors").write_bytes(SMALL)
    return node.start()


@pytest.mark.slow
@pytest.mark.parametrize("count", [MANY, pytest.param(MANY_LONG, marks=pytest.mark.faults)])
def test_thousands_of_files_written_while_no_daemon_runs_are_all_found(tmp_path: Path, count: int) -> None:
    """Each once, and the way to verified has begun: what is first through is whole."""
    begun_s = time.monotonic()
    node = away_while_many_come(tmp_path, count)
    try:
        made_s = time.monotonic()
        eventually(lambda: sum(states(node, "many").values()) >= count, "all to be found", PATIENCE_S)
        print(
            f"{count} files made in {made_s - begun_s:.1f} s, found {time.monotonic() - made_s:.1f} s after the start"
        )
        eventually(lambda: levels(node, "many")["verified"] >= count // 100, "the first to be verified")
        assert set(states(node, "many")) <= {"pending", "live"}
        assert len({row["path"] for row in rows_of(node, "many")}) == sum(states(node, "many").values()) == count
    finally:
        end(node)


@pytest.mark.faults
@pytest.mark.timeout(MANY_S + 120)
def test_twenty_thousand_files_written_while_no_daemon_runs_are_all_verified(tmp_path: Path) -> None:
    node = away_while_many_come(tmp_path, MANY_LONG)
    try:
        begun_s = time.monotonic()
        eventually(lambda: levels(node, "many")["verified"] >= MANY_LONG, "all to be verified", MANY_S)
        print(f"{MANY_LONG} files verified {time.monotonic() - begun_s:.0f} s after the start")
        assert states(node, "many") == Counter(live=MANY_LONG)
    finally:
        end(node)


def test_a_burst_of_files_holds_up_no_save(node: Onlooker, root: Path, nursery: Nursery) -> None:
    """A training's memory waits for its save, and nobody's for files that lie on the disk."""
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="hurries", dir=str(node.runs))
    assert trainer.prepare(seed=1)["ready"]
    project, paths = root.parent.name, hurry(root)
    eventually(lambda: sum(states(node, project).values()) >= len(paths) // 2, "the files to be queued")
    saved = str(trainer.save(seed=1, step=1)["id"])
    mine = node.wait_level(saved)
    trainer.quit()
    check_all(node, project, paths)
    verified = [row["verified_at"] for row in rows_of(node, project)]
    waiting = [at for at in verified if at > mine["staged_at"]]
    assert waiting, "all were done before it came"
    assert sum(at > mine["verified_at"] for at in waiting) > len(waiting) // 2, "it did not wait for them"
