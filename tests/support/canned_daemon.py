"""A daemon that says what a test told it to say, over a real Unix socket.

    with CannedDaemon(short_dir / "d.sock", {"list": {"checkpoints": [], "next": None}}) as daemon:
        ... run `ckpt --socket daemon.path ls` ...
    daemon.requests  # what arrived, hello left out

A reply is a dict, an Exception of ckptd.errors (an error reply), SILENCE, HANG_UP, a list of those
(one for each request in turn, the last one for ever), or a function of the request that returns one.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from ckptd.errors import BadRequest, CkptdError
from ckptd_client import wire

SILENCE = object()
HANG_UP = object()

Reply = Any
HELLO = {
    "server": "ckptd/0.1.0",
    "version": 1,
    "uid": 0,
    "mode": "user",
    "state_dir": "/nowhere",
    "spool_dir": "/nowhere/spool",
    "limits": {"arena_bytes_max": 1 << 30, "frame_bytes_max": wire.FRAME_BYTES_MAX},
}


class CannedDaemon:
    """Serves connections in threads until its block ends. `pushes` follow the first reply of an operation."""

    def __init__(
        self, path: Path, replies: Mapping[str, Reply], *, pushes: Mapping[str, list[dict[str, Any]]] | None = None
    ) -> None:
        self.path = str(path)
        self.replies: dict[str, Reply] = {"hello": HELLO, **replies}
        self.pushes = dict(pushes or {})
        self.requests: list[dict[str, Any]] = []
        self.closes_after_stop = True
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> Self:
        self._listener.bind(self.path)
        Path(self.path).chmod(0o600)
        self._listener.listen(16)
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it: every connection closes, and nobody answers at the path any more."""
        for sock in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(5)
        Path(self.path).unlink(missing_ok=True)

    def asked(self, op: str) -> list[dict[str, Any]]:
        """Return the requests of one operation, without envelope."""
        return [
            {k: v for k, v in request.items() if k not in {"v", "id", "op"}}
            for request in self.requests
            if request["op"] == op
        ]

    def hang_up(self) -> None:
        """End every connection, as a daemon that restarts does; new ones are served."""
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _start(self, run: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(sock)
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        splitter = wire.Splitter()
        with contextlib.suppress(OSError), sock:
            while data := sock.recv(65536):
                for frame in splitter.feed(data):
                    if not self._answer(sock, wire.decode(frame)):
                        sock.shutdown(socket.SHUT_RDWR)
                        return

    def _answer(self, sock: socket.socket, request: dict[str, Any]) -> bool:
        if request["op"] != "hello":
            self.requests.append(request)
        reply = self._reply(request)
        if reply is SILENCE:
            return True
        if reply is HANG_UP:
            return False
        head = {"v": 1, "id": request["id"]}
        if isinstance(reply, CkptdError):
            sock.sendall(wire.encode({**head, "ok": False, "error": reply.to_wire()}))
            return True
        sock.sendall(wire.encode({**head, "ok": True, **reply}))
        for push in self.pushes.pop(request["op"], ()):
            sock.sendall(wire.encode({"v": 1, **push}))
        return request["op"] != "stop" or not self.closes_after_stop

    def _reply(self, request: dict[str, Any]) -> Reply:
        reply = self.replies.get(request["op"], BadRequest(f"no canned reply for {request['op']}"))
        if isinstance(reply, list):
            reply = reply.pop(0) if len(reply) > 1 else reply[0]
        return reply(request) if callable(reply) else reply
