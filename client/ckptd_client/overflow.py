"""The way of a save that no daemon takes: copied into memory of our own, written to the spool in the background.

At most one image is on its way at a time, and its memory is kept for the next: a daemon that is away
costs a trainer one more copy of its state, not one per save.
"""

import logging
import os
import threading
import time
from typing import Any, Callable, Dict, Optional

from ckptd_client import control, places, spool
from ckptd_client.arena import MappedArena
from ckptd_client.background import Background
from ckptd_client.gather import gather
from ckptd_client.leases import Lease

SPOOL_BYTES_MAX = 256 << 30
KEEP_S = 120.0  # unused memory is given back after this

_log = logging.getLogger("ckptd")
_TOO_MUCH = "too much background work waits"

Done = Callable[[Optional[OSError]], None]


class NotCommitted(OSError):
    """The arena was lent again while its image was being written: the daemon has had what was in it."""


class Overflow:
    """The spool as one experiment uses it. Thread-safe."""

    def __init__(self, background: Background, spool_bytes_max: int) -> None:
        """Write at most `spool_bytes_max` bytes into the spool; nothing is made before the first use."""
        self._background = background
        self._spool_bytes_max = spool_bytes_max
        self._changed = threading.Condition()
        self._arena: Optional[MappedArena] = None
        self._busy = False
        self._generation = 0
        self.lost_count = 0  # images that could not be written and are nowhere else
        self._used_s = 0.0
        self._state = places.state_dir()
        self.directory = ""  # the spool that a daemon said it reads; else the user's own
        self._is_shared = False  # it reads no other

    def where(self) -> str:
        """Return the spool's directory, made and checked. OSError, PlaceError when it can't be used."""
        if self._is_usable():
            return self.directory
        return places.spool_dir(places.ensure_state_dir(self._state))

    def found(self, directory: str, *, is_shared: bool) -> None:
        """A daemon says which spool it reads. A shared one does not read the user's own: what lies there is brought over."""
        self.directory, self._is_shared = directory, is_shared
        if is_shared and directory:
            self._background.submit(self._gather)

    def unread(self) -> Optional[str]:
        """Return the spool that saves go to when it is one that the daemon does not look into; None: it does."""
        return places.spool_dir(self._state) if self._is_shared and not self._is_usable() else None

    def _is_usable(self) -> bool:
        return bool(self.directory) and os.access(self.directory, os.W_OK | os.X_OK)

    def _gather(self) -> None:
        own, count = places.spool_dir(self._state), 0
        try:
            into = self.where()
            if into != own:
                count = gather(own, into, self._spool_bytes_max)
        except (OSError, ValueError) as error:  # PlaceError among the latter: there is no place for a spool
            _log.warning("ckptd: not every save in %s could be brought to the daemon: %s", own, error)
        if count:
            _log.warning("ckptd: %d saves of before, in %s, were brought to the daemon", count, own)

    def take(self, size_bytes: int, wait_s: float) -> Optional[Lease]:
        """Return memory for one image, its control page LEASED to this process; None when the last one is still busy.

        Blocks for at most `wait_s`, or for one write where no thread is to be had. MemoryError, OSError when
        there is no memory.
        """
        deadline_s = time.monotonic() + wait_s
        if self._busy:
            self._background.stand_in(deadline_s)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._busy, max(0.0, deadline_s - time.monotonic())):
                return None
            self._busy = True
            # Each use under a number of its own: nothing that was begun for an earlier one is taken for this one.
            self._generation += 1
            generation = self._generation
            arena, self._arena = self._arena, None
        try:
            if arena is None or arena.size_bytes < size_bytes:
                if arena is not None:
                    arena.close()
                arena = MappedArena.anonymous(size_bytes, os.urandom(16))
            control.write_lease(arena.buffer, arena.arena_id, generation, os.getpid())
        except BaseException:
            self.drop(None)
            raise
        return Lease(arena, generation)

    def drop(self, arena: Optional[MappedArena]) -> None:
        """Give memory back from `take` that nothing was committed in."""
        with self._changed:
            self._arena = arena
            self._busy = False
            self._used_s = time.monotonic()
            self._changed.notify_all()

    def write(self, lease: Lease, checkpoint: str, done: Done) -> None:
        """Write a committed image in the background; `done(error)` is called there. Takes the memory back."""

        def work() -> None:
            # An interrupt leaves the memory held: the job is done again.
            error = _attempt(lambda: self._write(lease, checkpoint))
            self.drop(lease.arena)
            if error is not None:
                self.lost_count += 1
            done(error)

        try:
            is_taken = self._background.submit(work)
        except BaseException:
            self.drop(lease.arena)
            raise
        if not is_taken:
            self.drop(lease.arena)
            self.lost_count += 1
            done(OSError(_TOO_MUCH))

    def rescue(self, lease: Lease, checkpoint: str, done: Done) -> None:
        """Write what was committed in a lent arena, in the background: its daemon is gone, or does not know it.

        done(NotCommitted) when the arena was lent again meanwhile: then a daemon has had the save.
        """
        if not self._background.submit(lambda: done(_attempt(lambda: self._write(lease, checkpoint)))):
            done(OSError(_TOO_MUCH))

    def offer(self, checkpoint: str, request: Dict[str, Any]) -> Optional[OSError]:
        """Write a `submit` request into the spool, here and now; return what went wrong."""
        return _attempt(lambda: self._write_offer(checkpoint, request))

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is on its way to the spool; False when `timeout_s` passed first."""
        return self._background.drain(timeout_s)

    def tend(self) -> None:
        """Give unused memory back; called now and then."""
        with self._changed:
            if self._arena is not None and not self._busy and time.monotonic() - self._used_s > KEEP_S:
                self._arena.close()
                self._arena = None

    def _write_offer(self, checkpoint: str, request: Dict[str, Any]) -> None:
        spool.write_offer(self.where(), checkpoint, request)

    def _write(self, lease: Lease, checkpoint: str) -> None:
        """Write one committed image.

        A lent arena belongs to the daemon from its commit on: it may be published and lent again at
        any moment. So the image is checked before and, once all bytes are written, again: the same
        generation still committed at the end means that nobody wrote in between.
        """
        image = lease.committed()
        if image is None:
            raise NotCommitted("the arena holds another save by now")
        directory = self.where()
        spool.check_room(directory, len(image), self._spool_bytes_max)
        spool.write_arena(directory, checkpoint, image, check=lambda: _check(lease))


def _check(lease: Lease) -> None:
    if lease.committed() is None:
        raise NotCommitted("the arena was lent again while it was written")


def _attempt(work: Callable[[], None]) -> Optional[OSError]:
    try:
        work()
    except OSError as error:
        return error
    except ValueError as error:  # PlaceError among them: there is no place for a spool
        return OSError(str(error))
    except Exception as error:  # noqa: BLE001 - whoever waits for the end of a write must hear of any end
        return OSError(f"{type(error).__name__}: {error}")
    return None
