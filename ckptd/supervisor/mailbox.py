"""The socket on which the daemon speaks to its supervisor: datagrams of KEY=value lines, fds beside them.

It lies in the state directory (0700); where that path is too long for a socket it is an abstract
one. Either way the kernel's word on the sender's pid decides who is heard.
"""

import array
import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptd_client.places import SOCKET_PATH_BYTES_MAX

DATAGRAM_BYTES_MAX = 4096
FDS_MAX = 253  # the kernel's own limit for one message
# Then the supervisor looks at its deadlines again. More than the kernel queues for one socket (net.unix.max_dgram_qlen,
# 512 under systemd), so that a dead daemon's last words are heard in one go.
MESSAGES_AT_ONCE = 1024
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Message:
    """One datagram of the process `pid`. Whoever takes it owns `fds`."""

    pid: int
    fields: dict[str, str]
    fds: list[int]

    def close(self) -> None:
        """Close every descriptor that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


class Mailbox:
    """The supervisor's end. `address` is what NOTIFY_SOCKET says."""

    def __init__(self, state_dir: Path) -> None:
        """Bind; a socket left over by a dead supervisor goes (the caller holds the state directory's lock)."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        path = state_dir / "notify"
        self._path = path if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX else None
        if self._path is None:
            self._socket.bind("")  # the kernel finds a free abstract name
            self.address = "@" + self._socket.getsockname()[1:].decode()
            return
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        before = os.umask(0o177)
        try:
            self._socket.bind(str(path))
        finally:
            os.umask(before)
        self.address = str(path)

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._socket.fileno()

    def messages(self) -> Iterator[Message]:
        """Yield what has arrived, at most MESSAGES_AT_ONCE; each message's fds are closed after its turn."""
        ancillary_bytes = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * FDS_MAX)
        for _ in range(MESSAGES_AT_ONCE):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    DATAGRAM_BYTES_MAX, ancillary_bytes, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            message = _message(data, ancillary)
            try:
                # Cut short: what was meant can't be known, so nothing of it is done.
                if not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                    yield message
            finally:
                message.close()

    def close(self) -> None:
        """Close and remove the socket."""
        self._socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _message(data: bytes, ancillary: list[tuple[int, int, bytes]]) -> Message:
    pid = 0
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        elif kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack(content)[0]
    lines = data.decode(errors="replace").splitlines()
    return Message(pid, dict(line.partition("=")[::2] for line in lines), fds.tolist())
