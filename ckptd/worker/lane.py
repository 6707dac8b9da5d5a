"""Threads that run requests: a bounded queue and a bounded number of threads, each request a whole job."""

import threading
from collections import deque
from collections.abc import Callable

from ckptd.errors import Busy

Job = Callable[[], None]


class Lane:
    """A few threads and the jobs that wait for them, oldest first.

    Jobs never raise: a request answers its own errors. Threads are started as they are needed and
    stay; they end with the process.
    """

    def __init__(self, name: str, *, threads_max: int, waiting_max: int) -> None:
        """Start empty; `waiting_max` jobs may wait, one more is refused."""
        self._name = name
        self._threads_max = threads_max
        self._waiting_max = waiting_max
        self._waiting: deque[tuple[int, Job]] = deque()
        self._wake = threading.Condition()
        self._threads = 0
        self._idle = 0

    def submit(self, number: int, job: Job) -> None:
        """Queue a job under the number of its request. Busy when too many wait. Never blocks."""
        with self._wake:
            if len(self._waiting) >= self._waiting_max:
                raise Busy(f"{self._waiting_max} requests wait already", retry_after_s=1.0)
            self._waiting.append((number, job))
            if self._idle >= len(self._waiting):
                self._wake.notify()
            elif self._threads < self._threads_max:
                self._threads += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def waiting(self) -> list[int]:
        """Return the numbers of the requests that wait for a thread."""
        with self._wake:
            return [number for number, _ in self._waiting]

    def _run(self) -> None:
        while True:
            with self._wake:
                self._idle += 1
                while not self._waiting:
                    self._wake.wait()
                self._idle -= 1
                _, job = self._waiting.popleft()
            job()
