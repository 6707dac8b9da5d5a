"""Warnings that are worth one line each, however long the trouble lasts."""

import logging
import threading
from collections import OrderedDict
from typing import Any

TOPICS_MAX = 256  # topics may name a save or a path: the oldest are forgotten, and told once more if they come back

_log = logging.getLogger("ckptd")


class Once:
    """What was logged already, by topic. Thread-safe."""

    def __init__(self) -> None:
        """Nothing was said."""
        self._lock = threading.Lock()
        self._said: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        """Return how many topics are remembered."""
        return len(self._said)

    def say(self, topic: str, message: str, *arguments: Any) -> None:
        """Log a warning the first time, until `unsay(topic)`: a trouble of hours is one line."""
        with self._lock:
            if topic in self._said:
                self._said.move_to_end(topic)
                return
            self._said[topic] = None
            if len(self._said) > TOPICS_MAX:
                self._said.popitem(last=False)
        _log.warning("ckptd: " + message, *arguments)

    def unsay(self, topic: str) -> bool:
        """The trouble is over; return whether it had been logged."""
        with self._lock:
            was_said = topic in self._said
            self._said.pop(topic, None)
        return was_said
