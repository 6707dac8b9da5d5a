"""When to save: every so many steps, epochs or seconds. No I/O."""

import threading
import time
from typing import Any, Callable, Optional


class Cadence:
    """Decides whether it is time for a save; counts what it let pass.

        every = run.every(steps=100, seconds=600)
        ...
        if every.due(step):
            run.save(state, step=step)

    Any of the limits that is reached makes it due, and starts all of them anew.
    """

    def __init__(
        self,
        *,
        steps: Optional[int] = None,
        seconds: Optional[float] = None,
        epochs: Optional[int] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Limits; at least one. ValueError names the one that is wrong."""
        for field, value in (("steps", steps), ("seconds", seconds), ("epochs", epochs)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
                message = f"{field}={value!r} must be a number above 0"
                raise ValueError(message)
        if steps is None and seconds is None and epochs is None:
            message = "every() needs at least one of steps, seconds, epochs"
            raise ValueError(message)
        self._steps, self._seconds, self._epochs = steps, seconds, epochs
        self._clock = clock
        self._lock = threading.Lock()
        self._last_step: Optional[int] = None
        self._last_epoch: Optional[int] = None
        self._last_s = clock()
        self.due_count = 0
        self.skipped_count = 0

    def due(self, step: Optional[int] = None, epoch: Optional[float] = None) -> bool:
        """Say whether to save now. Never raises: what is no number counts as not said.

        Steps and epochs are due at whole multiples, and when a multiple was passed over since the
        last answer; step and epoch 0 are never due.
        """
        step, whole_epoch = _whole(step), _whole(epoch)
        with self._lock:
            now_s = self._clock()
            due = (
                _passed(self._steps, self._last_step, step)
                or _passed(self._epochs, self._last_epoch, whole_epoch)
                or (self._seconds is not None and now_s - self._last_s >= self._seconds)
            )
            self._last_step = step if step is not None else self._last_step
            self._last_epoch = whole_epoch if whole_epoch is not None else self._last_epoch
            if due:
                self._last_s = now_s
                self.due_count += 1
            else:
                self.skipped_count += 1
            return due


def _whole(number: Any) -> Optional[int]:
    """Return the whole part; None for None, NaN, an infinity, or what is no number."""
    if type(number) is int or number is None:
        return number
    try:
        return int(number)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None


def _passed(every: Optional[int], last: Optional[int], now: Optional[int]) -> bool:
    if every is None or now is None:
        return False
    if last is None or now < last:  # the first question, or training went back to an older step
        return now > 0 and now % every == 0
    return now // every > last // every
