"""When a hook that keeps failing is given a rest, and when it is tried again.

closed ──failures_max in a row──► open ──rest_s──► half-open ──one run succeeds──► closed
                                   ▲                   │
                                   └─ it fails: twice the rest, up to rest_s_max
"""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Whether a hook is run."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(slots=True)
class Breaker:
    """The circuit of one hook. Times are monotonic seconds, given by the caller."""

    failures_max: int
    rest_s: float
    rest_s_max: float
    failures: int = 0
    state: State = State.CLOSED
    until_s: float = 0.0
    _resting_s: float = 0.0

    def allows(self, now_s: float) -> bool:
        """Whether the hook may run now. After a rest exactly one caller gets True, until `record` or `release`."""
        if self.state is State.CLOSED:
            return True
        if self.state is State.OPEN and now_s >= self.until_s:
            self.state = State.HALF_OPEN
            return True
        return False

    def release(self) -> None:
        """The run that was allowed did not happen after all: the next caller decides."""
        if self.state is State.HALF_OPEN:
            self.state = State.OPEN

    def record(self, now_s: float, *, good: bool) -> bool:
        """Count a run; True when it opened the circuit."""
        if good:
            self.failures, self._resting_s, self.state = 0, 0.0, State.CLOSED
            return False
        self.failures += 1
        if self.state is State.OPEN or (self.state is State.CLOSED and self.failures < self.failures_max):
            return False  # a run that began before it opened changes nothing
        self._resting_s = min(self._resting_s * 2 or self.rest_s, self.rest_s_max)
        self.until_s = now_s + self._resting_s
        self.state = State.OPEN
        return True
