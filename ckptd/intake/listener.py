"""The socket: accepts peers, cuts their bytes into requests, sends replies and pushes.

An accept loop of our own, since the ready-made ones either die when descriptors run out or drop
the descriptors that ride along. A peer is known by what the kernel says of it (SO_PEERCRED at
connect time, a pidfd for its death), never by what it says of itself. The daemon takes no
descriptor from anyone: plain recv() lets the kernel close whatever was sent.
"""

import contextlib
import errno
import os
import socket
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import anyio
import anyio.abc
import structlog

from ckptd import failpoint
from ckptd.clock import Clock
from ckptd.config import Intake
from ckptd_client import control, wire

log = structlog.get_logger()

_SO_PEERPIDFD = 77  # Linux 6.5; older kernels answer ENOPROTOOPT, and the socket's end has to do
_SO_PASSRIGHTS = 83  # Linux 6.16
_CREDENTIALS = struct.Struct("iII")
_RECV_BYTES = 1 << 16
# What a process lacks for a while: the answer is to wait, never to end.
OUT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
REQUESTS_RUNNING_MAX = 64
# What the daemon holds for all connections of one user together, in multiples of intake.send_bytes_max: else
# 256 connections that read nothing would hold a gigabyte. A connection below FAIR_BYTES is never the one to go.
SHARES_PER_UID = 8
FAIR_BYTES = 64 << 10

Message = dict[str, Any]


class _Passenger(NamedTuple):
    """A descriptor that rides with a frame, and what to do when it never leaves."""

    fd: int
    undelivered: Callable[[], None]


class Held:
    """Bytes that wait in this process for one user's connections: answers not read, frames half arrived."""

    def __init__(self) -> None:
        """Nothing waits."""
        self.size_bytes = 0


class Peer:
    """One connection. Sends never wait: what the socket doesn't take is queued, within a limit."""

    def __init__(self, sock: socket.socket, settings: Intake) -> None:
        """Ask the kernel who this is."""
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, self.gid = _CREDENTIALS.unpack(raw)
        self.ticks = control.seen_ticks(self.pid)  # 0: its end can't be seen from here
        self.sock = sock
        self.pidfd = self._pidfd()
        self.closed = False
        self.greeted = False
        self.follows: dict[str, None] = {}  # checkpoint ids, oldest first
        self.experiments: set[str] = set()
        self.ended: set[str] = set()  # of these, those it has closed
        self.fresh: dict[str, int] = {}  # segments it opened and neither logged nor saved into, by experiment
        self.attached: dict[str, Any] = {}  # what it reads by requests of this connection, by their names (reading.py)
        self.group: anyio.abc.TaskGroup | None = None  # tasks of requests that may wait; ends with the connection
        self.running = 0
        self._out: deque[tuple[bytes, _Passenger | None]] = deque()
        self._out_bytes = 0
        self._out_bytes_max = settings.send_bytes_max
        self._unfinished_bytes = 0
        self.held = Held()  # the listener gives all connections of one user the same
        self._more = anyio.Event()

    def _pidfd(self) -> int | None:
        try:
            return self.sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:
            return None

    def push(self, message: Message) -> None:
        """Send a message nobody asked for; one that is too large for a frame is left out, and logged."""
        try:
            self.send({"v": wire.VERSION, **message})
        except wire.FrameError as error:
            log.warning("push.too_large", push=message.get("push"), why=str(error))

    def send(self, message: Message, fd: int | None = None, undelivered: Callable[[], None] = lambda: None) -> None:
        """Queue one frame, with at most one descriptor (duplicated here). Never waits.

        A peer that lets more than intake.send_bytes_max pile up, or its user more than SHARES_PER_UID times
        that, is cut off: it reconnects and asks.
        `undelivered` is called when the descriptor never left: the connection ended first.

        FrameError  the message is over FRAME_BYTES_MAX; nothing is sent
        OSError     no descriptor is left to duplicate `fd`; nothing is sent
        """
        frame = wire.encode(message)
        if self.closed:
            undelivered()
            return
        self._out.append((frame, None if fd is None else _Passenger(os.dup(fd), undelivered)))
        self._out_bytes += len(frame)
        self.held.size_bytes += len(frame)
        if self._out_bytes > self._out_bytes_max or self.is_over_share():
            self.cut()
        elif len(self._out) == 1:
            self._flush()
        if self._out:
            self._more.set()

    def hold(self, unfinished_bytes: int) -> None:
        """Count what has arrived of a frame that is not whole yet."""
        self.held.size_bytes += unfinished_bytes - self._unfinished_bytes
        self._unfinished_bytes = unfinished_bytes

    def is_over_share(self) -> bool:
        """Whether its user's connections hold too much together, and this one more than little of it."""
        own_bytes = self._out_bytes + self._unfinished_bytes
        return own_bytes > FAIR_BYTES and self.held.size_bytes > SHARES_PER_UID * self._out_bytes_max

    def _flush(self) -> None:
        while self._out:
            frame, passenger = self._out[0]
            try:
                if passenger is None:
                    sent = self.sock.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                else:
                    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                    sent = socket.send_fds(self.sock, [frame], [passenger.fd], flags)
            except BlockingIOError:
                return
            except OSError:
                self.cut()
                return
            if passenger is not None:
                os.close(passenger.fd)
            self._out_bytes -= sent
            self.held.size_bytes -= sent
            if sent < len(frame):
                self._out[0] = (frame[sent:], None)
            else:
                self._out.popleft()

    async def drain_queue(self) -> None:
        """Send what the socket did not take at once; runs as long as the connection."""
        while True:
            await self._more.wait()
            self._more = anyio.Event()
            while self._out and not self.closed:
                await anyio.wait_writable(self.sock)
                self._flush()

    def cut(self) -> None:
        """End the connection; its reader notices and cleans up."""
        if not self.closed:
            self.closed = True
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                log.debug("peer.already_gone", pid=self.pid, errno=error.errno)  # nothing is left to shut down

    def close(self) -> None:
        """Give its descriptors back."""
        self.closed = True
        for _, passenger in self._out:
            if passenger is not None:
                os.close(passenger.fd)
                passenger.undelivered()
        self._out.clear()
        self.held.size_bytes -= self._out_bytes
        self._out_bytes = 0
        self.hold(0)
        if self.pidfd is not None:
            os.close(self.pidfd)
        self.sock.close()


Handle = Callable[[Peer, bytes], Awaitable[None]]
Gone = Callable[[Peer], Awaitable[None]]


class Listener:
    """Serves every peer that connects until cancelled."""

    def __init__(self, settings: Intake, clock: Clock, handle: Handle, gone: Gone) -> None:
        """`handle` gets each frame of a peer, in order; `gone` runs once when a peer has left."""
        self._settings = settings
        self._clock = clock
        self._handle = handle
        self._gone = gone
        self.peers: set[Peer] = set()
        # One for all: what recv() makes anew for each message splits the heap, which then grows for hours.
        self._received = memoryview(bytearray(_RECV_BYTES))
        self._per_uid: Counter[int] = Counter()
        self._held: dict[int, Held] = {}

    async def run(self, listening: socket.socket, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Accept until cancelled. Running out of descriptors pauses accepting, it never ends it."""
        listening.setblocking(False)
        listening.listen(self._settings.backlog)
        _refuse_descriptors(listening)
        pause_s = 0.05
        async with anyio.create_task_group() as group:
            task_status.started()
            while True:
                await anyio.wait_readable(listening)
                try:
                    sock, _ = listening.accept()
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno not in OUT_OF:
                        if error.errno in {errno.ECONNABORTED, errno.EINTR}:
                            continue
                        raise
                    log.warning("accept.paused", errno=error.errno, pause_s=pause_s)
                    await anyio.sleep(pause_s)
                    pause_s = min(pause_s * 2, 1.0)
                    continue
                pause_s = 0.05
                self._admit(sock, group)

    def _admit(self, sock: socket.socket, group: anyio.abc.TaskGroup) -> None:
        sock.setblocking(False)
        try:
            peer = Peer(sock, self._settings)
        except OSError as error:
            log.info("peer.vanished", errno=error.errno)
            sock.close()
            return
        over = (
            len(self.peers) >= self._settings.connections_max
            or self._per_uid[peer.uid] >= self._settings.connections_per_uid_max
        )
        if over:
            log.warning("peer.refused", cause="connections", uid=peer.uid)
            peer.send(
                _error_frame("busy", "too many connections", "close unused ones, or raise intake.connections_max")
            )
            peer.close()
            return
        self.peers.add(peer)
        self._per_uid[peer.uid] += 1
        peer.held = self._held.setdefault(peer.uid, Held())
        group.start_soon(self._serve, peer)

    async def _serve(self, peer: Peer) -> None:
        try:
            async with anyio.create_task_group() as group:
                peer.group = group
                group.start_soon(peer.drain_queue)
                if peer.pidfd is not None:
                    group.start_soon(_cut_when_dead, peer, peer.pidfd)
                await self._read(peer)
                group.cancel_scope.cancel()
        except Exception:
            # A defect that one peer's bytes find must cost that peer its connection, and nobody else theirs.
            log.exception("peer.bug", pid=peer.pid, uid=peer.uid)
        finally:
            self.peers.discard(peer)
            self._per_uid[peer.uid] -= 1
            peer.close()
            if not self._per_uid[peer.uid]:
                del self._per_uid[peer.uid], self._held[peer.uid]
            with anyio.CancelScope(shield=True):
                await self._gone(peer)

    async def _read(self, peer: Peer) -> None:
        """Hand frames on until the peer leaves, breaks the rules, or takes too long over one frame."""
        splitter = wire.Splitter()
        begun_s: float | None = None  # when the unfinished frame's first bytes were seen
        while not peer.closed:
            try:
                data = await self._receive(peer, begun_s)
                frames = splitter.feed(data)
            except TimeoutError:
                peer.send(_error_frame("timeout", "a frame took too long to arrive", "send whole frames"))
                return
            except wire.FrameError as error:
                peer.send(_error_frame(error.code, str(error), f"a frame holds at most {wire.FRAME_BYTES_MAX} bytes"))
                return
            peer.hold(splitter.waiting_bytes)
            if peer.is_over_share():
                peer.send(_error_frame("busy", "this user's connections hold too many bytes", "read the answers"))
                return
            if not data:
                return
            for frame in frames:
                failpoint.hit("recv.header")
                await self._handle(peer, frame)
            if data.endswith(b"\n"):
                begun_s = None
            elif begun_s is None or b"\n" in data:
                begun_s = self._clock.monotonic_s()

    async def _receive(self, peer: Peer, begun_s: float | None) -> bytes:
        """Return what the socket has next, b"" at its end. TimeoutError when the frame begun then is not whole by now."""
        limit_s = None
        if begun_s is not None:
            limit_s = max(0.0, begun_s + self._settings.idle_frame_s - self._clock.monotonic_s())
        with anyio.fail_after(limit_s):
            while True:
                await anyio.wait_readable(peer.sock)
                try:
                    return bytes(self._received[: peer.sock.recv_into(self._received)])
                except BlockingIOError:
                    continue
                except OSError:
                    return b""


async def _cut_when_dead(peer: Peer, pidfd: int) -> None:
    """A child may have inherited the socket and keep it open: the trainer that it belonged to is dead all the same."""
    await anyio.wait_readable(pidfd)
    peer.cut()


def _refuse_descriptors(listening: socket.socket) -> None:
    """Have the kernel refuse descriptors at the sender, where it can: closing a foreign one may hang.

    Accepted sockets inherit it. Older kernels close what is sent when it is received without asking for it.
    """
    with contextlib.suppress(OSError):
        listening.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def _error_frame(code: str, message: str, hint: str) -> Message:
    return {
        "v": wire.VERSION,
        "id": None,
        "ok": False,
        "error": {"code": code, "message": message, "hint": hint},
    }
