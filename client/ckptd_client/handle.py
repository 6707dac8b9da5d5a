"""What a save or a submit gives back: where the checkpoint is on its way, and a way to wait for it.

    level   none ─► staged ─► durable ─► verified ─► tiered        only ever climbs
    state   pending ─► live, or one of ENDED, or "disabled"

Handles are moved by the daemon's pushes, which arrive in the connection's thread.
"""

import logging
import threading
import time
import weakref
from collections import OrderedDict
from typing import Any, Callable, Dict, List, Optional

from ckptd_client.errors import CkptdClientError, CorruptCheckpoint, Refused, TimedOut

LEVELS = ("none", "staged", "durable", "verified", "tiered")
# No level above the one reached can come any more.
ENDED = frozenset({"failed", "corrupt", "missing", "replaced", "skipped", "trashed", "dropped"})
WAIT_S = 600.0
FOLLOWED_MAX = 1024  # unsettled handles that are kept alive although nobody else holds them

_log = logging.getLogger("ckptd")


class Handle:
    """One checkpoint on its way. All attributes are read-only snapshots; thread-safe.

    id       32 hex digits, stable over every restart
    step     as saved, or None
    level    the highest rung reached (LEVELS)
    state    "pending", "live", one of ENDED, or "disabled" (CKPTD_MODE=disabled)
    error    the exception `wait` would raise, None while nothing is wrong
    path     the directory or file it was published as, "" until then
    acknowledged  a daemon knows of it
    spooled  it went into the spool, for no daemon took it; it arrives when one does
    """

    def __init__(self, checkpoint: str, step: Optional[int] = None, *, state: str = "pending") -> None:
        """Begin at level "none"."""
        self.id = checkpoint
        self.step = step
        self.level = LEVELS[0]
        self.state = state
        self.error: Optional[CkptdClientError] = None
        self.path = ""
        self.spooled = False
        self.acknowledged = False
        self._changed = threading.Condition()
        self._callbacks: List[Callable[[Handle], Any]] = []

    def __repr__(self) -> str:
        """Show what a person asks first."""
        return f"<Handle {self.id[:12]} step={self.step} level={self.level} state={self.state}>"

    @property
    def done(self) -> bool:
        """Whether it is durable, or never will be."""
        return self.reached("durable") or self.state in ENDED or self.state == "disabled"

    def reached(self, level: str) -> bool:
        """Say whether `level` or a higher one is reached."""
        return LEVELS.index(self.level) >= LEVELS.index(level)

    def wait(self, level: str = "durable", timeout: Optional[float] = None) -> "Handle":
        """Wait until the checkpoint has reached `level`; return the handle.

        timeout  seconds; None waits WAIT_S

        TimedOut   the limit passed; the checkpoint is still on its way
        Refused    it failed, was replaced by a newer save, or was skipped: `code` says which
        CorruptCheckpoint  what was written does not read back as what was saved
        ValueError  `level` is none of LEVELS
        """
        if level not in LEVELS:
            message = f"level={level!r} must be one of {', '.join(LEVELS)}"
            raise ValueError(message)
        limit_s = WAIT_S if timeout is None else timeout
        if self.state == "disabled":
            return self
        with self._changed:
            self._changed.wait_for(lambda: self.reached(level) or self.state in ENDED, limit_s)
            if self.reached(level):
                return self
            if self.state in ENDED:
                raise self.error or Refused(self.state, f"checkpoint {self.id[:12]} is {self.state}")
        raise TimedOut(f"checkpoint {self.id[:12]} is {self.level}, not {level}, after {limit_s:g} s")

    def add_done_callback(self, callback: Callable[["Handle"], Any]) -> None:
        """Call `callback(handle)` once, when `done` becomes true: at once if it is, else in ckptd's thread.

        It must not block; an exception in it is logged.
        """
        with self._changed:
            if not self.done:
                self._callbacks.append(callback)
                return
        callback(self)

    def apply(self, push: Dict[str, Any]) -> None:
        """Take over what a push, or a reply of `watch`, says. A level never goes down."""
        with self._changed:
            self.acknowledged = True
            level = push.get("level")
            if level in LEVELS and LEVELS.index(level) > LEVELS.index(self.level):
                self.level = level
            self.state = str(push.get("state") or self.state)
            self.path = str(push.get("path") or self.path)
            if self.step is None and isinstance(push.get("step"), int):
                self.step = push["step"]
            if self.state in ENDED:
                self.error = _error(self, push.get("error"))
            self._changed.notify_all()
        self._run_callbacks()

    def fail(self, error: CkptdClientError, state: str = "failed") -> None:
        """End it: nothing was saved. `state` is "failed" or "skipped"."""
        with self._changed:
            self.state = state
            self.error = error
            self._changed.notify_all()
        self._run_callbacks()

    def wait_settled(self, timeout_s: float) -> bool:
        """Wait until it is `done` or lies in the spool: from then on this process is not needed for it."""
        with self._changed:
            return self._changed.wait_for(lambda: self.done or self.spooled, max(0.0, timeout_s))

    def wait_acknowledged(self, timeout_s: float) -> bool:
        """Wait until a daemon knows of it, it lies in the spool, or it was refused."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self.acknowledged or self.spooled or self.state in ENDED, max(0.0, timeout_s)
            )

    def set_spooled(self) -> None:
        """Note that it lies in the spool."""
        with self._changed:
            self.spooled = True
            self._changed.notify_all()

    def _run_callbacks(self) -> None:
        with (
            self._changed
        ):  # taken out under the lock and called outside of it: each runs once and may wait() on others
            if not self.done:
                return
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:  # noqa: BLE001 - the caller's code must not end the thread that serves every handle
                _log.exception("ckptd: a done callback of %r failed", self)


def _error(handle: Handle, error: Any) -> CkptdClientError:
    error = error if isinstance(error, dict) else {}
    message = str(error.get("message") or f"checkpoint {handle.id[:12]} is {handle.state}")
    if handle.state == "corrupt":
        return CorruptCheckpoint(handle.path, str(error.get("file", "")), message)
    return Refused(str(error.get("code") or handle.state), message, str(error.get("hint", "")))


class Following:
    """The handles of one session by id: strongly until they settle, weakly after."""

    def __init__(self) -> None:
        """Follow nothing yet."""
        self._lock = threading.Lock()
        self._unsettled: OrderedDict[str, Handle] = OrderedDict()
        self._all: weakref.WeakValueDictionary[str, Handle] = weakref.WeakValueDictionary()

    def add(self, handle: Handle) -> Handle:
        """Follow `handle`; beyond FOLLOWED_MAX the oldest unsettled one is only followed while somebody holds it."""
        with self._lock:
            self._all[handle.id] = handle
            self._unsettled[handle.id] = handle
            if len(self._unsettled) > FOLLOWED_MAX:
                self._unsettled.popitem(last=False)
        return handle

    def apply(self, push: Dict[str, Any]) -> Optional[Handle]:
        """Move the handle a push is about; None when nobody here follows it."""
        with self._lock:
            handle = self._all.get(str(push.get("checkpoint")))
        if handle is None:
            return None
        handle.apply(push)
        self.settle(handle)
        return handle

    def rename(self, handle: Handle, checkpoint: str) -> None:
        """The daemon knows the checkpoint of `handle` by another id: follow it under that one."""
        with self._lock:
            if checkpoint == handle.id:
                return
            self._all.pop(handle.id, None)
            unsettled = self._unsettled.pop(handle.id, None)
            handle.id = checkpoint
            self._all[checkpoint] = handle
            if unsettled is not None:
                self._unsettled[checkpoint] = handle

    def settle(self, handle: Handle) -> None:
        """Let go of a handle that is verified or ended."""
        if handle.reached("verified") or handle.state in ENDED:
            with self._lock:
                self._unsettled.pop(handle.id, None)

    def unsettled(self) -> List[str]:
        """Return the ids to ask about after a reconnect."""
        with self._lock:
            return list(self._unsettled)

    def in_flight(self) -> int:
        """Return how many are neither durable nor ended."""
        with self._lock:
            return sum(1 for handle in self._unsettled.values() if not handle.done)

    def wait_done(self, timeout_s: float) -> bool:
        """Wait until every followed handle that is not in the spool has ended or is durable."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            handles = list(self._unsettled.values())
        return all(handle.wait_settled(deadline_s - time.monotonic()) for handle in handles)
