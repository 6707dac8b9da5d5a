"""One node: the real supervisor, its daemon and its workers, on a state directory and a socket of their own.

Nothing here is a stand-in. Processes are known by pid and ended by pid; whatever is waited for is
asked for again until a limit, for it is another process's doing.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ckptd_client import wire
from tests.support.signals import kill

PATIENCE_S = 60.0  # what never comes fails its test; a machine that does much else does not
LOOK_S, LOOK_S_MAX = 0.01, 0.2
ASK_S, TAIL_LINES, BROKEN_MAX = 30.0, 60, 3
SCRIPT = Path(__file__).with_name("run_node.py")
TIMING = {"restart_s": 0.02, "good_run_s": 0.0}  # every crash counts as the first: no growing pauses

_FIGURES = ("drain_s", "arena_bytes", "ballast_bytes", "answers_bytes", "idle_s", "reconcile_s", "request_s")
# Quick where a production value only costs the tests time. The retention rules are those of projects that ask for them.
CONFIG = """\
orphan_age_s = {twice_s}
drain_s = {drain_s}
[arenas]
bytes_max = {arena_bytes}
idle_s = {idle_s}
[workers]
request_s = {request_s}
[jobs]
lease_s = {twice_s}
backoff_s = 0.05
backoff_s_max = 0.5
[intake]
lost_after_s = 3
[catalog]
ballast_bytes = {ballast_bytes}
answers_bytes_max = {answers_bytes}
[watching]
reconcile_s = {reconcile_s}
reconcile_max_s = {reconcile_s}
quiet_s = 0.2
{more}
"""


class NotAnswering(Exception):
    """No daemon took the question, or it went away before it answered."""


def eventually(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Return the first true answer of `condition`; AssertionError names `what` was waited for in vain."""
    deadline, pause_s = time.monotonic() + patience_s, LOOK_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s:g} s in vain for {what}"
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.3, LOOK_S_MAX)  # a question costs the daemon some work as well
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """The child processes of `pid`, whichever thread started them."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found


def arenas_of(pid: int) -> set[int]:
    """The arenas that a process holds a descriptor of, by inode."""
    found = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if "memfd:ckptd-arena" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                    found.add(os.stat(f"/proc/{pid}/fd/{fd}").st_ino)
    return found


@dataclass
class Node:
    """with Node(short_directory) as node: node.status()"""

    dir: Path
    drain_s: float = 20.0
    arena_bytes: int = 1 << 30
    ballast_bytes: int = 1 << 20
    answers_bytes: int = 8 << 20
    idle_s: float = 600.0
    reconcile_s: float = 2.0
    request_s: float = 4.5  # a worker's start counts as silence; sweeps, each ten seconds, wait for twice as long
    more: str = ""  # of the configuration
    prefix: tuple[str, ...] = ()  # of the supervisor's command line: a namespace, a limit
    timing: dict[str, float] = field(default_factory=lambda: dict(TIMING))
    supervisor: subprocess.Popen[bytes] | None = None
    _pids: set[int] = field(default_factory=set)

    # -- places ------------------------------------------------------------------------------

    @property
    def state(self) -> Path:
        return self.dir / "s"

    @property
    def socket(self) -> Path:
        return self.dir / "sock"

    @property
    def log(self) -> Path:
        return self.dir / "log"

    @property
    def runs(self) -> Path:
        """Where trainers publish."""
        return self.dir / "runs"

    @property
    def spool(self) -> Path:
        return self.state / "spool"

    @property
    def plan(self) -> Path:
        """The fail points, as failpoint.py reads them."""
        return self.dir / "fail"

    @property
    def environ(self) -> dict[str, str]:
        """What leads a client to this node."""
        return {"CKPTD_SOCKET": str(self.socket), "CKPTD_DIR": str(self.state), "CKPTD_AUTOSTART": "0"}

    # -- life --------------------------------------------------------------------------------

    def start(self, *flags: str, ready: bool = True) -> Self:
        """Start the supervisor; return once its daemon answers."""
        self.configure()
        self.plan.touch()
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "XDG_"))}
        with self.log.open("ab") as log:
            self.supervisor = subprocess.Popen(
                [*self.prefix, *self.command(*flags)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**clean, "CKPTD_FAIL": f"@{self.plan}", "NODE_TIMING": json.dumps(self.timing)},
            )
        if ready:
            self.status()
        return self

    def command(self, *flags: str) -> list[str]:
        """The supervisor's command line, without `prefix`."""
        places = ["--config", str(self.dir / "toml"), "--state-dir", str(self.state), "--socket", str(self.socket)]
        return [sys.executable, "-P", str(SCRIPT), *places, "--log-format", "json", *flags]

    def configure(self, more: str | None = None) -> None:
        """Write the configuration; a running daemon reads it on SIGHUP."""
        self.more = self.more if more is None else more
        figures = {name: getattr(self, name) for name in _FIGURES} | {"twice_s": 2 * self.request_s}
        (self.dir / "toml").write_text(CONFIG.format(**figures, more=self.more))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor."""
        assert self.supervisor is not None
        self.supervisor.send_signal(number)

    def stop(self, patience_s: float = PATIENCE_S) -> int:
        """SIGTERM to the supervisor; return its exit status."""
        self.signal(signal.SIGTERM)
        return self.ended(patience_s)

    def ended(self, patience_s: float = PATIENCE_S) -> int:
        """Return the supervisor's exit status once it has one."""
        assert self.supervisor is not None
        return self.supervisor.wait(timeout=patience_s)

    def clean_up(self) -> None:
        """End every process of this node, by pid; nothing is left running."""
        if self.supervisor is not None:
            self._pids |= {self.supervisor.pid, *self.family()}
            if self.supervisor.poll() is None:
                self.supervisor.kill()  # before its daemon, which it would start again
            self.supervisor.wait(timeout=PATIENCE_S)
            kill(pid for pid in self._pids - {self.supervisor.pid} if is_alive(pid) and self._is_ours(pid))
            eventually(lambda: not any(is_alive(p) and self._is_ours(p) for p in self._pids), "every process to end")
            self.supervisor = None

    def _is_ours(self, pid: int) -> bool:
        """Whether it is a process of ckptd still: a pid may have gone to somebody else."""
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return any(word in {b"ckptd.daemon", b"ckptd.worker", os.fsencode(SCRIPT)} for word in words)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clean_up()

    # -- processes ---------------------------------------------------------------------------

    @property
    def daemon_pid(self) -> int:
        """The daemon that answers now."""
        return int(self.status()["daemon"]["pid"])

    def family(self) -> list[int]:
        """Every process below the supervisor."""
        assert self.supervisor is not None
        found, queue = [], [self.supervisor.pid]
        while queue:
            below = children(queue.pop())
            found += below
            queue += below
        return found

    def workers(self) -> dict[int, dict[str, Any]]:
        """The I/O workers by pid, as status tells of them."""
        return {w["pid"]: w for w in self.status()["workers"] if w["pid"] is not None}

    def kill_daemon(self) -> int:
        """SIGKILL the daemon; return its pid once it is gone. An armed point may end it first."""
        pid = self.daemon_pid
        kill([pid])
        eventually(lambda: not is_alive(pid), "the daemon's end")
        return pid

    # -- fail points -------------------------------------------------------------------------

    def arm(self, point: str, action: str = "kill") -> None:
        """Let the next process that reaches `point` ("name" or "name:n") fail there, once."""
        self._write_plan(f"{point}={action}")

    def fired(self) -> bool:
        """Whether the armed point was reached, and whoever reached it has let go of the plan: it may be stopped now."""
        with self.plan.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return not file.read()

    def wait_fired(self) -> None:
        """Return once the armed point was reached: a kill that did not happen proves nothing."""
        eventually(self.fired, f"the fail point {self.plan.read_text()!r} to be reached")

    def disarm(self) -> bool:
        """Take back what was not reached; return whether it was reached."""
        fired = self.fired()
        self._write_plan("")
        return fired

    def _write_plan(self, text: str) -> None:
        with self.plan.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate()
            file.write(text)

    # -- questions ---------------------------------------------------------------------------

    def ask_once(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask the daemon. NotAnswering when it is away or goes away."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(ASK_S)
            try:
                peer.connect(str(self.socket))
                hello = {"v": 1, "id": 0, "op": "hello", "client": "test", "pid": os.getpid(), "versions": [1]}
                peer.sendall(wire.encode(hello) + wire.encode({"v": 1, "id": 1, "op": op, **fields}))
                with peer.makefile("rb") as lines:
                    for line in lines:
                        found: dict[str, Any] = wire.decode(line)
                        if found.get("id") == 1:
                            return found
            except OSError as error:
                raise NotAnswering(str(error)) from error
        raise NotAnswering("the connection closed")

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask the daemon, or the next one, until one answers. Only for what may be asked twice."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.ask_once(op, **fields)
            except NotAnswering:
                assert time.monotonic() < deadline, f"no daemon answers {op}"
                assert self.supervisor is None or self.supervisor.poll() is None, "the node ended"
                assert len(self.said("daemon.broke")) < BROKEN_MAX, "the daemon breaks as soon as it starts"
                time.sleep(LOOK_S)

    def status(self) -> dict[str, Any]:
        """Return the daemon's own picture."""
        found = self.ask("status")
        self._pids |= {found["daemon"]["pid"], *(w["pid"] for w in found["workers"] if w["pid"])}
        return found

    def rows(self, project: str, name: str | None = None) -> list[dict[str, Any]]:
        """Every row of an experiment, the oldest step first."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            page = self.ask("list", project=project, name=name, state="all", sort="step", limit=500, after=after)
            found += page["checkpoints"]
            after = page["next"]
            if after is None:
                return sorted(found, key=lambda row: (row["name"], row["step"], row["sequence"]))

    def experiment(self, project: str, name: str) -> dict[str, Any]:
        """Return one experiment as the catalog has it."""
        found = [e for e in self.ask("experiments", project=project, limit=500)["experiments"] if e["name"] == name]
        assert len(found) == 1, found
        return found[0]

    def row(self, checkpoint: str) -> dict[str, Any] | None:
        """Return one checkpoint's row, None while there is none."""
        found = self.ask("show", selector=checkpoint)
        return found.get("checkpoint") if found["ok"] else None

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """The recorded events, oldest first; of one kind when named."""
        found, since = [], 0
        while True:
            page = self.ask("events", since_seq=since, limit=500)
            found += page["events"]
            if page["next"] is None:
                return [event for event in found if event["event"] == name] if name else found
            since = page["next"]

    def wait_level(self, checkpoint: str, level: str = "verified", patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """Return the row once the checkpoint has `level`; AssertionError when it ends elsewhere."""
        rungs = ("none", "staged", "durable", "verified", "tiered")

        def reached() -> dict[str, Any] | None:
            row = self.row(checkpoint)
            assert row is None or row["state"] in {"pending", "live"}, row
            return row if row is not None and rungs.index(row["level"]) >= rungs.index(level) else None

        found: dict[str, Any] = eventually(reached, f"{checkpoint} to be {level}", patience_s)
        return found

    def wait_idle(self, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """Return the status once no job waits or runs and no arena holds an unpublished save."""

        def idle() -> dict[str, Any] | None:
            now = self.status()
            busy = now["jobs"]["queued"] + now["jobs"]["running"] + now["arenas"]["committed"] + now["spool"]["files"]
            return None if busy else now

        # Twice: what went from the spool into a job between two of the figures is in neither.
        found: dict[str, Any] = eventually(lambda: idle() and idle(), "the node to be idle", patience_s)
        return found

    def ckpt(self, *arguments: str) -> Any:
        """Run the real `ckpt` and return its JSON."""
        program = Path(sys.executable).with_name("ckpt")
        command = [str(program), "--socket", str(self.socket), *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    # -- what was said -----------------------------------------------------------------------

    def said(self, event: str) -> list[dict[str, Any]]:
        """The log's lines with this event."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == event:
                    found.append(entry)
        return found

    def tail(self) -> str:
        """The end of the log, for whoever must find out why."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(line[:2000] for line in lines[-TAIL_LINES:])

    def remove(self) -> None:
        """Remove everything on disk."""
        shutil.rmtree(self.dir, ignore_errors=True)
