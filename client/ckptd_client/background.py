"""One thread for the work a training loop must not wait for: mapping arenas, writing the spool."""

import logging
import threading
import time
from collections import deque
from typing import Callable, Deque, Optional

JOBS_MAX = 256

_log = logging.getLogger("ckptd")


class Background:
    """Runs jobs one after another in a daemon thread that starts with the first of them."""

    def __init__(self, name: str) -> None:
        """Name the thread; nothing starts yet."""
        self._name = name
        self._changed = threading.Condition()
        self._jobs: Deque[Callable[[], None]] = deque()
        self._running = False
        self._thread: Optional[threading.Thread] = None

    def submit(self, job: Callable[[], None]) -> bool:
        """Run `job` after those submitted before; False when JOBS_MAX wait already. An exception is logged."""
        with self._changed:
            if len(self._jobs) >= JOBS_MAX:
                return False
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def drain(self, timeout_s: float) -> bool:
        """Wait until no job waits or runs; False when `timeout_s` passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._running, max(0.0, timeout_s))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = False
                self._changed.notify_all()
                # An idle thread leaves: nothing has to be told to end it.
                if not self._changed.wait_for(lambda: bool(self._jobs), IDLE_S):
                    self._thread = None
                    return
                job = self._jobs.popleft()
                self._running = True
            begun_s = time.monotonic()
            try:
                job()
            except Exception:  # noqa: BLE001 - one failed job must not take the others with it
                _log.exception("ckptd: background work failed after %.1f s", time.monotonic() - begun_s)
            del job  # may hold an arena


IDLE_S = 5.0
