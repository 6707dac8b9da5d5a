"""Going to the background: how a trainer's client starts a missing daemon and knows when it is ready."""

import contextlib
import os
import select
import sys
from pathlib import Path
from typing import NamedTuple

from ckptd.clock import SystemClock
from ckptd.intake import lastwords
from ckptd_client import places

LOG_BYTES_MAX = 16 << 20  # of the log file, and as much again in the one before it
READY_WAIT_S = 60.0
REFUSALS_MAX = 3  # starts that ended with an error: one may have met its predecessor, so many will go on so
_LOOK_S = 0.5
_TIMED_OUT = 6  # errors.TimedOut.exit_code


class Foreground:
    """Nobody waits for us to be ready, and the log is somebody else's."""

    def ready(self) -> None:
        """Do nothing."""

    def trim(self) -> None:
        """Do nothing."""


class Background(Foreground):
    """The process that goes on."""

    def __init__(self, log: Path, waiting: int) -> None:
        """`waiting` is the pipe on which the process that forked us waits."""
        self._log = log
        self._waiting = waiting

    def ready(self) -> None:
        """Let the waiting process return. Again and again is fine: the daemon may be restarted."""
        if self._waiting >= 0:
            with contextlib.suppress(BrokenPipeError):  # it did not wait that long
                os.write(self._waiting, b"ready\n")
            os.close(self._waiting)
            self._waiting = -1

    def trim(self) -> None:
        """Keep the log file below LOG_BYTES_MAX: its content moves to `<log>.1`, and the file starts again.

        The daemon writes with O_APPEND to the same inode, so it needs no word about it; lines
        written between the copy and the cut are lost.
        """
        size = os.fstat(1).st_size
        if size < LOG_BYTES_MAX:
            return
        source = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        target = os.open(f"{self._log}.1", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            while sent := os.sendfile(target, source, None, size):
                size -= sent
        finally:
            os.close(source)
            os.close(target)
        os.ftruncate(1, 0)


def fork(log: Path, socket: str) -> Background | int:
    """Fork. The child gets a session of its own, `log` as stdout and stderr, and returns a Background.

    socket  where the daemon will be reached: beside it lies why it could not start

    The parent waits until `Background.ready()` is called there, at most READY_WAIT_S, and returns its
    exit status: 0 when ready, the child's own when it ended before, 6 when it takes longer, and after
    REFUSALS_MAX starts that failed that of their error (in both cases the child goes on trying).
    """
    hears, says = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(says)
        return _wait(pid, hears, _Place(log, places.named_place(socket)))
    os.close(hears)
    os.setsid()
    os.chdir("/")
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    for fd, number in ((null, 0), (written, 1), (written, 2)):
        os.dup2(fd, number)
    os.close(null)
    os.close(written)
    return Background(log, says)


class _Place(NamedTuple):
    """Where a person reads on: the log, and the words beside the socket."""

    log: Path
    socket: places.SocketPlace

    def tell(self, what: str, words: lastwords.LastWords | None) -> None:
        """Say `what`, and why where a daemon left word of it."""
        why = f": {words.error.message}\n  {words.error.hint}\n " if words else ";"
        sys.stderr.write(f"ckptd: {what}{why} see {self.log}\n")


def _wait(pid: int, hears: int, place: _Place) -> int:
    clock, poll = SystemClock(), select.poll()
    poll.register(hears, select.POLLIN)
    deadline_s = clock.monotonic_s() + READY_WAIT_S
    refusals: set[str] = set()
    while not poll.poll(int(_LOOK_S * 1000)):
        words = lastwords.find(place.socket)
        if words:
            refusals.add(words.at)
        if words and len(refusals) >= REFUSALS_MAX:
            place.tell("can't start, and goes on trying", words)
            return words.error.exit_code
        if clock.monotonic_s() > deadline_s:
            place.tell(f"not ready after {READY_WAIT_S:g} s and still trying", words)
            return _TIMED_OUT
    if os.read(hears, 16):
        return 0
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        place.tell("ended before it was ready", lastwords.find(place.socket))
    return 128 - code if code < 0 else code
