"""Hot copies this process has mapped, until they are its own.

A hot load maps the daemon's arena copy-on-write, and the daemon lends that arena to nobody as long
as it knows of the reader. Two things end that: the connection may break, and a state that a script
keeps for its whole run would keep the arena from the saves to come. So what is still mapped after
OWN_AFTER_S, or when the connection breaks, is made private in the background, page by page; from
then on the arena is not needed, and is given back.
"""

import ctypes
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Deque, Dict, List, Set, Tuple

from ckptd_client import forking
from ckptd_client.reads import Read

if TYPE_CHECKING:
    from ckptd_client.session import Session

OWN_AFTER_S = 3.0  # most scripts have copied what they loaded into their model by then, and let go of it
PIECE_BYTES = 64 << 20  # between pieces it is asked whether the state is still in use

_MADV_POPULATE_WRITE = 23  # Linux 5.14; where it is unknown the arena is kept until the state is freed
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

Ranges = List[Tuple[int, int]]


class HotCopies:
    """The mapped hot copies of one session. Thread-safe; `released` may be called from a destructor."""

    def __init__(self, session: "Session") -> None:
        """Hold none."""
        self._session = session
        self._lock = threading.Lock()
        self._held: Dict[int, Tuple[Read, float, Ranges]] = {}
        self._freed: Deque[int] = deque()
        self._last = 0
        self._owned: Set[int] = set()  # let go of; a few numbers for each load of a process
        self._shared: Set[int] = set()  # with a child, which may read on when nobody here does
        self._running = False
        forking.watch(self)

    def token(self) -> int:
        """Return the number of a load that is about to begin."""
        with self._lock:
            self._last += 1
            return self._last

    def hold(self, token: int, read: Read, fd: int) -> None:
        """Note that the arena behind `fd` is mapped; from now on `tend` makes it private when its time has come."""
        ranges = _private_mappings(fd)
        with self._lock:
            self._held[token] = (read, time.monotonic() + OWN_AFTER_S, ranges)
        self._session.connection.tick_within(OWN_AFTER_S)

    def failed(self, token: int) -> None:
        """The load came to nothing: there is no mapping to look after."""
        with self._lock:
            self._owned.add(token)

    def freed(self, token: int) -> None:
        """Nothing uses the mapping any more. Takes no lock: it may run wherever an object dies."""
        self._freed.append(token)

    def tend(self, *, now: bool = False) -> None:
        """Called now and then, and with `now` when the connection broke: give back, and make private what is due."""
        for _ in range(len(self._freed)):
            token = self._freed.popleft()
            if not self._let_go(token):
                self._freed.append(token)  # freed before it was held: the next look finds it
        with self._lock:
            due = [token for token, (_, at_s, _) in self._held.items() if now or time.monotonic() >= at_s]
            if not due or self._running:
                return
            self._running = True
        try:
            threading.Thread(target=self._own, args=(due,), name="ckptd-own", daemon=True).start()
        except (RuntimeError, MemoryError):  # no thread is to be had: the next look tries again
            with self._lock:
                self._running = False

    def own_all(self) -> None:
        """Make everything private now, in this thread: a fork is about to happen. What is given back goes later.

        What can't be made private is kept from being lent again for as long as this process lives.
        """
        with self._lock:
            held = [token for token, (_, _, ranges) in self._held.items() if ranges]
        for token in held:
            if not self._own_one(token) and token not in self._freed:
                with self._lock:
                    self._shared.add(token)

    def _own(self, due: List[int]) -> None:
        try:
            for token in due:
                if self._own_one(token):
                    self._let_go(token)
                    self._session.connection.tick_within(0.0)
        finally:
            with self._lock:
                self._running = False

    def _own_one(self, token: int) -> bool:
        """Break the sharing of every page; False when that can't be done or is not needed any more.

        Where the mapping went away meanwhile its addresses may belong to another one: then pages of
        that one are filled in, which changes nothing that it holds.
        """
        with self._lock:
            read, _, ranges = self._held.get(token, (Read(""), 0.0, []))
        for start, end in ranges:
            for at in range(start, end, PIECE_BYTES):
                if token not in self._held or token in self._freed:
                    return False
                if _libc.madvise(at, min(PIECE_BYTES, end - at), _MADV_POPULATE_WRITE) != 0:
                    with self._lock:
                        if token in self._held:  # unknown to this kernel, or memory is short: ask again much later
                            self._held[token] = (read, time.monotonic() + 100 * OWN_AFTER_S, ranges)
                    return False
        return bool(ranges)

    def _let_go(self, token: int) -> bool:
        """Give back what the daemon keeps for this one load; False when the token was not held.

        Another load of the same checkpoint has a place of its own in the arena, and keeps it.
        """
        with self._lock:
            if token not in self._held:
                return token in self._owned
            read = self._held.pop(token)[0]
            self._owned.add(token)
            if token in self._shared:
                return True
        self._session.reads.end(read)
        return True


def _private_mappings(fd: int) -> Ranges:
    """Return the address ranges at which this process has the file behind `fd` mapped privately."""
    inode = os.fstat(fd).st_ino
    found: Ranges = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            addresses, rights, _, _, number, *_ = line.split()
            if int(number) == inode and rights == "rw-p" and "/memfd:" in line:
                start, _, end = addresses.partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found
