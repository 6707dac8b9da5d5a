"""What a verb gets beside its request: its arena, its way to answer in parts, its end.

One Context per request. Verbs are plain functions `run(request, context) -> reply struct` that
block; they look at `cancelled` wherever they loop, and call `alive()` there as well.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from ckptd.errors import TimedOut
from ckptd.worker.protocol import RootMark

ALIVE_EVERY_S = 5.0  # at most
BEATS = 8  # in the time a worker may be silent: a few that come late are no verdict


@dataclass(frozen=True, slots=True)
class Limits:
    """What the daemon allows this worker, from its command line.

    parser_bytes_max  address space of the child that parses foreign headers
    parser_cpu_s      CPU time of that child
    alive_every_s     how often a request that goes on says so
    """

    parser_bytes_max: int = 512 << 20
    parser_cpu_s: float = 10.0
    alive_every_s: float = ALIVE_EVERY_S


class Cancelled(TimedOut):
    """The daemon no longer wants the answer; the verb stopped at its next look."""

    default_hint = "nobody has to act: the one who asked went away"


class TakesLong(Exception):
    """What was asked quickly needs contents to be read."""


@dataclass(slots=True)
class Context:
    """One request's surroundings.

    send       sends one frame body ({"part": ...} or {"alive": true}); blocks while the daemon
               does not read, raises OSError when it is gone
    fd         the arena that came with the request, or None; it closes when the verb has answered
    cancelled  set by the daemon's `cancel`
    quick      the thread is for questions of a millisecond: TakesLong instead of reading much
    root       what the request's root is known by, once that was seen (rootmark.checked)
    """

    send: Callable[[dict[str, object]], None] = lambda _: None
    fd: int | None = None
    limits: Limits = field(default_factory=Limits)
    cancelled: threading.Event = field(default_factory=threading.Event)
    quick: bool = False
    root: RootMark | None = None
    _beat_s: float = field(default_factory=time.monotonic)
    _held: list[Callable[[], None]] = field(default_factory=list)

    def send_part(self, part: msgspec.Struct) -> None:
        """Send one part of a long answer. Blocks while the daemon does not read."""
        self.send({"part": part})

    def alive(self) -> None:
        """Tell the daemon that bytes or entries went by since the last call; cheap, call it often.

        Progress speaks, not a timer: a request that hangs in the kernel falls silent, and the
        daemon's timeout finds it, while a slow one of hours goes on. Raises Cancelled.
        """
        if self.cancelled.is_set():
            raise Cancelled("the request was cancelled")
        now_s = time.monotonic()
        if now_s - self._beat_s >= self.limits.alive_every_s:
            self._beat_s = now_s
            self.send({"alive": True})

    def after(self, act: Callable[[], None]) -> None:
        """Do this when the verb has answered: what takes time and nobody waits for, as unmapping an arena (20 ms/GB)."""
        self._held.append(act)

    def close(self) -> None:
        """Do what waited for the answer; close the arena that came along."""
        while self._held:
            self._held.pop()()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
