"""Checkpoints that this process reads by the daemon's leave: each load under a name of its own.

    begin() ──attach──► held by the daemon ──end()──► detach, again after each hello ──answered──► over
               │ refused()                                    ▲
               ▼                                              │ no answer came: it may be held all the same
             over ◄───────────────────────────────────────────┘

The daemon keeps a checkpoint for as long as any load of it goes on, and tells loads apart by their names:
two threads may read the same one. A name that was not given back would keep a checkpoint until this
process ends. So it is told until a daemon has heard it, and a session hangs up only after that.
"""

import os
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Deque, Dict, List, NamedTuple, Set

from ckptd_client.finder import close_all
from ckptd_client.wire import Message

if TYPE_CHECKING:
    from ckptd_client.session import Session


class Read(NamedTuple):
    """One load: its name, and which checkpoint it got when that is known."""

    name: str
    checkpoint: str = ""


class Reads:
    """The reads of one session. Thread-safe."""

    def __init__(self, session: "Session") -> None:
        """Nothing is read."""
        self._session = session
        self._lock = threading.Lock()
        self._open: Set[str] = set()
        self._over: Deque[Read] = deque()

    def begin(self) -> str:
        """Return the name of a load that is about to begin; end() or refused() must follow."""
        name = os.urandom(16).hex()
        with self._lock:
            self._open.add(name)
        return name

    def refused(self, name: str) -> None:
        """The daemon refused it: there is nothing to give back."""
        with self._lock:
            self._open.discard(name)
        self._session.connection.tick_within(0.0)

    def end(self, read: Read) -> None:
        """The load is over, or nobody knows whether the daemon ever heard of it. Returns at once."""
        self._over.append(read)
        self._session.connection.tick_within(0.0)

    def are_open(self) -> bool:
        """Whether a daemon may hold anything for this session."""
        return bool(self._open)

    def tend(self) -> None:
        """Called now and then: tell the daemon what is over, as far as one is there."""
        for _ in range(len(self._over)):
            read = self._over.popleft()
            # The name is the word; the checkpoint is for a daemon that is too old to know of names.
            fields: Dict[str, str] = {"read": read.name}
            if read.checkpoint:
                fields["checkpoint"] = read.checkpoint
            if not self._session.ask("detach", partial(self._told, read), **fields):
                self._over.append(read)
                return

    def _told(self, read: Read, reply: Message, fds: List[int]) -> None:
        close_all(fds)
        error = reply.get("error")
        if isinstance(error, dict) and error.get("code") == "unreachable":
            self._over.append(read)
        else:
            self.refused(read.name)
