"""Metrics of checkpoints that became known after their save, on their way to the daemon.

Told one by one, the next when the one before is confirmed. What no daemon could take waits here and is
offered again with the next save, flush or close; telling the same twice changes nothing.
"""

import os
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Dict, List

from ckptd_client.wire import Message, number

if TYPE_CHECKING:
    from ckptd_client.session import Session

WAITING_MAX = 10_000
LOOK_S = 0.05
TRIES_MAX = 40  # looks of one flush or close at a daemon that does not know the checkpoint yet
# A save that is still in the spool is not found yet; everything else that a daemon refuses stays refused.
AGAIN = frozenset({"unreachable", "busy", "not_found", "catalog", "no_space"})


class LateMetrics:
    """A bounded queue; when it is full the oldest are dropped, which is logged. Thread-safe."""

    def __init__(self, session: "Session") -> None:
        """Hold nothing yet."""
        self._session = session
        self._waiting: OrderedDict[str, Dict[str, float]] = OrderedDict()
        self._asking = False
        self._changed = threading.Condition()

    def put(self, checkpoint: str, metrics: Dict[str, float]) -> None:
        """Take metrics of one checkpoint. Returns at once."""
        with self._changed:
            # One entry for each checkpoint: what is said twice can't arrive in the wrong order.
            self._waiting[checkpoint] = {**self._waiting.get(checkpoint, {}), **metrics}
            full = len(self._waiting) > WAITING_MAX
            if full:
                self._waiting.popitem(last=False)
        if full:
            self._session.say("late", "late metrics come faster than they leave; the oldest are dropped")
        self.tend()

    def tend(self) -> None:
        """Offer the oldest, unless an answer is awaited or no daemon is there."""
        with self._changed:
            if self._asking or not self._waiting:
                return
            checkpoint, metrics = next(iter(self._waiting.items()))
            self._asking = True
        sent = self._session.connection.request_nowait(
            "checkpoint.metrics",
            lambda reply, fds: self._answered(checkpoint, metrics, reply, fds),
            checkpoint=checkpoint,
            metrics={name: number(value) for name, value in metrics.items()},
        )
        if not sent:
            with self._changed:
                self._asking = False

    def settle(self, deadline_s: float) -> bool:
        """Wait until everything is confirmed, at most until `deadline_s` of the monotonic clock; False when it is not."""
        for _ in range(TRIES_MAX):
            self.tend()
            with self._changed:
                before = len(self._waiting)
                while self._asking and self._session.connection.is_up and time.monotonic() < deadline_s:
                    self._changed.wait(LOOK_S)
                if not self._waiting or not self._session.connection.is_up or time.monotonic() >= deadline_s:
                    break
                if len(self._waiting) == before:
                    self._changed.wait(LOOK_S)  # not found yet, or busy
        return not self._waiting

    def _answered(self, checkpoint: str, metrics: Dict[str, float], reply: Message, fds: List[int]) -> None:
        for fd in fds:
            os.close(fd)
        error = reply.get("error")
        code = str(error.get("code")) if isinstance(error, dict) else ""
        done = reply.get("ok") is True or code not in AGAIN
        with self._changed:
            self._asking = False
            if self._waiting.get(checkpoint) is metrics and done:
                del self._waiting[checkpoint]
            elif checkpoint in self._waiting:
                self._waiting.move_to_end(checkpoint)  # more was said meanwhile, or it must not hold up the others
            self._changed.notify_all()
        if done and reply.get("ok") is not True:
            self._session.say("late", "the daemon refused late metrics: %s", code)
        if done:
            self.tend()
