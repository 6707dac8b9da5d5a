"""One thread for the work a training loop must not wait for: mapping arenas, writing the spool.

Where no thread can be started (a limit of processes, memory, an interpreter that ends) the jobs wait:
the next look tries again, and whoever must have them done meanwhile does them himself.
"""

import logging
import threading
import time
from collections import deque
from typing import Callable, Deque, Optional

JOBS_MAX = 256
IDLE_S = 5.0

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
        self._warned = False

    def submit(self, job: Callable[[], None]) -> bool:
        """Run `job` after those submitted before; False when JOBS_MAX wait already. An exception is logged."""
        with self._changed:
            if len(self._jobs) >= JOBS_MAX:
                return False
            self._jobs.append(job)
            self._has_thread()
            self._changed.notify_all()
        return True

    def tend(self) -> bool:
        """Called now and then: False when jobs wait and there is no thread for them, nor one to be had."""
        with self._changed:
            return not self._jobs or self._has_thread()

    def drain(self, timeout_s: float) -> bool:
        """Wait until no job waits or runs; False when `timeout_s` passed first. Runs them here when no thread can."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self.stand_in(deadline_s)
            with self._changed:
                if not self._jobs and not self._running:
                    return True
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return False
                if not self._jobs or self._running or self._has_thread():
                    self._changed.wait(left_s)

    def stand_in(self, deadline_s: float) -> None:
        """Run here what waits while no thread can be started for it; begins nothing after `deadline_s`."""
        while True:
            with self._changed:
                # One after another, here as well: while another caller stands in, this one has nothing to do.
                if not self._jobs or self._running or time.monotonic() >= deadline_s or self._has_thread():
                    return
                job = self._jobs.popleft()
                self._running = True
            try:
                self._run_one(job)
            except BaseException:  # Ctrl-C: what it was about is still to be done
                with self._changed:
                    self._jobs.appendleft(job)
                raise
            finally:
                del job
                self._rest()

    def _has_thread(self) -> bool:
        """Start the thread where there is none; False when that can't be done now. Called with the lock held."""
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:
                if not self._warned:
                    self._warned = True
                    _log.warning("ckptd: no thread for background work (%s); it waits until there is one", error)
                return False
            self._thread = thread  # only now: what never started must not be waited for
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                # An idle thread leaves: nothing has to be told to end it.
                if not self._changed.wait_for(lambda: bool(self._jobs) and not self._running, IDLE_S):
                    self._thread = None
                    return
                job = self._jobs.popleft()
                self._running = True
            try:
                self._run_one(job)
            finally:
                del job  # may hold an arena
                self._rest()

    def _rest(self) -> None:
        with self._changed:
            self._running = False
            self._changed.notify_all()

    def _run_one(self, job: Callable[[], None]) -> None:
        begun_s = time.monotonic()
        try:
            job()
        except Exception:  # noqa: BLE001 - one failed job must not take the others with it
            _log.exception("ckptd: background work failed after %.1f s", time.monotonic() - begun_s)
