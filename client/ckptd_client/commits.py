"""Saves whose commit the daemon has not acknowledged yet. None of them may be lost, whoever dies first.

    committed in the page ──message──► acknowledged: the arena is the daemon's
            │                 │ too much waits to be sent: tried again with the next tick
            │                 │ connection lost: sent again after the next hello
            │                 │ daemon away for RESCUE_AFTER_S, or it does not know the arena,
            │                 ▼ or this process ends
            │             written to the spool from the arena's own bytes
            └── this process dies: the next look of a daemon at its arenas finds the word COMMITTED

The checkpoint's id makes all ways one: a daemon that meets it twice has it once.
"""

import threading
import time
from typing import TYPE_CHECKING, Dict, List, NamedTuple, Optional

from ckptd_client.errors import Refused
from ckptd_client.finder import close_all
from ckptd_client.handle import Handle
from ckptd_client.leases import Lease
from ckptd_client.overflow import NotCommitted
from ckptd_client.wire import Message

if TYPE_CHECKING:
    from ckptd_client.session import Session

RESCUE_AFTER_S = 5.0
ANSWER_S = 5.0  # how long the end of a process waits for a daemon that answers
# What the daemon says of this save and would say again of its copy in the spool.
_FINAL = frozenset(
    {"bad_request", "bad_path", "not_authorized", "quota", "invalid_format", "unsupported_version", "held"}
)


class _Commit(NamedTuple):
    lease: Lease
    handle: Handle
    since_s: float
    stall_s: float


class Commits:
    """The unacknowledged commits of one session. Thread-safe."""

    def __init__(self, session: "Session") -> None:
        """Nothing is on its way."""
        self._session = session
        self._changed = threading.Condition()
        self._open: Dict[str, _Commit] = {}
        self._rescuing: Dict[str, _Commit] = {}
        # Of those that are open: not sent, and not to be before this time. After a hello all are sent again.
        self._unsent: Dict[str, float] = {}
        self._refused = False  # since the last settle()

    def add(self, lease: Lease, handle: Handle, stall_s: float) -> None:
        """Tell the daemon of a committed arena, now or after the next hello. Never blocks.

        `stall_s` is how long training stood still for it, for the daemon's statistics.
        """
        commit = _Commit(lease, handle, time.monotonic(), stall_s)
        with self._changed:
            self._open[handle.id] = commit
        self._send(commit)

    def up(self) -> None:
        """A daemon answers: tell it of everything it may not have heard of."""
        with self._changed:
            waiting = list(self._open.values())
        for commit in waiting:
            self._send(commit)

    def tend(self) -> None:
        """Called now and then: what could not be sent is sent; what waits for an absent daemon for long is spooled."""
        now_s = time.monotonic()
        if self._session.connection.is_up:
            with self._changed:
                due = [checkpoint for checkpoint, at_s in self._unsent.items() if now_s >= at_s]
                unsent = [self._open[checkpoint] for checkpoint in due if checkpoint in self._open]
            for commit in unsent:
                self._send(commit)
            return
        with self._changed:
            late = [commit for commit in self._open.values() if now_s - commit.since_s > RESCUE_AFTER_S]
        for commit in late:
            self._rescue(commit)

    def settle(self, deadline_s: float) -> bool:
        """Wait for acknowledgements, then write the rest to the spool.

        False when `deadline_s` came first, when the spool did not take it, and when a save was refused since
        the last time: then something that was handed over is neither with a daemon nor in the spool.
        """
        connection = self._session.connection
        with self._changed:
            asked = {*self._open, *self._rescuing}  # not what other threads save meanwhile
            if connection.is_up:
                limit_s = min(ANSWER_S, deadline_s - time.monotonic())
                self._changed.wait_for(lambda: not asked & self._open.keys() or not connection.is_up, max(0.0, limit_s))
            waiting = [self._open[checkpoint] for checkpoint in asked & self._open.keys()]
        for commit in waiting:
            self._rescue(commit)
        self._session.overflow.drain(deadline_s - time.monotonic())  # done here, where no thread is to be had
        with self._changed:
            self._changed.wait_for(lambda: not asked & self._rescuing.keys(), max(0.0, deadline_s - time.monotonic()))
            refused, self._refused = self._refused, False
            return not (asked & self._rescuing.keys() or asked & self._open.keys() or refused)

    def _send(self, commit: _Commit) -> None:
        lease, handle = commit.lease, commit.handle
        with self._changed:
            self._unsent.pop(handle.id, None)
        sent = self._session.ask(
            "commit",
            lambda reply, fds: self._on_reply(commit, reply, fds),
            checkpoint=handle.id,
            arena=lease.name,
            generation=lease.generation,
            stall_s=round(commit.stall_s, 6),
        )
        if not sent:
            with self._changed:
                if handle.id in self._open:
                    self._unsent[handle.id] = 0.0

    def _on_reply(self, commit: _Commit, reply: Message, fds: List[int]) -> None:
        close_all(fds)
        error = reply.get("error")
        code = str(error.get("code")) if isinstance(error, dict) else ""
        if code == "unreachable":
            with self._changed:
                if commit.handle.id in self._open:  # whatever the next hello comes to: a tick sees to it as well
                    self._unsent[commit.handle.id] = 0.0
                self._changed.notify_all()
            return
        if reply.get("ok") is True:
            if self._pop(commit):
                self._session.count("staged")
                self._session.handles.apply({"state": "pending", **reply, "checkpoint": commit.handle.id})
                self._session.leases.rest(commit.lease)
        elif code in _FINAL and isinstance(error, dict):
            if self._pop(commit, refused=True):
                refused = Refused(code, str(error.get("message", "")), str(error.get("hint", "")))
                self._session.count("failed")
                self._session.say(f"commit {code}", "step %s was refused: %s", commit.handle.step, refused)
                commit.handle.fail(refused)
                self._session.handles.settle(commit.handle)
                self._session.leases.give_back(commit.lease)
        else:
            self._rescue(commit)

    def _pop(self, commit: _Commit, *, refused: bool = False) -> bool:
        with self._changed:
            found = self._open.pop(commit.handle.id, None)
            self._unsent.pop(commit.handle.id, None)
            self._refused = self._refused or (refused and found is not None)
            self._changed.notify_all()
        return found is not None

    def _rescue(self, commit: _Commit) -> None:
        with self._changed:
            if self._open.pop(commit.handle.id, None) is None:
                return
            self._rescuing[commit.handle.id] = commit
            self._unsent.pop(commit.handle.id, None)
        try:
            self._session.overflow.rescue(commit.lease, commit.handle.id, lambda error: self._rescued(commit, error))
        except BaseException:
            with self._changed:
                self._open[commit.handle.id] = self._rescuing.pop(commit.handle.id, commit)
            raise

    def _rescued(self, commit: _Commit, error: Optional[OSError]) -> None:
        session, handle = self._session, commit.handle
        kept = error is not None and not isinstance(error, NotCommitted)
        with self._changed:
            self._rescuing.pop(handle.id, None)
            if kept:  # the arena still holds it: the next daemon hears of it
                self._open[handle.id] = commit._replace(since_s=time.monotonic())
                self._unsent[handle.id] = time.monotonic() + RESCUE_AFTER_S  # should the one that is there know it now
            self._changed.notify_all()
        if kept:
            session.say("spool", "step %s could not be written to the spool: %s", handle.step, error)
            return
        if error is None:
            session.count("spooled")
            handle.set_spooled()
        session.tell_watch([handle.id])
        session.leases.rest(commit.lease)
