"""The client's session with a daemon: finds it, keeps it, matches replies, hands out pushes.

One thread owns the socket. Callers only ever append a frame and, at most, wait for an event with a
limit: no call here waits for the daemon to read, to answer or to live, except for as long as asked.

    down ──dial, check uid, hello──> up ──end of stream, breach of the framing, silence──> down
      └──────────── pause, doubling from BACKOFF_S to BACKOFF_S_MAX ◄─────────────────────────┘

A daemon that holds requests and says nothing for PING_AFTER_S is asked a question that costs it
nothing; no answer within HANG_S, and the connection is given up: a stopped or hung daemon is an
absent one.
"""

import logging
import os
import random
import select
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from ckptd_client.autostart import is_allowed as may_start
from ckptd_client.channel import Channel, ChannelLost, Received
from ckptd_client.errors import TimedOut, Unavailable
from ckptd_client.finder import Finder, Found, close_all, error_of
from ckptd_client.places import SocketPlace, named_place, socket_places, state_dir
from ckptd_client.wire import VERSION, FrameError, Message, encode

BACKOFF_S = 0.05
BACKOFF_S_MAX = 5.0
STABLE_S = 1.0  # a connection that lived this long starts the pauses anew
PING_AFTER_S = 1.0
HANG_S = 3.0
PENDING_MAX = 1024  # requests without a reply on one connection
AGAIN_S = 0.2  # until what could not be sent although a daemon is there is tried again
# The acts of a save, of which there are no more than arenas: never kept back by requests of other kinds.
_SAVING = frozenset({"commit", "abandon"})
JOIN_S = 1.0
TICK_AGAIN_S = 1.0  # when a tick failed

OnReply = Callable[[Message, List[int]], None]

_DICE = random.SystemRandom()  # not the generator whose state a training run keeps in its checkpoints

_log = logging.getLogger("ckptd")


class Callbacks(NamedTuple):
    """What the owner of a connection wants to hear; all are called in the connection's thread and must not block.

    push(message)  the daemon spoke first          up(hello)  a connection stands; hello is the daemon's reply
    down(reason)   it is gone                      tick()     returns seconds until it wants to be called again;
                                                              while down it is called after each attempt to connect
    """

    push: Callable[[Message], None] = lambda _message: None
    up: Callable[[Message], None] = lambda _hello: None
    down: Callable[[str], None] = lambda _reason: None
    tick: Callable[[], float] = lambda: 3600.0


class Connection:
    """A connection that comes back by itself. Safe from several threads; safe after fork."""

    def __init__(
        self, socket: Optional[str] = None, *, autostart: bool = False, callbacks: Optional[Callbacks] = None
    ) -> None:
        """Prepare a connection to `socket`, or to the first daemon found; nothing happens before `start()`.

        PlaceError  the socket's path is too long
        """
        self.places: Sequence[SocketPlace] = [named_place(socket)] if socket else socket_places()
        # Asked for here and not when it is needed: the environment is what it was when the caller decided.
        self._state_to_start = state_dir() if autostart and may_start() else ""
        self._callbacks = callbacks or Callbacks()
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._channel: Optional[Channel] = None
        self._thread: Optional[threading.Thread] = None
        self._pending: Dict[int, OnReply] = {}
        self._last_id = 0
        self._closing = threading.Event()
        self._finder = Finder(self.places, self._closing, self._state_to_start)
        self._tried = False
        self._broken = ""
        self._tick_at_s = 0.0
        self._wake_in, self._wake_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.hello: Message = {}
        self.is_shared = False  # the daemon is not the user's own: it serves everybody
        self.problem = self._finder.problem

    def start(self) -> None:
        """Begin to connect in the background. Idempotent; returns at once."""
        if self._pid != os.getpid():
            self._leave_parent()
        with self._changed:
            if self._thread is None and not self._closing.is_set():
                thread = threading.Thread(target=self._run, name="ckptd-connection", daemon=True)
                try:
                    thread.start()
                except (RuntimeError, MemoryError) as error:  # the next call that needs a daemon tries again
                    self._tried = True
                    self.problem = f"no thread to connect with: {error}"
                else:
                    self._thread = thread

    @property
    def is_up(self) -> bool:
        """Whether a daemon has said hello on a connection that stands, in this process."""
        return self._channel is not None and not self._broken and self._pid == os.getpid()

    def is_own_thread(self) -> bool:
        """Whether the caller runs in the connection's thread, where nothing may wait for an answer."""
        return threading.current_thread() is self._thread

    def wait_up(self, timeout_s: float) -> bool:
        """Wait for the first attempt to connect to end; return whether a daemon answered.

        Once an attempt has failed the answer is immediate: whoever needs a daemon now does without.
        """
        self.start()
        with self._changed:
            self._changed.wait_for(lambda: self._channel is not None or self._tried, timeout_s)
        return self.is_up

    def request(self, op: str, timeout_s: float, **fields: Any) -> Message:
        """Send one request and return its reply; descriptors, if any, are in reply["fds"] and the caller's to close.

        Unavailable  no daemon, or it went away before the answer     TimedOut  no answer within `timeout_s`
        NotFound, Refused  the daemon's error
        """
        reply = self.exchange(op, timeout_s, **fields)
        if reply.get("ok") is not True:
            raise error_of(reply)
        return reply

    def exchange(self, op: str, timeout_s: float, **fields: Any) -> Message:
        """Like `request`, but return the daemon's error as the reply it is ("ok" false, "error")."""
        if self.is_own_thread():
            message = "a callback must not wait for the thread it runs in"
            raise RuntimeError(message)
        deadline_s = time.monotonic() + timeout_s
        waiter = _Waiter()
        if not self.wait_up(timeout_s) or not self.request_nowait(op, waiter.take, **fields):
            raise Unavailable(f"no daemon: {self.problem}")
        return waiter.wait(op, max(0.0, deadline_s - time.monotonic()))

    def request_nowait(self, op: str, on_reply: OnReply, **fields: Any) -> bool:
        """Send one request without waiting; False when no daemon can take it now.

        on_reply(message, fds) runs in the connection's thread: with the reply, or with the error
        "unreachable" when the connection ends first. It owns the descriptors.

        FrameError, ValueError  the request itself can't be sent
        """
        if self._pid != os.getpid():
            self.start()
        with self._changed:
            is_full = len(self._pending) >= PENDING_MAX and op not in _SAVING
            if self._channel is None or self._broken or is_full:
                return False
            self._last_id += 1
            if not self._channel.queue(encode({"v": VERSION, "id": self._last_id, "op": op, **fields})):
                return False
            self._pending[self._last_id] = on_reply
            try:
                self._channel.flush()
            except ChannelLost as error:
                self._broken = str(error)
            if self._broken or self._channel.wants_write or len(self._pending) == 1:
                self._wake()  # the thread must write on, hang up, or watch for silence
        return True

    def tick_within(self, delay_s: float) -> None:
        """Have `callbacks.tick` called within `delay_s` seconds when a connection stands."""
        at_s = time.monotonic() + delay_s
        if at_s < self._tick_at_s:
            self._tick_at_s = at_s
            self._wake()

    def close(self) -> None:
        """Hang up and end the thread; waits at most JOIN_S for it. Idempotent."""
        if self._pid != os.getpid():
            self._close_fds()
            return
        self._closing.set()
        thread = self._thread
        if thread is None:
            self._close_fds()
        self._wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(JOIN_S)

    # The connection's thread -------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = BACKOFF_S
        while not self._closing.is_set():
            found = self._finder.find()
            if found is None:
                self.problem = self._finder.problem
                self._call(self._callbacks.tick)
            else:
                begun_s = time.monotonic()
                self._lose(found.channel, self._serve(found))
                if time.monotonic() - begun_s > STABLE_S:
                    pause_s = BACKOFF_S
            with self._changed:
                self._tried = True
                self._changed.notify_all()
            # Ranks that lost their daemon together must not come back together.
            self._closing.wait(pause_s * _DICE.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, BACKOFF_S_MAX)
        with self._changed:
            self._tried = True
            self._changed.notify_all()
            self._close_fds()

    def _serve(self, found: Found) -> str:
        """Read and write until the connection ends; return why it did."""
        channel, self.hello = found
        self.is_shared = channel.is_shared
        with self._changed:
            self._broken = ""
            self._channel = channel
            self._tick_at_s = time.monotonic()
            self._changed.notify_all()
        self._call(self._callbacks.up, self.hello)
        poll = select.poll()
        poll.register(self._wake_in, select.POLLIN)
        heard_s = time.monotonic()
        pinged_s: Optional[float] = None
        while not self._closing.is_set():
            # Late before a look that finds nothing: this thread may itself have stood still, with the answer at hand.
            is_late = pinged_s is not None and time.monotonic() - pinged_s > HANG_S
            try:
                heard = self._turn(channel, poll, at_once=is_late)
            except (ChannelLost, FrameError) as error:
                return str(error)
            now_s = time.monotonic()
            if heard:
                heard_s, pinged_s = now_s, None
            elif is_late:
                return f"the daemon has not answered for {HANG_S} s"
            elif pinged_s is None and self._pending and now_s - heard_s > PING_AFTER_S:
                pinged_s = now_s
                self.request_nowait("watch", lambda _reply, fds: close_all(fds), checkpoints=[])
        return "closed"

    def _turn(self, channel: Channel, poll: "select.poll", *, at_once: bool) -> bool:
        """One round: wait, unless at once, write, read, tick. Return whether the daemon said anything."""
        wait_s = 0.0 if at_once else max(0.0, self._tick_at_s - time.monotonic())
        if self._pending:
            wait_s = min(wait_s, PING_AFTER_S / 2)
        poll.register(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.wants_write else 0))
        ready = dict(poll.poll(int(min(wait_s, 60.0) * 1000) + 1))
        if self._wake_in in ready:
            os.read(self._wake_in, 4096)
        with self._changed:
            if self._broken:
                raise ChannelLost(self._broken)
            channel.flush()
        received = channel.receive() if channel.fileno() in ready else []
        for message in received:
            self._dispatch(message)
        now_s = time.monotonic()
        if now_s >= self._tick_at_s:
            self._tick_at_s = now_s + 3600.0  # tick_within() during the call may bring it nearer again
            delay_s = self._call(self._callbacks.tick)
            self.tick_within(delay_s if isinstance(delay_s, float) else TICK_AGAIN_S)
        return bool(received)

    def _dispatch(self, received: Received) -> None:
        message, fds = received
        if "push" in message:
            close_all(fds)
            self._call(self._callbacks.push, message)
            return
        with self._changed:
            on_reply = self._pending.pop(message["id"], None) if type(message.get("id")) is int else None
        if on_reply is None:
            close_all(fds)
        else:
            self._call(on_reply, message, fds)

    def _lose(self, channel: Channel, reason: str) -> None:
        with self._changed:
            self._channel = None
            self._broken = ""
            self.problem = reason
            pending, self._pending = self._pending, {}
            channel.close()
        gone: Message = {"ok": False, "error": {"code": "unreachable", "message": reason, "hint": ""}}
        for on_reply in pending.values():
            self._call(on_reply, gone, [])
        self._call(self._callbacks.down, reason)

    def _call(self, callback: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except Exception:  # noqa: BLE001 - a bug in a callback must not end the session for everyone else
            _log.exception("ckptd: a callback failed")
            return None

    def _wake(self) -> None:
        with self._changed:  # so that the descriptor is not closed, and its number reused, in between
            try:
                if self._wake_out >= 0:
                    os.write(self._wake_out, b"w")
            except BlockingIOError:
                return  # enough wake-ups wait already

    # fork ----------------------------------------------------------------------------------------

    def _leave_parent(self) -> None:
        """In a forked child: close our copies of the parent's descriptors and begin anew.

        close(2) only takes this process's reference; the parent's session goes on. Nothing is sent
        and no lock of the parent's is touched: a thread that held it does not exist here.
        """
        self._close_fds()
        self._reset()

    def _close_fds(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        for fd in (self._wake_in, self._wake_out):
            if fd >= 0:
                os.close(fd)
        self._wake_in = self._wake_out = -1


class _Waiter:
    """One caller that waits for one reply; a reply after its time is thrown away, descriptors and all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._reply: Optional[Message] = None
        self._given_up = False

    def take(self, message: Message, fds: List[int]) -> None:
        with self._lock:
            if self._given_up:
                close_all(fds)
                return
            self._reply = {**message, "fds": fds} if fds else message
            self._event.set()

    def wait(self, op: str, timeout_s: float) -> Message:
        self._event.wait(timeout_s)
        with self._lock:
            if self._reply is None:
                self._given_up = True
                raise TimedOut(f"{op}: no answer within the limit")
        error = self._reply.get("error")
        if isinstance(error, dict) and error.get("code") == "unreachable" and "v" not in self._reply:
            raise Unavailable(f"{op}: {error['message']}")
        return self._reply


class Offline(Connection):
    """A connection that is never made: CKPTD_MODE=offline, everything goes to the spool."""

    def start(self) -> None:
        """Do nothing."""
        self.problem = "CKPTD_MODE=offline"

    def wait_up(self, timeout_s: float) -> bool:  # noqa: ARG002 - the same promise, kept at once
        """Say no."""
        return False

    def close(self) -> None:
        """Give the descriptors back."""
        self._close_fds()
