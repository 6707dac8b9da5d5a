"""Requests of one kind at a pace that a daemon keeps up with: a few without an answer, the others wait here.

waiting ──at most IN_FLIGHT_MAX──► sent ──answered──► its owner hears
   ▲                                │
   └── "busy": after retry_after_s ─┘
"""

import functools
import threading
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, List, NamedTuple

from ckptd_client.connection import AGAIN_S, Connection
from ckptd_client.finder import close_all
from ckptd_client.wire import FrameError, Message

IN_FLIGHT_MAX = 32  # half of what a daemon lets wait on one connection; leases and loads share it
RETRY_S, RETRY_S_MAX = 1.0, 30.0  # where a busy daemon does not say when to come back, and however late it says


class Request(NamedTuple):
    """One request that waits for its turn.

    answered(reply)  is called once, mostly in the connection's thread: with the reply, "busy" excepted
    is_wanted()      whether it is still to be sent
    """

    fields: Dict[str, Any]
    answered: Callable[[Message], None]
    is_wanted: Callable[[], bool]


class Paced:
    """The requests `op` of one session. Thread-safe; bounded by whoever puts them in."""

    def __init__(self, connection: Connection, op: str) -> None:
        """Nothing waits."""
        self._connection = connection
        self._op = op
        self._lock = threading.Lock()
        self._waiting: Deque[Request] = deque()
        self._in_flight = 0
        self._not_before_s = 0.0

    def __len__(self) -> int:
        """Return how many wait for their turn."""
        return len(self._waiting)

    def put(self, request: Request) -> None:
        """Send it when its turn comes. Never blocks."""
        with self._lock:
            self._waiting.append(request)
        self.tend()

    def tend(self) -> None:
        """Send what may be sent now; called now and then."""
        while True:
            with self._lock:
                while self._waiting and not self._waiting[0].is_wanted():
                    self._waiting.popleft()
                if not self._waiting or self._in_flight >= IN_FLIGHT_MAX or not self._connection.is_up:
                    return
                wait_s = self._not_before_s - time.monotonic()
                if wait_s <= 0:
                    request = self._waiting.popleft()
                    self._in_flight += 1
            if wait_s > 0:
                self._connection.tick_within(wait_s)
                return
            if not self._send(request):
                return

    def _send(self, request: Request) -> bool:
        try:
            on_reply = functools.partial(self._on_reply, request)
            if self._connection.request_nowait(self._op, on_reply, **request.fields):
                return True
        except (FrameError, ValueError) as error:  # this one can never be sent; the next may
            with self._lock:
                self._in_flight -= 1
            code = getattr(error, "code", "bad_request")
            request.answered({"ok": False, "error": {"code": code, "message": str(error), "hint": ""}})
            return True
        with self._lock:
            self._in_flight -= 1
            self._waiting.appendleft(request)
        self._connection.tick_within(AGAIN_S)
        return False

    def _on_reply(self, request: Request, reply: Message, fds: List[int]) -> None:
        close_all(fds)
        error = reply.get("error")
        with self._lock:
            self._in_flight -= 1
            is_busy = isinstance(error, dict) and error.get("code") == "busy"
            if isinstance(error, dict) and is_busy:
                self._waiting.appendleft(request)
                self._not_before_s = time.monotonic() + _retry_s(error.get("retry_after_s"))
        if not is_busy:
            request.answered(reply)
        self.tend()


def _retry_s(told: Any) -> float:
    if isinstance(told, bool) or not isinstance(told, (int, float)) or not told > 0:
        return RETRY_S
    return min(float(told), RETRY_S_MAX)
