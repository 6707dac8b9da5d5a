"""A synchronous connection to the daemon: requests, replies, pushes, each under a deadline.

Built on the client's Channel, which checks whose socket it is and bounds what it reads. Knows no
verb; errors are those of ckptd.errors.
"""

import os
import select
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from ckptd import __version__
from ckptd.cli import render
from ckptd.cli.options import asked
from ckptd.clock import Clock, SystemClock
from ckptd.errors import BadPath, TimedOut, Unreachable, from_wire
from ckptd.intake import lastwords
from ckptd_client import wire
from ckptd_client.channel import Channel, ChannelLost, dial
from ckptd_client.places import PlaceError, SocketPlace, check_private_dir, fallback_dir, named_place, socket_places

REQUEST_S = 30.0  # what a daemon with busy disks may need for an answer out of its catalog
POLL_S_MAX = 3600.0  # the kernel counts milliseconds in 31 bits; longer waits take several
FOREVER_S = 30 * 86400.0  # verify and rebuild read whole disks; Ctrl-C ends them
GREETING_S = 5.0  # what a daemon may need to start in, where the last one left word that it could not
_LOOK_S = 0.5  # between two looks for such word
_HINT_SILENT = (
    "it is starting, or it hangs: its log says which (`journalctl -u ckptd`, or ckptd.log in its state directory)"
)

_HELLO = 1


class Daemon:
    """An open connection. Made by `connect`; a context manager."""

    kind: ClassVar[str] = "daemon"

    def __init__(self, channel: Channel, place: SocketPlace, clock: Clock) -> None:
        """Take over a connected channel; the hello goes out with the first request."""
        self.place = place.path
        self._trusted = place
        self.hello: wire.Message | None = None
        self._channel = channel
        self._clock = clock
        self._arrived: deque[wire.Message] = deque()
        self._last_id = _HELLO
        self._lost: str | None = None
        hello = {"client": f"ckpt/{__version__}", "pid": os.getpid(), "versions": [wire.VERSION]}
        self._send("hello", _HELLO, hello)

    def __enter__(self) -> Self:
        """Return the connection itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket."""
        self.close()

    def close(self) -> None:
        """Close the socket, for whoever has it in no `with` yet."""
        self._channel.close()

    def request(
        self, op: str, fields: Mapping[str, Any] | None = None, *, within_s: float | None = None
    ) -> wire.Message:
        """Ask and wait for the reply; fields that are None are left out.

        within_s  how long to wait for it; None: --timeout, or REQUEST_S

        The daemon's error is raised as its class of ckptd.errors. TimedOut and Unreachable are ours.
        Pushes that arrive meanwhile are kept for `pushes`.
        """
        deadline = self._deadline(within_s)
        self._last_id += 1
        self._send(op, self._last_id, fields or {})
        self._greet(deadline)
        return self._reply(self._last_id, op, deadline)

    def greet(self) -> None:
        """Wait until the daemon has answered hello: that somebody listens says only that a service manager holds the socket.

        Unreachable with the reason when the last daemon left word of why it ended, and no other comes within GREETING_S.
        TimedOut as `request`.
        """
        self._greet(self._deadline(None))

    def pushes(self, *, timeout_s: float | None = None) -> Iterator[wire.Message]:
        """Yield what the daemon pushes until it closes the connection.

        timeout_s  longest silence before TimedOut; None: no limit
        """
        while True:
            while self._arrived:
                yield self._arrived.popleft()
            try:
                self._receive(None if timeout_s is None else self._clock.monotonic_s() + timeout_s, "a push")
            except Unreachable:
                if not self._arrived:
                    return

    def wait_closed(self, *, timeout_s: float) -> None:
        """Wait until the daemon has closed the connection, which it does when it ends. TimedOut."""
        for _ in self.pushes(timeout_s=timeout_s):
            pass

    def _deadline(self, within_s: float | None) -> float:
        return self._clock.monotonic_s() + (asked().or_timeout_s(REQUEST_S) if within_s is None else within_s)

    def _send(self, op: str, number: int, fields: Mapping[str, Any]) -> None:
        message = {"v": wire.VERSION, "id": number, "op": op}
        message |= {name: value for name, value in fields.items() if value is not None}
        self._channel.queue(wire.encode(message))

    def _greet(self, deadline: float) -> None:
        patience = min(deadline, self._clock.monotonic_s() + GREETING_S)
        while self.hello is None:
            look = min(deadline, self._clock.monotonic_s() + _LOOK_S)
            try:
                self.hello = self._reply(_HELLO, "hello", look)
            except TimedOut as silence:
                words = lastwords.find(self._trusted) if look >= patience else None
                if words:
                    again = "another is started by itself, again and again"
                    again += f"; `kill {words.keeper}` stops that" if words.keeper else ""
                    raise _ended(f"no daemon answers at {self.place}", words, again) from silence
                if look >= deadline:
                    silence.hint = _HINT_SILENT
                    raise

    def _reply(self, number: int, op: str, deadline: float) -> wire.Message:
        passed: list[wire.Message] = []
        while True:
            while self._arrived:
                message = self._arrived.popleft()
                # An error without an id answers a frame that the daemon could not read: it must be ours.
                if message.get("id") == number or ("error" in message and message.get("id") is None):
                    self._arrived.extendleft(reversed(passed))
                    return _checked(message)
                passed.append(message)
            self._receive(deadline, op)

    def _receive(self, deadline: float | None, what: str) -> None:
        """Wait for bytes and take whole messages from them, perhaps none yet. TimedOut, Unreachable."""
        if self._lost is not None:
            raise Unreachable(self._lost, hint="`ckpt doctor` looks for the cause")
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN | (select.POLLOUT if self._channel.wants_write else 0))
        left_s = POLL_S_MAX if deadline is None else deadline - self._clock.monotonic_s()
        if not poll.poll(1000 * max(0.0, min(left_s, POLL_S_MAX))):
            if left_s >= POLL_S_MAX:
                return
            raise TimedOut(f"the daemon at {self.place} did not answer {what!r} in time")
        try:
            self._channel.flush()
            for message, fds in self._channel.receive():
                for fd in fds:  # none of our requests asks for one
                    os.close(fd)
                self._arrived.append(message)
        except ChannelLost as error:
            self._lost = f"lost the daemon at {self.place}: {error}"
            if not self._arrived:
                raise Unreachable(self._lost, hint="`ckpt doctor` looks for the cause") from error
        except wire.FrameError as error:
            raise Unreachable(f"what answers at {self.place} is no ckptd daemon: {error}") from error


def _checked(message: wire.Message) -> wire.Message:
    if message.get("ok") is True:
        return {name: value for name, value in message.items() if name not in {"v", "id", "ok"}}
    error = message.get("error")
    raise from_wire(error if isinstance(error, dict) else {"message": "an error reply without an error"})


def connect(*, clock: Clock | None = None) -> Daemon:
    """Connect to the daemon that was named, else to the user's, else to the system's.

    Blocks for at most a second. Unreachable says what was tried, and what the last daemon ended of where it left
    word; BadPath that a socket's path is too long for the kernel.
    """
    tried, words = [], None
    for place in places():
        try:
            return Daemon(_dial(place), place, clock or SystemClock())
        except ChannelLost as error:
            tried.append(str(error))
            words = words or lastwords.find(place)
    message = "no daemon answers: " + "; ".join(tried)
    if words is None:
        raise Unreachable(message)
    raise _ended(message, words, "then start one with `ckptd`")


def _ended(message: str, words: lastwords.LastWords, then: str) -> Unreachable:
    """Say that nobody answers, and why. Its code stays `unreachable`: what needs no daemon goes on without one."""
    error = words.error
    first, *more = [line.strip() for line in error.message.splitlines()] or [""]
    why = " ".join(filter(None, (first, "; ".join(more))))
    hint = f"{error.hint}; {then}" if error.hint else then
    cause = {"code": error.code, "message": error.message, "hint": error.hint, "at": words.at}
    return Unreachable(f"{message}; the last one ended {render.age(words.at)}: {why}", hint=hint, cause=cause)


def places() -> list[SocketPlace]:
    """Return the sockets to try, in order. BadPath when one can't be an address."""
    named = asked().socket
    try:
        return [named_place(named)] if named else socket_places()
    except PlaceError as error:
        raise BadPath(str(error)) from error


def _dial(place: SocketPlace) -> Channel:
    """Connect, after a look at who owns the directory in /tmp that anyone could have made."""
    parent = os.path.dirname(place.path)
    if parent == fallback_dir() and os.path.lexists(parent):
        try:
            check_private_dir(parent)
        except PlaceError as error:
            raise ChannelLost(str(error)) from error
    return dial(place)
