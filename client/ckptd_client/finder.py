"""Finding a daemon: the places in their order, the hello, and starting one where none answers."""

import os
import select
import threading
import time
from typing import List, NamedTuple, Optional, Sequence, Tuple

from ckptd_client import autostart
from ckptd_client.channel import Channel, ChannelLost, dial
from ckptd_client.errors import CkptdClientError, NotFound, Refused, TimedOut
from ckptd_client.places import SocketPlace
from ckptd_client.wire import VERSION, FrameError, Message, encode

CLIENT = "ckptd-client/0.1.0"
HELLO_S = 2.0
RETRY_S = 0.05  # between attempts at the socket of a daemon that was just started
START_AGAIN_S = 60.0  # a daemon that would not start is not started again before this


class Found(NamedTuple):
    """A connected channel, and what the daemon said of itself."""

    channel: Channel
    hello: Message


class Finder:
    """Tries the places; remembers when a daemon was last started. Used by one thread."""

    def __init__(self, places: Sequence[SocketPlace], closing: threading.Event, state_to_start: str) -> None:
        """Look at `places`, in order, until `closing` is set; `state_to_start` "" forbids to start a daemon."""
        self._places = places
        self._closing = closing
        self._state_to_start = state_to_start
        self._start_after_s = 0.0
        self.problem = "not connected yet"

    def find(self) -> Optional[Found]:
        """Try every place once, then start a daemon if that is wanted; None when nobody answers (`problem` says why).

        Blocks for at most CONNECT_S and HELLO_S per place, and START_S for a start.
        """
        problems = []
        for place in self._places:
            found, problem = self._try(place)
            if found is not None:
                return found
            problems.append(problem)
        own = self._places[0]
        if self._state_to_start and own.own and time.monotonic() >= self._start_after_s:
            self._start_after_s = time.monotonic() + START_AGAIN_S
            started: List[Found] = []
            problem = autostart.start(
                own, self._state_to_start, wait_for=lambda limit_s: self._wait_for(own, limit_s, started)
            )
            if started:
                return started[0]
            problems.append(problem)
        self.problem = "; ".join(problems)
        return None

    def _wait_for(self, place: SocketPlace, limit_s: float, started: List[Found]) -> bool:
        deadline_s = time.monotonic() + limit_s
        while not self._closing.is_set():
            found, _ = self._try(place)
            if found is not None:
                started.append(found)
                return True
            if time.monotonic() >= deadline_s:
                return False
            self._closing.wait(RETRY_S)
        return False

    def _try(self, place: SocketPlace) -> Tuple[Optional[Found], str]:
        try:
            channel = dial(place)
        except ChannelLost as error:
            return None, str(error)
        try:
            return Found(channel, self._greet(channel)), ""
        except (ChannelLost, FrameError, CkptdClientError) as error:
            channel.close()
            return None, f"{place.path}: {error}"

    def _greet(self, channel: Channel) -> Message:
        """Exchange hellos within HELLO_S."""
        hello = {"v": VERSION, "id": 0, "op": "hello", "client": CLIENT, "pid": os.getpid(), "versions": [VERSION]}
        channel.queue(encode(hello))
        poll = select.poll()
        deadline_s = time.monotonic() + HELLO_S
        while time.monotonic() < deadline_s and not self._closing.is_set():
            channel.flush()
            poll.register(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.wants_write else 0))
            if not poll.poll(max(1.0, (deadline_s - time.monotonic()) * 1000)):
                continue
            for message, fds in channel.receive():
                close_all(fds)
                if message.get("id") == 0:
                    return _checked(message)
        raise TimedOut(f"no hello within {HELLO_S} s")


def _checked(hello: Message) -> Message:
    if hello.get("ok") is not True:
        raise error_of(hello)
    if hello.get("version") != VERSION:
        raise Refused("unsupported_version", f"the daemon speaks version {hello.get('version')!r}, this is {VERSION}")
    return hello


def error_of(reply: Message) -> CkptdClientError:
    """Turn an error reply into the exception a caller gets."""
    error = reply.get("error")
    error = error if isinstance(error, dict) else {}
    code, message, hint = (str(error.get(key, "")) for key in ("code", "message", "hint"))
    if code == "not_found":
        return NotFound(message)
    if code == "timeout":
        return TimedOut(message)
    return Refused(code or "error", message, hint)


def close_all(fds: List[int]) -> None:
    """Close descriptors that nobody will use."""
    for fd in fds:
        os.close(fd)
