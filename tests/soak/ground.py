"""What a soak runs on: one node, whose clock can be set and whose roots are a disk, a small disk and a watched tree."""

import contextlib
import json
import os
import sqlite3
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine

from ckptd.catalog import eventlog, versions
from tests.soak.crew import LEGACY, PROJECT
from tests.soak.run_daemon import IN_USE
from tests.support.node import LOOK_S, PATIENCE_S, Node, NotAnswering, eventually

SCRIPT = Path(__file__).with_name("run_node.py")
SMALL_MIB = 24
STIRRED = 8  # who ask at once: more than there are connections that read
OLD_EVENTS = eventlog.KEPT_MAX
_EVENTS = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
INSERT INTO event (at, name, data) SELECT 1700000000000000 + i, 'config.reloaded', json_object('changed', json_array(hex(zeroblob(80)))) FROM n
"""
RULES = f"""
[retention]
trash_grace_s = 0
[[experiments]]
project = "{PROJECT}"
name = "last-*"
keep_last = 3
brake_share = 1  # a clock that was wrong lets many go at once when it is right again
trash_grace_s = 0
[[experiments]]
project = "{PROJECT}"
name = "best-*"
keep_last = 2
keep_best = {{ metric = "val_loss", mode = "min" }}
brake_share = 1
trash_grace_s = 5
"""


@dataclass
class Ground(Node):
    """A node that is asked while it may be dead, stopped or locked."""

    more: str = RULES
    answers_bytes: int = 1 << 20  # full from the first look on: each look at more rows would else keep more of them
    small_is_mounted: bool = False
    _log_at: int = 0

    @property
    def clock(self) -> Path:
        """Seconds by which the daemon's wall clock is wrong."""
        return self.dir / "clock"

    @property
    def small(self) -> Path:
        """A file system of its own that is soon full."""
        return self.dir / "small"

    @property
    def watched(self) -> Path:
        """Where legacy scripts write."""
        return self.dir / "w"

    def command(self, *flags: str) -> list[str]:
        """The same supervisor, over a daemon whose clock can be set."""
        return [word if not word.endswith("/run_node.py") else str(SCRIPT) for word in super().command(*flags)]

    def prepare(self) -> None:
        """Make the places; mount the small one where that may be done."""
        self.clock.write_text("0")
        self.watched.mkdir()
        self.small.mkdir()
        os.environ["SOAK_CLOCK"] = str(self.clock)
        if os.geteuid() == 0:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_MIB}m", "tmpfs", str(self.small)]
            self.small_is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill_event_log(self) -> None:
        """Begin with a log as long as it ever gets: what still grows in a run is none of its making, nor are full caches."""
        self.state.mkdir(mode=0o700)
        catalog = self.state / "catalog.sqlite"
        engine = create_engine(f"sqlite:///{catalog}")
        with engine.begin() as made:
            versions.create(made)
        engine.dispose()
        with sqlite3.connect(catalog) as db:
            db.execute(_EVENTS, (OLD_EVENTS,))
        db.close()
        catalog.chmod(0o600)

    def in_use(self) -> dict[str, int]:
        """What the daemon said last of its memory, by names of `Sample`; {} when it says nothing."""
        try:
            return dict(json.loads(Path(f"{self.clock}{IN_USE}").read_text(encoding="ascii")))
        except (OSError, ValueError):
            return {}

    def give_back(self) -> None:
        """End every process, unmount, remove."""
        self.clean_up()
        if self.small_is_mounted:
            subprocess.run(["umount", "-l", str(self.small)], check=True)
        self.remove()

    def _is_ours(self, pid: int) -> bool:
        """Whether it is a process of ckptd still, the daemon's own start included."""
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        ours = {b"ckptd.worker", os.fsencode(SCRIPT), os.fsencode(SCRIPT.with_name("run_daemon.py"))}
        return any(word in ours for word in words)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask until somebody answers. NotAnswering after PATIENCE_S: the daemon is away for longer than any fault lasts."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.ask_once(op, **fields)
            except NotAnswering:
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_S * 5)

    def stir(self) -> None:
        """Have every reading connection opened and its cache filled: base and end of a run count the same."""

        def ask() -> None:
            since = 0
            while since is not None:
                since = self.ask("events", since_seq=since, limit=500)["next"]

        askers = [threading.Thread(target=ask) for _ in range(STIRRED)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()

    def idle(self, patience_s: float) -> str:
        """Wait until nothing is on its way; return what still is."""
        with contextlib.suppress(AssertionError, NotAnswering):
            eventually(lambda: not self._busy(), "nothing to be on its way", patience_s)
            return ""
        try:
            return str(self._busy())
        except NotAnswering:
            return "no daemon answers"

    def _busy(self) -> dict[str, int]:
        now = self.status()
        waiting = {"queued": now["jobs"]["queued"], "running": now["jobs"]["running"], "parked": now["jobs"]["parked"]}
        waiting |= {"committed": now["arenas"]["committed"], "spooled": now["spool"]["files"]}
        return {name: count for name, count in waiting.items() if count}

    def defects(self) -> list[str]:
        """Log lines since the last call that only a defect writes."""
        with self.log.open("rb") as log:
            log.seek(self._log_at)
            whole, _, _ = log.read().rpartition(b"\n")
        self._log_at += len(whole) + bool(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict) and (
                    str(said.get("event")).endswith(".bug") or said.get("event") == "daemon.broke"
                ):
                    found.append(line.decode(errors="replace")[:3000])
        return found

    def rows(self, project: str, name: str | None = None) -> list[dict[str, Any]]:
        """Every row, the first that came first: legacy files have no step to be sorted by."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            page = self.ask("list", project=project, name=name, state="all", limit=500, after=after)
            found += page["checkpoints"]
            after = page["next"]
            if after is None:
                return found[::-1]

    def at(self, path: str) -> list[dict[str, Any]]:
        """Every row that has been at a path."""
        return [row for row in self.rows(LEGACY) if row["path"] == path]
