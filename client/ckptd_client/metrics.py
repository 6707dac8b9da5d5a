"""Metric points on their way to the daemon: a bounded buffer that training never waits for.

`log` only appends. The connection's thread takes batches of at most POINTS_MAX and keeps a batch
until the daemon has confirmed it: what was on the way when a connection broke is sent again, and a
point that arrives twice is the same point (name, step and time are equal).
"""

import logging
import threading
import time
from collections import deque
from typing import Any, Deque, Dict, List, Optional, Tuple

from ckptd_client.wire import number

POINTS_MAX = 500  # half of what a frame may hold: encoding them keeps the GIL for well under a millisecond
BUFFER_POINTS_MAX = 200_000  # some 20 MB; at 1e5 points/s two seconds of a daemon that is away
FLUSH_S = 0.2
NAME_CHARACTERS_MAX = 256

Point = Tuple[str, Optional[int], float, float]

_log = logging.getLogger("ckptd")


class MetricBuffer:
    """Points in their order; when full, the oldest are dropped, counted, and it is logged once."""

    def __init__(self, points_max: int = BUFFER_POINTS_MAX) -> None:
        """Hold at most `points_max` points."""
        self._points_max = points_max
        self._points: Deque[Point] = deque()
        self._sent: List[Point] = []
        self._lock = threading.Lock()
        self.logged_count = 0
        self.dropped_count = 0

    def __len__(self) -> int:
        """Return how many points wait, those without a confirmation included."""
        return len(self._points) + len(self._sent)

    def log(self, metrics: Dict[str, Any], step: Optional[int], now_s: Optional[float] = None) -> bool:
        """Add one point per metric; return whether the buffer was empty before. Never blocks on I/O.

        Values are turned into floats here (NaN and the infinities are kept): a tensor on a GPU is
        waited for, so pass numbers where that matters.

        ValueError  names the metric, its value and the rule
        """
        at_s = time.time() if now_s is None else now_s
        points = [(_name(name), step, _value(name, value), at_s) for name, value in metrics.items()]
        with self._lock:
            was_empty = not self._points
            self._points.extend(points)
            self.logged_count += len(points)
            over = len(self._points) + len(self._sent) - self._points_max
            for _ in range(over):
                if not self._points:
                    break
                self._points.popleft()
                self.dropped_count += 1
            first_drop = over > 0 and self.dropped_count <= over
        if first_drop:
            _log.warning("ckptd: metrics come faster than they leave; the oldest are dropped (run.stats() counts them)")
        return was_empty

    def batch(self) -> List[List[Any]]:
        """Return the points of the next frame, [] when there are none; the same ones until `confirm` or `refuse`."""
        with self._lock:
            if not self._sent:
                self._sent = [self._points.popleft() for _ in range(min(POINTS_MAX, len(self._points)))]
            return [[name, step, number(value), at_s] for name, step, value, at_s in self._sent]

    def shrink(self) -> None:
        """Make the batch half as long: its frame was too large."""
        with self._lock:
            keep = max(1, len(self._sent) // 2)
            self._points.extendleft(reversed(self._sent[keep:]))
            del self._sent[keep:]

    def confirm(self) -> None:
        """The daemon has the batch."""
        with self._lock:
            self._sent = []

    def refuse(self) -> None:
        """The daemon will never take the batch: count it as dropped."""
        with self._lock:
            self.dropped_count += len(self._sent)
            self._sent = []


def _name(name: Any) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARACTERS_MAX:
        message = f"metric name {name!r} must be text of 1 to {NAME_CHARACTERS_MAX} characters"
        raise ValueError(message)
    return name


def _value(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        message = f"metrics[{name!r}]={value!r} must be a number"
        raise ValueError(message) from error


def checked(metrics: Any, field: str = "metrics") -> Dict[str, float]:
    """Return the metrics of a save as floats. ValueError names field, value and rule."""
    if metrics is None:
        return {}
    if not isinstance(metrics, dict):
        message = f"{field}={metrics!r} must be a dict of numbers"
        raise ValueError(message)  # noqa: TRY004 - every bad argument is a ValueError, so that one except clause does
    return {_name(name): _value(name, value) for name, value in metrics.items()}
