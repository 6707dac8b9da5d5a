"""The metrics of a session on their way: one batch at a time, the next when it is confirmed."""

import threading
import time
from typing import TYPE_CHECKING, List, Tuple

from ckptd_client import wire
from ckptd_client.finder import close_all
from ckptd_client.metrics import FLUSH_S, MetricBuffer
from ckptd_client.wire import Message

if TYPE_CHECKING:
    from ckptd_client.session import Session


class MetricStream:
    """Sends what a buffer holds to whichever daemon has opened the experiment. Thread-safe."""

    def __init__(self, session: "Session", metrics: MetricBuffer) -> None:
        """Send `metrics` when `send` is called."""
        self._session = session
        self._metrics = metrics
        self._changed = threading.Condition()
        self._sending = False

    def up(self) -> None:
        """A daemon answers: what was on its way to the one before is sent again."""
        self._sending = False

    def send(self) -> None:
        """Send one batch; the next goes when it is confirmed, so a slow daemon is never flooded."""
        if self._sending:
            return
        points = self._metrics.batch()
        while points:
            try:
                self._sending = self._session.ask("metrics", self._on_reply, points=points)
            except wire.FrameError:
                self._metrics.shrink()
                points = self._metrics.batch()
                continue
            return

    def settle(self, deadline_s: float) -> bool:
        """Wait until all are confirmed, the daemon is gone, or `deadline_s` came; say whether it was the first."""
        connection = self._session.connection
        with self._changed:
            while len(self._metrics) and connection.is_up and time.monotonic() < deadline_s:
                connection.tick_within(0.0)
                self._changed.wait(FLUSH_S)
            return not len(self._metrics)

    def _on_reply(self, reply: Message, fds: List[int]) -> None:
        close_all(fds)
        self._sending = False
        if reply.get("ok") is True:
            self._metrics.confirm()
            if self._session.is_open():
                self.send()
        else:
            code, message = _problem(reply)
            if code not in ("unreachable", "busy", "not_found"):
                self._metrics.refuse()
                self._session.say("metrics", "the daemon refused metrics: %s", message)
        with self._changed:
            self._changed.notify_all()


def _problem(reply: Message) -> Tuple[str, str]:
    error = reply.get("error")
    return (str(error.get("code")), str(error.get("message"))) if isinstance(error, dict) else ("error", "")
