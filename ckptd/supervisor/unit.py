"""Keeps one daemon running: starts it, hears it, restarts it, stops it. One thread, one poll loop.

    DOWN ──pause──► STARTING ──READY=1──► RUNNING
      ▲                │ start_s over        │ watchdog_s of silence     SIGTERM, SIGINT, STOPPING=1
      │                └──────► ABORTING ◄───┘                           from any of them ──► STOPPING
      └── died, not asked to ──────┴── SIGABRT, then SIGKILL               then SIGKILL at the deadline

Exit status 0 and 78 (bad configuration) are the daemon's last word; anything else is a crash, and the
next daemon gets the same listening socket and every stored descriptor.

The store goes with this process. However the loop ends, what a next daemon would need of it is rescued
first (rescue.py): the daemon may have died before it took it over, or never have come back.
"""

import ctypes
import fcntl
import os
import select
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn

from ckptd.clock import Clock
from ckptd.supervisor.fdstore import FdStore
from ckptd.supervisor.mailbox import Mailbox, Message

FIRST_FD = 3
BAD_CONFIG, NOT_RESCUED = 78, 1
FINAL_CODES = frozenset({0, BAD_CONFIG})
EXTEND_S_MAX = 3600.0
# Python's own allocator returns memory by whole mebibytes, each held by any one object that lives; malloc's goes
# back by the page (worker/heap.py). What each thread would keep of freed blocks for itself, in glibc seven of each of 64
# sizes, holds a page each and no trim reaches it. Only a process that starts can be told.
ENVIRON = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
_NAME_CHARS_MAX = 255
_PR_SET_PDEATHSIG = 1
_STOPPERS = (signal.SIGTERM, signal.SIGINT)
_FORWARDED = (*_STOPPERS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Timing:
    """All bounds, in seconds. `good_run_s` is how long a daemon must live for its crash to count as the first."""

    restart_s: float = 0.1
    restart_s_max: float = 10.0
    good_run_s: float = 60.0
    start_s: float = 90.0
    watchdog_s: float = 30.0
    abort_s: float = 5.0
    stop_s: float = 90.0
    hurry_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run and how. `on_ready` and `on_beat` are called for each READY=1 and each sign of life.

    `on_stillborn` is called with the exit status of a daemon that ended before it was ready, and will be followed by another.

    `rescue` brings what the store holds to safety before this process ends, and returns how many saves it could not.
    """

    command: tuple[str, ...]
    say: Callable[..., None]
    once: bool = False
    timing: Timing = field(default_factory=Timing)
    on_ready: Callable[[], None] = lambda: None
    on_beat: Callable[[], None] = lambda: None
    on_stillborn: Callable[[int], None] = lambda _: None
    rescue: Callable[[FdStore], int] = lambda _: 0


class Phase(StrEnum):
    """What the daemon is doing, as far as it is known here."""

    DOWN = "down"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ABORTING = "aborting"


class Unit:
    """One daemon, whichever process that is at the moment."""

    def __init__(self, plan: Plan, listener: socket.socket, mailbox: Mailbox, clock: Clock) -> None:
        """Start nothing. The listener and the mailbox stay the caller's."""
        self.store = FdStore()
        self.status = ""
        self._plan = plan
        self._listener = listener
        self._mailbox = mailbox
        self._clock = clock
        self._phase = Phase.DOWN
        self._deadline_s = clock.monotonic_s()  # in DOWN: when to start
        self._pause_s = plan.timing.restart_s
        self._pid = 0
        self._pidfd = -1
        self._started_s = 0.0
        self._asked = 0  # how often we were told to stop
        self._code: int | None = None

    def run(self) -> int:
        """Run until the daemon is gone for good; return its exit status (128 + N after a signal N). Blocks.

        1 in the place of a 0 when a save that only the store held could not be brought to safety.
        """
        heard, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        before = {number: signal.signal(number, _note) for number in _FORWARDED}
        old_wake = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        try:
            return self._watch(heard)
        finally:
            # Until here: no signal ends the rescue.
            signal.set_wakeup_fd(old_wake)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(heard)
            os.close(wake)

    def _watch(self, heard: int) -> int:
        while True:
            try:
                self._turn(heard)
            except BaseException:
                # A defect, or a machine without a process to spare: what we hold must not end with us all the same.
                self._plan.rescue(self.store)
                raise
            if self._code is not None and self._lets_go(self._code):
                return self._code

    def _lets_go(self, code: int) -> bool:
        """No daemon runs, and none is to: whether we may end, with `code`. What only the store holds is rescued now.

        When it can't be, and the configuration alone keeps the next daemon away, nobody waits for our end:
        then we stay, and so does our memory, until a person has put right one or the other.
        """
        lost = self._plan.rescue(self.store)
        if lost and code == BAD_CONFIG and not self._asked and not self._plan.once:
            pause_s = self._plan.timing.restart_s_max
            self._plan.say("error", "supervisor.holds_on", saves=lost, code=code, restart_in_s=pause_s)
            self._code = None
            self._set(Phase.DOWN, pause_s)
            return False
        self._code = code or (NOT_RESCUED if lost else 0)
        return True

    def _turn(self, heard: int) -> None:
        poll = select.poll()
        for fd in (heard, self._mailbox.fileno(), self._pidfd):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        left_s = self._deadline_s - self._clock.monotonic_s()
        # None for a deadline that never comes; one millisecond more, or the last one is spent spinning.
        ready = {fd for fd, _ in poll.poll(None if left_s == float("inf") else max(0, int(left_s * 1000) + 1))}
        if heard in ready:
            for number in os.read(heard, 64):
                self._signalled(signal.Signals(number))
        if self._mailbox.fileno() in ready:
            self._hear()
        if self._pidfd in ready:
            self._bury()
        if self._code is None and self._clock.monotonic_s() >= self._deadline_s:
            self._late()
        self._reap_orphans()

    def _reap_orphans(self) -> None:
        """As process 1 of a container: bury what others left to us, never our own daemon (see `_bury`)."""
        with suppress(ChildProcessError):
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid == self._pid:
                    return
                os.waitpid(found.si_pid, 0)

    def _set(self, phase: Phase, limit_s: float) -> None:
        self._phase = phase
        self._deadline_s = self._clock.monotonic_s() + limit_s

    def _signalled(self, number: signal.Signals) -> None:
        """Pass a signal on. The first that stops gives the daemon its time, the second less of it."""
        if number not in _FORWARDED:
            return
        stops = number in _STOPPERS
        if self._pid:
            os.kill(self._pid, number)
        elif stops:
            self._code = 0
        if not stops:
            return
        self._asked += 1
        timing = self._plan.timing
        if self._asked == 1 and self._phase is not Phase.ABORTING:
            self._set(Phase.STOPPING, timing.stop_s)
        else:
            self._deadline_s = min(self._deadline_s, self._clock.monotonic_s() + timing.hurry_s)
        self._plan.say("info", "supervisor.stopping", signal=number.name, times=self._asked)

    def _late(self) -> None:
        """A deadline has passed."""
        timing = self._plan.timing
        if self._phase is Phase.DOWN:
            self._start()
        elif self._phase in {Phase.STARTING, Phase.RUNNING}:
            why = "not ready in time" if self._phase is Phase.STARTING else "watchdog: silent"
            self._plan.say("error", "supervisor.daemon_hangs", pid=self._pid, why=why)
            os.kill(self._pid, signal.SIGABRT)  # faulthandler's moment: the log gets every thread's stack
            self._set(Phase.ABORTING, timing.abort_s)
        else:
            self._plan.say("error", "supervisor.daemon_killed", pid=self._pid, phase=self._phase.value)
            os.kill(self._pid, signal.SIGKILL)
            self._set(self._phase, float("inf"))  # in an uninterruptible call it dies when that returns

    def _hear(self) -> None:
        for message in self._mailbox.messages():
            if message.pid == self._pid:
                self._obey(message)

    def _obey(self, message: Message) -> None:
        """Do what the daemon asks. BARRIER=1 needs no code: its descriptor is closed in its turn."""
        fields, timing = message.fields, self._plan.timing
        name = fields.get("FDNAME", "")
        if "FDSTORE" in fields and message.fds:
            self._keep(name, message.fds.pop(0))
        if "FDSTOREREMOVE" in fields:
            self.store.drop(name)
        if "STATUS" in fields:
            self.status = fields["STATUS"]
        if fields.get("STOPPING") == "1" and self._phase in {Phase.STARTING, Phase.RUNNING}:
            self._set(Phase.STOPPING, timing.stop_s)
        if fields.get("READY") == "1" and self._phase is Phase.STARTING:
            self._plan.say("info", "supervisor.daemon_ready", pid=self._pid)
            self._set(Phase.RUNNING, timing.watchdog_s)
            self._plan.on_ready()
        if fields.get("WATCHDOG") == "1" and self._phase is Phase.RUNNING:
            self._set(Phase.RUNNING, timing.watchdog_s)
            self._plan.on_beat()
        extend = fields.get("EXTEND_TIMEOUT_USEC", "")
        if extend.isdigit() and self._phase in {Phase.STARTING, Phase.STOPPING} and self._asked <= 1:
            extend_s = min(int(extend) / 1e6, EXTEND_S_MAX)
            self._deadline_s = max(self._deadline_s, self._clock.monotonic_s() + extend_s)

    def _keep(self, name: str, fd: int) -> None:
        named = 0 < len(name) <= _NAME_CHARS_MAX and name.isascii() and name.isprintable() and ":" not in name
        if not named:
            os.close(fd)
        if not named or not self.store.put(name, fd):
            self._plan.say("error", "supervisor.fd_refused", name=name, kept=len(self.store))

    def _bury(self) -> None:
        """The daemon is dead: hear its last words, end what it left behind, decide what follows."""
        # What it stored before it died counts, also when it came after the poll looked at the mailbox.
        self._hear()
        with suppress(ProcessLookupError):
            # Before reaping: until then the number can't belong to another process group.
            os.killpg(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        os.close(self._pidfd)
        code = os.waitstatus_to_exitcode(status)
        code = 128 - code if code < 0 else code
        pid, self._pid, self._pidfd = self._pid, 0, -1
        ran_s = self._clock.monotonic_s() - self._started_s
        final = bool(self._asked) or self._plan.once or code in FINAL_CODES
        if final:
            self._code = code
            self._plan.say("info", "supervisor.daemon_ended", pid=pid, code=code)
            return
        timing = self._plan.timing
        if self._phase is not Phase.RUNNING:
            self._plan.on_stillborn(code)
        if ran_s >= timing.good_run_s:
            self._pause_s = timing.restart_s
        self._plan.say("error", "supervisor.daemon_died", pid=pid, code=code, restart_in_s=self._pause_s)
        self._set(Phase.DOWN, self._pause_s)
        self._pause_s = min(self._pause_s * 2, timing.restart_s_max)

    def _start(self) -> None:
        named = [("ckptd.socket", self._listener.fileno()), *self.store]
        environ = self._environ([name for name, _ in named])
        parent = os.getpid()
        # Blocked across the fork: a signal that met our handler in the child would be written into our own
        # wake-up pipe, and lost to the daemon.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        try:
            pid = os.fork()
            if pid == 0:
                _become(self._plan.command, [fd for _, fd in named], environ, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        self._pid, self._pidfd = pid, os.pidfd_open(pid)
        self._started_s = self._clock.monotonic_s()
        self._set(Phase.STARTING, self._plan.timing.start_s)
        self._plan.say("info", "supervisor.daemon_started", pid=pid, stored=len(self.store))

    def _environ(self, names: list[str]) -> dict[str, str]:
        """Return the daemon's environment, less LISTEN_PID and WATCHDOG_PID, which only the child knows."""
        return {
            **ENVIRON,
            **os.environ,
            "NOTIFY_SOCKET": self._mailbox.address,
            "WATCHDOG_USEC": str(int(self._plan.timing.watchdog_s * 1e6)),
            "FDSTORE": str(self.store.count_max),
            "LISTEN_FDS": str(len(names)),
            "LISTEN_FDNAMES": ":".join(names),
        }


def _become(command: tuple[str, ...], fds: list[int], environ: dict[str, Any], parent: int) -> NoReturn:
    """In the child: a process group of its own, the descriptors from 3 on, then the daemon. Never returns."""
    try:
        os.setpgid(0, 0)  # a terminal's ^C reaches the supervisor alone, which passes it on
        # If the supervisor dies, the kernel sends the daemon SIGTERM: it drains as if it had been asked to.
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it died before prctl could tell us
        for number in _FORWARDED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        _place(fds)
        environ["LISTEN_PID"] = environ["WATCHDOG_PID"] = str(os.getpid())
        os.chdir("/")  # the daemon's directory must not keep a mount busy
        os.execve(command[0], command, environ)  # noqa: S606 - our own interpreter, no shell
    except BaseException as error:  # noqa: ASYNC103, BLE001 - the parent's code must not go on in the child
        os.write(2, f"ckptd: can't start the daemon: {error}\n".encode())
        os._exit(127)


def _place(fds: list[int]) -> None:
    """Put copies of `fds` at 3, 4, ... and an empty stdin at 0.

    Through numbers above all targets first: a direct dup2 could overwrite one not copied yet.
    """
    null = os.open("/dev/null", os.O_RDONLY)
    base = FIRST_FD + len(fds)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, base) for fd in fds]
    os.dup2(null, 0, inheritable=True)
    for number, fd in enumerate(high):
        os.dup2(fd, FIRST_FD + number, inheritable=True)


def _note(_number: int, _frame: object) -> None:
    """Nothing: the wake-up descriptor carries the signal into the loop."""
