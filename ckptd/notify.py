"""The daemon's side of the service manager's protocol: readiness, watchdog, stored descriptors.

systemd and ckptd's own supervisor speak it alike: datagrams of KEY=value lines to $NOTIFY_SOCKET,
descriptors passed from fd 3 on. Nothing here blocks and nothing here raises because the manager is
slow or gone: what it does not take at once waits in order, up to MESSAGES_WAITING_MAX messages, and
goes out with the next one (the watchdog's at the latest).
"""

import array
import contextlib
import errno
import os
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterable, MutableMapping

import anyio

from ckptd.errors import Bug, Busy

FIRST_FD = 3
NAME_BYTES_MAX = 255
STATUS_BYTES_MAX = 512
MESSAGES_WAITING_MAX = 1024
_TRY_LATER = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS, errno.EMFILE})
_LISTEN = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
_WATCHDOG = ("WATCHDOG_USEC", "WATCHDOG_PID")

Environ = MutableMapping[str, str]


def passed_fds(environ: Environ | None = None) -> list[tuple[str, int]]:
    """Take over the descriptors that the service manager passed: (name, fd), in its order.

    Each gets CLOEXEC. The variables are removed whatever they say, so that no child takes them for
    its own; a second call returns nothing. Variables meant for another process (LISTEN_PID) or
    without sense are ignored. A descriptor without a name is called "unknown", as systemd does.
    """
    env = os.environ if environ is None else environ
    count, pid, names = (env.pop(key, "") for key in _LISTEN)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    given = names.split(":") if names else []
    found = []
    for number in range(int(count)):
        fd = FIRST_FD + number
        try:
            os.set_inheritable(fd, False)
        except OSError:
            break  # the count promised more than is open: nothing after a hole is ours
        found.append((given[number] if number < len(given) else "unknown", fd))
    return found


class Notifier:
    """Tell the service manager. Every method is a no-op when none asked to be told.

    Takes NOTIFY_SOCKET and the watchdog's variables out of the environment, so that no child
    speaks in the daemon's name. Methods may be called from any thread.

    enabled     a manager listens
    watchdog_s  it wants to hear `watchdog()` at least this often, None: it does not care
    store_max   descriptors it keeps, where it says so ($FDSTORE), else None: it keeps none, or is systemd before 254
    stored      how many it keeps now, as far as this process knows
    kept        it kept some over a restart: proof that it does, also from a manager that can't say so
    trouble     the last error of a message that will never arrive, for doctor and the log
    """

    def __init__(self, environ: Environ | None = None) -> None:
        """Read the address; connect to nothing yet. An address of an unknown kind is as none."""
        env = os.environ if environ is None else environ
        address = env.pop("NOTIFY_SOCKET", "")
        usec, pid = (env.pop(key, "") for key in _WATCHDOG)
        stored = env.get("FDSTORE", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.enabled = address.startswith(("/", "@"))
        mine = pid in {"", str(os.getpid())}
        self.watchdog_s = int(usec) / 1e6 if self.enabled and mine and usec.isdigit() and int(usec) else None
        self.store_max = int(stored) if self.enabled and stored.isdigit() else None
        self.kept = False
        self.trouble: OSError | None = None
        self._names: Counter[str] = Counter()
        self._waiting: deque[tuple[bytes, int | None]] = deque()
        self._lock = threading.RLock()  # a signal handler may speak while the thread it interrupts is speaking
        self._socket: socket.socket | None = None
        if self.enabled:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def ready(self) -> None:
        """Say that start-up (recovery included) is over and requests are served."""
        self._send("READY=1")

    def stopping(self) -> None:
        """Say that the drain has begun. Final."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Say in one line what the daemon does. Lost, not queued, while the manager is slow."""
        line = "".join(c if c.isprintable() else " " for c in text)
        self._send("STATUS=" + line.encode()[:STATUS_BYTES_MAX].decode(errors="ignore"), keep=False)

    def watchdog(self) -> None:
        """Say that the daemon makes progress. Lost, not queued, while the manager is slow."""
        self._send("WATCHDOG=1", keep=False)

    def extend(self, extend_s: float) -> None:
        """Ask for `extend_s` seconds from now for the start or the stop under way; say it again before they end."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(extend_s * 1e6)}")

    @property
    def stored(self) -> int:
        """Return how many descriptors the manager keeps, as far as this process knows."""
        return self._names.total()

    def has_room(self, more: int = 1) -> bool:
        """Whether the manager would keep `more` of them: beyond its limit it drops them without a word."""
        return self.store_max is None or self.stored + more <= self.store_max

    def adopted(self, names: Iterable[str]) -> None:
        """Count what an earlier daemon stored and this one was passed."""
        self._names.update(names)
        self.kept = self.stored > 0

    def store(self, name: str, fd: int) -> None:
        """Give the manager a copy of `fd`; the next daemon finds it under `name` in `passed_fds()`.

        Once this returned, the copy is on its way even if this process dies at once, unless
        messages are waiting (`barrier()` tells). Storing a name again replaces it with ckptd's
        supervisor; systemd keeps both. Bug when the name is not 1-255 bytes of printable ASCII
        without colon; Busy when MESSAGES_WAITING_MAX messages wait.
        """
        _check_name(name)
        self._send(f"FDSTORE=1\nFDNAME={name}", fd=fd)
        self._names[name] += 1

    def remove(self, name: str) -> None:
        """Make the manager forget what it stores under `name`; unknown names are fine."""
        _check_name(name)
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")
        self._names.pop(name, None)

    async def barrier(self, timeout_s: float = 5.0) -> bool:
        """Wait until the manager has dealt with everything said so far; False when it did not in time.

        True at once when no manager listens. May be cancelled.
        """
        if not self.enabled:
            return True
        ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._send("BARRIER=1", fd=theirs)
        finally:
            os.close(theirs)  # the manager's copy is the last one; it closes it when it gets there
        try:
            with anyio.move_on_after(timeout_s):
                while self._waiting and self._socket is not None:
                    await anyio.wait_writable(self._socket)
                    self._flush()
                await anyio.wait_readable(ours)
                return self.trouble is None
            return False
        finally:
            os.close(ours)

    def close(self) -> None:
        """Close the socket; what still waits is dropped, the manager sees our exit anyway."""
        with self._lock:
            while self._waiting:
                _close(self._waiting.popleft()[1])
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _send(self, text: str, *, fd: int | None = None, keep: bool = True) -> None:
        """Send after what waits; queue what may not be lost. A copy of `fd` travels, never the caller's."""
        if self._socket is None:
            return
        with self._lock:
            self._flush_locked()
            if not self._waiting and self._try(text.encode(), fd):
                return
            if not keep:
                return
            if len(self._waiting) >= MESSAGES_WAITING_MAX:
                message = f"the service manager left {MESSAGES_WAITING_MAX} messages unread"
                raise Busy(message, hint="is the supervisor or systemd stopped?")
            self._waiting.append((text.encode(), None if fd is None else os.dup(fd)))

    def _flush(self) -> None:
        with self._lock:
            self._flush_locked()

    def _flush_locked(self) -> None:
        while self._waiting and self._try(*self._waiting[0]):
            _close(self._waiting.popleft()[1])

    def _try(self, payload: bytes, fd: int | None) -> bool:
        """Say whether the message is off our hands: taken, or never to be taken (`trouble` says why)."""
        if self._socket is None:
            return True
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self._socket.sendmsg([payload], rights, socket.MSG_NOSIGNAL, self._address)
        except OSError as error:
            if error.errno in _TRY_LATER:
                return False
            self.trouble = error
        return True


def _check_name(name: str) -> None:
    if not (0 < len(name) <= NAME_BYTES_MAX and name.isascii() and name.isprintable() and ":" not in name):
        message = f"{name!r} can't name a stored descriptor"
        raise Bug(message)


def _close(fd: int | None) -> None:
    if fd is not None:
        with contextlib.suppress(OSError):  # our own copy; there is nothing left to do for it
            os.close(fd)
