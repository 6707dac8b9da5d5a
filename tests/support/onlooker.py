"""A node as somebody sees it who writes files beside it: which rows a path has, how often the daemon looked, what it said when."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd_client import wire
from tests.support.node import PATIENCE_S, Node, eventually

CKPT = Path(sys.executable).with_name("ckpt")
CKPT_S = 60.0

# Patience as in production, so that a busy machine changes nothing; only the intervals are shorter.
CONFIG = """\
drain_s = 20
[arenas]
bytes_max = 536870912
[catalog]
ballast_bytes = 1048576
[watching]
reconcile_s = {reconcile_s}
reconcile_max_s = {reconcile_s}
quiet_s = {quiet_s}
{more}
"""


@dataclass
class Said:
    """One run of `ckpt`."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """What --json printed."""
        found: dict[str, Any] = json.loads(self.out)
        return found


@dataclass
class Onlooker(Node):
    """A node with quick scans. `reconcile_s` is the bound of promise 5 here."""

    reconcile_s: float = 1.0
    quiet_s: float = 0.2
    _log_at: int = 0
    _log: list[dict[str, Any]] = field(default_factory=list)

    def configure(self, more: str | None = None) -> None:
        """Write the configuration; a running daemon reads it on SIGHUP."""
        self.more = self.more if more is None else more
        text = CONFIG.format(reconcile_s=self.reconcile_s, quiet_s=self.quiet_s, more=self.more)
        (self.dir / "toml").write_text(text)

    # -- roots and rows ----------------------------------------------------------------------

    def watch(self, path: Path, project: str) -> Path:
        """Have a directory watched, and wait until it was looked at once."""
        path.mkdir(parents=True, exist_ok=True)
        added = self.ask("root.add", path=str(path), kind="watched", project=project)
        assert added["ok"], added
        self.wait_scans(path, 1)
        return path

    def at(self, path: Path) -> list[dict[str, Any]]:
        """Every row that has ever been at a path, the oldest first."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            page = self.ask("list", state="all", limit=500, after=after)
            found += [row for row in page["checkpoints"] if row["path"] == str(path)]
            after = page["next"]
            if after is None:
                return sorted(found, key=lambda row: row["sequence"])

    def wait_found(self, path: Path, count: int = 1) -> dict[str, Any]:
        """Return the newest row of a path once it has had `count`."""
        return eventually(lambda: len(rows := self.at(path)) >= count and rows, f"{count} rows of {path}")[-1]

    def wait_state(self, checkpoint: str, state: str) -> dict[str, Any]:
        """Return the row once it is in a state."""

        def there() -> dict[str, Any] | None:
            row = self.row(checkpoint)
            return row if row is not None and row["state"] == state else None

        found: dict[str, Any] = eventually(there, f"{checkpoint} to be {state}")
        return found

    def wait_done(self, path: Path, count: int = 1) -> dict[str, Any]:
        """Return the row once the newest of `count` at this path is verified."""
        return self.wait_level(self.wait_found(path, count)["checkpoint"])

    def digests(self, checkpoint: str) -> dict[str, str]:
        """The recorded SHA-256 of each file of a checkpoint."""
        return {file["path"]: file["sha256"] for file in self.ask("show", selector=checkpoint)["files"]}

    # -- what the daemon does ----------------------------------------------------------------

    def news(self, event: str) -> list[dict[str, Any]]:
        """All lines of the log with this event, read once each."""
        with self.log.open("rb") as log:
            log.seek(self._log_at)
            whole, _, _ = log.read().rpartition(b"\n")
        self._log_at += len(whole) + bool(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                self._log.append(entry)
        return [entry for entry in self._log if entry.get("event") == event]

    def looks(self, checkpoint: str) -> int:
        """How often the daemon has asked whether this one's writer is done."""
        asked = self.news("stage.done")
        return sum(entry["stage"] == "settle" and entry["checkpoint"] == checkpoint for entry in asked)

    def wait_looks(self, *paths: Path, more: int = 2) -> None:
        """Return once the daemon has asked `more` times from now on about each path.

        AssertionError as soon as one of them gets a level.
        """
        rows = [self.wait_found(path)["checkpoint"] for path in paths]
        wanted = {row: self.looks(row) + more for row in rows}

        def asked() -> bool:
            for row in map(self.row, rows):
                assert row is not None
                assert (row["state"], row["level"]) == ("pending", "none"), row
            return all(self.looks(row) >= count for row, count in wanted.items())

        eventually(asked, f"{more} more looks at {paths}")

    def scans(self, root: Path) -> int:
        """How often all of a root was compared with the catalog."""
        return sum(entry["root"] == str(root) for entry in self.news("reconcile.done"))

    def wait_scans(self, root: Path, more: int = 2) -> None:
        """Return once the whole root was scanned `more` times from now on; the last of two began after this call."""
        before = self.scans(root)
        eventually(lambda: self.scans(root) >= before + more, f"{more} scans of {root}")

    @contextmanager
    def following(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Follow the daemon's events from now on."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(PATIENCE_S)
            peer.connect(str(self.socket))
            hello = {"v": 1, "id": 0, "op": "hello", "client": "test", "pid": os.getpid(), "versions": [1]}
            peer.sendall(
                wire.encode(hello) + wire.encode({"v": 1, "id": 1, "op": "events", "limit": 1, "follow": True})
            )
            with peer.makefile("rb") as lines:
                assert wire.decode(lines.readline())["ok"]
                assert wire.decode(lines.readline())["ok"]
                yield (said["event"] for said in map(wire.decode, lines) if said.get("push") == "event")

    # -- the command -------------------------------------------------------------------------

    @property
    def shell(self) -> dict[str, str]:
        """The environment of somebody who types `ckpt` for this node."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "XDG_"))}
        return {**clean, **self.environ, "CKPTD_CONFIG": str(self.dir / "toml"), "XDG_CONFIG_HOME": str(self.dir)}

    def run(self, *arguments: str, given: str | None = None) -> Said:
        """Run the real `ckpt`, whatever its exit code is."""
        done = subprocess.run(
            [str(CKPT), *arguments],
            capture_output=True,
            text=True,
            timeout=CKPT_S,
            env=self.shell,
            input=given,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Said(done.returncode, done.stdout, done.stderr)


def make(**settings: Any) -> Onlooker:
    """A node on a directory of its own, whose path is short enough for a socket."""
    return Onlooker(Path(tempfile.mkdtemp(prefix="ck")), **settings)


def end(node: Node) -> None:
    """End every process of a node and remove its files."""
    try:
        node.clean_up()
    finally:
        shutil.rmtree(node.dir, ignore_errors=True)
