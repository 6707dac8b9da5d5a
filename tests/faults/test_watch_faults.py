"""Watched trees whose events are not to be had, or get lost in the thousands: the scans find everything. Promise 5."""

import os
import shutil
import signal
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import eventually
from tests.support.onlooker import Onlooker, end, make

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BODY = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
SMALL = struct.pack("<Q", len(BODY)) + BODY + struct.pack("<f", 1.0)  # the smallest whole safetensors file
WATCHES = 5
BURST = 12_000


@pytest.fixture
def limited() -> Iterator[Onlooker]:
    """A node in a user namespace of its own, which may watch WATCHES directories."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare")
    words = (f'echo {WATCHES} > /proc/sys/user/max_inotify_watches && exec "$@"', "sh")
    prefix = (unshare, "--user", "--map-root-user", "sh", "-c", *words)
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no user namespaces here: {tried.stderr.strip()}")
    made = make(prefix=prefix).start()
    yield made
    print(made.tail())
    end(made)


def put(directory: Path, count: int) -> set[str]:
    """Write whole small files; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {directory / f"model_{number}.safetensors" for number in range(count)}
    for path in paths:
        path.write_bytes(SMALL)
    return {str(path) for path in paths}


def verified(node: Onlooker, project: str) -> int:
    return int(node.ask("summary", project=project).get("by_level", {}).get("verified", 0))


def paths_of(node: Onlooker, project: str) -> Counter[str]:
    found: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        page = node.ask("list", project=project, limit=500, after=after)
        found += page["checkpoints"]
        after = page["next"]
        if after is None:
            return Counter(row["path"] for row in found)


def test_a_tree_that_can_not_be_watched_is_scanned_and_told(limited: Onlooker, tmp_path: Path) -> None:
    """F13. More directories than watches: status and doctor name the sysctl, and what comes is found by the timer."""
    root = tmp_path / "root"
    for number in range(4 * WATCHES):
        (root / f"run{number}").mkdir(parents=True)
    limited.watch(root, "limited")
    told = eventually(
        lambda: [d for d in limited.status()["daemon"]["degraded"] if d["what"] == f"watching {root}"], "it to be told"
    )
    assert "fs.inotify.max_user_watches" in told[0]["why"]
    (check,) = [check for check in limited.ask("doctor")["checks"] if check["name"] == f"watching {root}"]
    assert (check["status"], "fs.inotify.max_user_watches" in check["detail"]) == ("warn", True)
    late = set()
    for number in range(4 * WATCHES):
        late |= put(root / f"run{number}" / "deep", 1)
    eventually(lambda: verified(limited, "limited") == len(late), "all to be verified")
    assert paths_of(limited, "limited") == Counter(dict.fromkeys(late, 1))


@pytest.mark.faults
def test_twelve_thousand_files_behind_a_full_queue_are_all_found(tmp_path: Path) -> None:
    """F12. Nobody reads the kernel's queue while they come: it overflows, and not one of them is missed."""
    node = make(reconcile_s=5.0).start()
    try:
        root = node.watch(tmp_path / "root", "burst")
        family = [node.daemon_pid, *node.workers()]
        for pid in family:
            os.kill(pid, signal.SIGSTOP)
        try:
            paths = set()
            for number in range(BURST // 100):
                paths |= put(root / f"run{number}", 100)
        finally:
            for pid in family:
                os.kill(pid, signal.SIGCONT)
        eventually(
            lambda: sum(node.ask("summary", project="burst")["by_state"].values()) >= BURST, "all to be found", 120.0
        )
        assert paths_of(node, "burst") == Counter(dict.fromkeys(paths, 1))
    finally:
        end(node)
