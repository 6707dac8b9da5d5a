"""One connected socket to a daemon: whose it is, frames out, frames and descriptors in. No threads, never blocks.

What the daemon sends is not trusted further than it must be: its uid is checked before a byte is
read, a line is bounded, descriptors are counted, and any breach closes the connection.
"""

import array
import os
import socket
import struct
from collections import deque
from typing import Deque, List, NamedTuple, Tuple

from ckptd_client.places import SocketPlace
from ckptd_client.wire import FrameError, Message, Splitter, decode

RECEIVE_BYTES = 256 << 10
OUTBOX_BYTES_MAX = 4 << 20  # frames the daemon has not read yet; more and the sender is told to do without it
FDS_MAX = 16  # descriptors that may arrive before the frame that names them
CONNECT_S = 1.0

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class ChannelLost(OSError):
    """The connection is gone or can't be trusted any more; the message says why."""


class Received(NamedTuple):
    """One message and the descriptors that came with it, which the taker must close."""

    message: Message
    fds: List[int]


def peer_uid(sock: socket.socket) -> int:
    """Return the uid of the process that made the socket listen, as the kernel knows it."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


def dial(place: SocketPlace) -> "Channel":
    """Connect to `place` and check who serves it.

    ChannelLost  nobody listens, the queue of connections is full, another uid serves it, or no descriptor is left
    """
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:  # the training process is out of descriptors: it may have some again later
        raise ChannelLost(f"no socket to connect with: {error.strerror}") from error
    try:
        # With a timeout a full backlog answers EAGAIN at once, where a blocking connect would hang.
        sock.settimeout(CONNECT_S)
        sock.connect(place.path)
        uid = peer_uid(sock)
        if uid not in place.servers:
            message = f"{place.path} is served by uid {uid}; only {', '.join(map(str, place.servers))} would be trusted"
            raise ChannelLost(message)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if isinstance(error, ChannelLost):
            raise
        reason = error.strerror or str(error)
        raise ChannelLost(f"{place.path}: {reason}") from error
    return Channel(sock, is_shared=uid != os.getuid() or not place.own)


class Channel:
    """A connected, checked socket. One thread receives; `queue` and `flush` are called under one lock."""

    def __init__(self, sock: socket.socket, *, is_shared: bool) -> None:
        """Take over a connected non-blocking socket. `is_shared`: who listens there serves others than this user."""
        self.is_shared = is_shared
        self._sock = sock
        self._splitter = Splitter()
        self._fds: Deque[int] = deque()
        self._outbox: Deque[memoryview] = deque()
        self._outbox_bytes = 0

    def fileno(self) -> int:
        """Return the descriptor, for poll."""
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether frames wait for the socket to take them."""
        return bool(self._outbox)

    def queue(self, frame: bytes) -> bool:
        """Take one frame to send; False when too much waits already (the daemon does not read)."""
        if self._outbox_bytes + len(frame) > OUTBOX_BYTES_MAX:
            return False
        self._outbox.append(memoryview(frame))
        self._outbox_bytes += len(frame)
        return True

    def flush(self) -> None:
        """Send what the socket takes now. ChannelLost when the peer is gone; never SIGPIPE."""
        while self._outbox:
            head = self._outbox[0]
            try:
                sent = self._sock.send(head, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise ChannelLost(f"send: {error.strerror}") from error
            self._outbox_bytes -= sent
            if sent < len(head):
                self._outbox[0] = head[sent:]
                return
            self._outbox.popleft()

    def receive(self) -> List[Received]:
        """Return the messages that have arrived; [] when none is whole yet.

        ChannelLost  end of stream, or descriptors were cut off
        FrameError   the peer broke the framing rules
        """
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                RECEIVE_BYTES, socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise ChannelLost(f"receive: {error.strerror}") from error
        self._keep_fds(ancillary)
        if flags & socket.MSG_CTRUNC:
            raise ChannelLost("descriptors were cut off: too many of them, or no descriptor left in this process")
        if not data:
            raise ChannelLost("the daemon closed the connection")
        received: List[Received] = []
        try:
            for frame in self._splitter.feed(data):
                received.append(self._pair(decode(frame)))  # noqa: PERF401 - what came before a bad frame owns descriptors
        except FrameError:
            for _, fds in received:
                self._fds.extend(fds)  # close() takes care of them
            raise
        return received

    def close(self) -> None:
        """Close the socket and every descriptor nobody took."""
        while self._fds:
            os.close(self._fds.popleft())
        self._outbox.clear()
        self._sock.close()

    def _keep_fds(self, ancillary: List[Tuple[int, int, bytes]]) -> None:
        for level, kind, body in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(body[: len(body) - len(body) % found.itemsize])
                self._fds.extend(found)
        if len(self._fds) > FDS_MAX:
            raise FrameError("bad_request", f"{len(self._fds)} descriptors that no frame names")

    def _pair(self, message: Message) -> Received:
        count = message.get("fds", 0)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= len(self._fds):
            raise FrameError("bad_request", f"a frame names {count!r} descriptors, {len(self._fds)} came")
        return Received(message, [self._fds.popleft() for _ in range(count)])
