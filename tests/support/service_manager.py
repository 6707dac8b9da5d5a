"""A service manager that does with one service what systemd does, for tests on machines where systemd does not run.

From sd_notify(3), systemd.service(5), systemd.kill(5) and the manager's own handling of stored descriptors:

* datagrams count when the kernel says that the main process sent them (NotifyAccess=main)
* a stored descriptor is refused when the store is full or off, without a word to the service; one that refers to an
  open file that is stored already is dropped, whatever its name; another one under the same name is kept beside it;
  a name that is no ASCII of 1 to 255 characters without colon and controls becomes "stored"
* stored descriptors are passed after the socket, the newest first; they outlive crash and restart, and stop+start
  only with FileDescriptorStorePreserve=yes
* EXTEND_TIMEOUT_USEC moves the limit of the start or the stop under way to that long from now, when that is later
* a watchdog that is not fed: SIGABRT, after TimeoutStopSec SIGKILL; Restart=on-failure starts it again
* KillMode=mixed: SIGTERM to the main process alone; once it is gone, SIGKILL to what is left
"""

import contextlib
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.supervisor.mailbox import Mailbox, Message

NAME_CHARS_MAX = 255
FINAL_CODES = (0, 78)  # SuccessExitStatus and RestartPreventExitStatus of the unit
LOOK_S = 5.0
ENDING_S = 60.0
# Between fork and exec only the child knows its pid; as systemd does, the variables are set there.
LAUNCH = """\
import os, sys
fds, command = [int(fd) for fd in sys.argv[1].split(',') if fd], sys.argv[2:]
high = [os.dup(fd) for fd in fds]
high = [fd if fd >= 3 + len(fds) else __import__('fcntl').fcntl(fd, 0, 3 + len(fds)) for fd in high]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
os.closerange(3 + len(fds), 4096)
environ = dict(os.environ)
for key in ('LISTEN_PID', 'WATCHDOG_PID', 'SYSTEMD_EXEC_PID'):
    if key != 'LISTEN_PID' or fds:
        environ[key] = str(os.getpid())
os.execve(command[0], command, environ)
"""


@dataclass(frozen=True)
class Unit:
    """What the unit file says. Times in seconds.

    store_max   FileDescriptorStoreMax; says_max: tell it in $FDSTORE, as systemd does from 254 on
    preserve    FileDescriptorStorePreserve
    """

    command: Sequence[str]
    environ: Mapping[str, str]
    store_max: int = 512
    says_max: bool = True
    preserve: bool = False
    watchdog_s: float = 30.0
    start_s: float = 60.0
    stop_s: float = 60.0
    restart_s: float = 0.05


@dataclass
class Journal:
    """What the manager saw and did, for the tests to look at."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)  # of each process: exit-code N, signal N, watchdog, timeout
    refused: list[str] = field(default_factory=list)  # names of descriptors that the store did not take
    aborted: int = 0
    killed: int = 0
    strangers: int = 0  # messages of processes other than the main one

    def said(self, key: str) -> list[str]:
        """Every value of one key, in order."""
        return [message[key] for message in self.messages if key in message]


def may_name(name: str) -> bool:
    """Whether systemd takes it for a descriptor's name."""
    return 0 < len(name) <= NAME_CHARS_MAX and name.isascii() and name.isprintable() and ":" not in name


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors are one open file. Position and flags would differ only for others; memfds by inode."""
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino) and stat.S_IFMT(a.st_mode) == stat.S_IFMT(b.st_mode)


class ServiceManager:
    """One service and its socket. Its methods are `systemctl`'s; a thread does the rest."""

    def __init__(self, directory: Path, socket_path: Path, log: Path, unit: Unit) -> None:
        """Bind the socket, as the socket unit does; start nothing."""
        self.unit = unit
        self.journal = Journal()
        self.state = "inactive"
        self.status = ""
        self.pid = 0
        self.store: list[tuple[str, int]] = []
        self._log = log
        self._mailbox = Mailbox(directory)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(socket_path))
        self._listener.listen(512)
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._deadline = float("inf")
        self._why = ""
        self._asked = False
        self._over = False
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._heard, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # -- systemctl ---------------------------------------------------------------------------

    def start(self, *, ready: bool = True) -> None:
        """Start the service; return once it is active."""
        with self._lock:
            assert self.state in {"inactive", "failed"}, self.state
            self._spawn()
        if ready:
            self.wait("active")

    def stop(self, patience_s: float = 60.0) -> float:
        """Stop it; return how long that took. The store is emptied unless it is preserved."""
        begun = time.monotonic()
        self.begin_stop()
        self.wait("inactive", "failed", patience_s=patience_s)
        with self._lock:
            if not self.unit.preserve:
                self.empty_store()
        return time.monotonic() - begun

    def begin_stop(self) -> None:
        """Ask it to stop; a second time is what a person does who can't wait: SIGTERM by hand."""
        with self._lock:
            self._asked = True
            if self.state == "auto-restart":
                self._set("inactive", float("inf"))
                return
            if self.state in {"active", "activating"}:
                self._set("deactivating", self.unit.stop_s)
            self.kill(signal.SIGTERM)
        self._poke()

    def restart(self, unit: Unit | None = None, *, ready: bool = True) -> None:
        """Stop and start as one job: the store is kept, whatever is preserved. `unit`: as the file says now."""
        self.begin_stop()
        self.wait("inactive", "failed")
        with self._lock:
            self.unit = unit or self.unit
            self._spawn()
        if ready:
            self.wait("active")

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the main process."""
        with self._lock:
            if self._pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, number)

    def empty_store(self) -> None:
        """Close every stored descriptor (`systemctl clean --what=fdstore`)."""
        with self._lock:
            while self.store:
                os.close(self.store.pop()[1])

    def wait(self, *states: str, patience_s: float = 60.0) -> None:
        """Return once the service is in one of these states."""
        self.until(lambda: self.state in states, f"the service to be {states}", patience_s)

    def until(self, condition: Callable[[], Any], what: str, patience_s: float = 60.0) -> None:
        """Return once something that the manager sees is so."""
        with self._changed:
            found = self._changed.wait_for(condition, patience_s)
            assert found, f"waited {patience_s:g} s for {what}; it is {self.state}, {self.journal.results[-3:]}"

    def close(self) -> None:
        """Kill what runs and close everything."""
        with self._lock:
            self._over = True
            self._kill_all()
        self._poke()
        self._thread.join(ENDING_S)
        assert not self._thread.is_alive(), "the manager's thread still looks at what is to be closed"
        self.empty_store()
        self._mailbox.close()
        self._listener.close()
        os.close(self._heard)
        os.close(self._wake)

    # -- the loop ----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._over and self._pidfd < 0:
                    return
                fds = [self._heard, self._mailbox.fileno(), *([self._pidfd] if self._pidfd >= 0 else [])]
                left_s = min(max(0.0, self._deadline - time.monotonic()), LOOK_S)
            ready, _, _ = select.select(fds, [], [], left_s)
            with self._changed:
                if self._heard in ready:
                    os.read(self._heard, 64)
                for message in self._mailbox.messages():
                    self._hear(message)
                if self._pidfd in ready:
                    self._bury()
                if time.monotonic() >= self._deadline:
                    self._late()
                self._changed.notify_all()

    def _poke(self) -> None:
        os.write(self._wake, b".")

    def _set(self, state: str, limit_s: float) -> None:
        self.state, self._deadline = state, time.monotonic() + limit_s

    def _spawn(self) -> None:
        unit = self.unit
        named = [("ckptd.socket", self._listener.fileno()), *self.store]
        environ = {
            **unit.environ,
            "NOTIFY_SOCKET": self._mailbox.address,
            "INVOCATION_ID": uuid.uuid4().hex,
            "LISTEN_FDS": str(len(named)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in named),
            "WATCHDOG_USEC": str(int(unit.watchdog_s * 1e6)),
        }
        if unit.store_max and unit.says_max:
            environ["FDSTORE"] = str(unit.store_max)
        fds = [fd for _, fd in named]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCH, ",".join(map(str, fds)), *unit.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                pass_fds=fds,
                start_new_session=True,
                cwd="/",
            )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._why, self._asked = "", False
        self._set("activating", unit.start_s)
        self._poke()

    def _hear(self, message: Message) -> None:
        if message.pid != self.pid:
            self.journal.strangers += 1
            return
        fields = message.fields
        self.journal.messages.append({**fields, "at": time.monotonic(), "fds": len(message.fds)})
        if "FDSTORE" in fields:
            self._keep(fields.get("FDNAME", "stored"), message)
        if fields.get("FDSTOREREMOVE") == "1":
            self._forget(fields.get("FDNAME", ""))
        self.status = fields.get("STATUS", self.status)
        if fields.get("STOPPING") == "1" and self.state == "active":
            self._set("deactivating", self.unit.stop_s)
        if fields.get("READY") == "1" and self.state == "activating":
            self._set("active", self.unit.watchdog_s)
        if fields.get("WATCHDOG") == "1" and self.state == "active":
            self._set("active", self.unit.watchdog_s)
        extend = fields.get("EXTEND_TIMEOUT_USEC", "")
        if extend.isdigit() and self.state in {"activating", "deactivating"}:
            self._deadline = max(self._deadline, time.monotonic() + int(extend) / 1e6)

    def _keep(self, name: str, message: Message) -> None:
        name = name if may_name(name) else "stored"
        for fd in message.fds:
            if len(self.store) >= self.unit.store_max:
                self.journal.refused.append(name)
            elif not any(same_file(fd, kept) for _, kept in self.store):
                self.store.insert(0, (name, os.dup(fd)))

    def _forget(self, name: str) -> None:
        for entry in [entry for entry in self.store if entry[0] == name]:
            self.store.remove(entry)
            os.close(entry[1])

    def _late(self) -> None:
        if self.state == "active":
            self.journal.aborted += 1
            self._why = "watchdog"
            self._set("deactivating", self.unit.stop_s)
            self.kill(signal.SIGABRT)
        elif self.state == "activating":
            self._why = "timeout"
            self._set("deactivating", self.unit.stop_s)
            self.kill(signal.SIGTERM)
        elif self.state == "deactivating":
            self.journal.killed += 1
            self._why = self._why or "timeout"
            self._deadline = float("inf")
            self._kill_all()
        elif self.state == "auto-restart":
            self._spawn()

    def _kill_all(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _bury(self) -> None:
        """The main process is gone: its last words first, then what it left behind, then what follows."""
        for message in self._mailbox.messages():
            self._hear(message)
        self._kill_all()  # before it is reaped: its number is still its own
        assert self._process is not None
        code = self._process.wait()
        os.close(self._pidfd)
        self._pidfd, self.pid = -1, 0
        ended = f"signal {-code}" if code < 0 else f"exit-code {code}"
        self.journal.results.append(self._why or ended)
        # Who was told to stop is not started again, also when it had to be killed for it.
        if self._over or self._asked or code in FINAL_CODES:
            well = code == 0 or (self._asked and not self._why)
            self._set("inactive" if well else "failed", float("inf"))
        else:
            self._set("auto-restart", self.unit.restart_s)
