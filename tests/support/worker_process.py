"""The real I/O worker, started as the daemon starts it and spoken to by blocking calls."""

import os
import signal
import socket
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

import msgspec

from ckptd.worker import protocol, verbs
from ckptd_client.wire import Splitter

ANSWER_S = 60.0


class Died(Exception):
    """The worker's socket ended; `status` is its exit status (negative: the signal)."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class WorkerProcess:
    """with WorkerProcess(fail="copy.chunk=kill") as worker: worker.ask(request, fd)"""

    def __init__(self, *options: str, fail: str = "", threads: int = 4) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(ANSWER_S)
        environment = {**os.environ, "CKPTD_FAIL": fail}
        command = [sys.executable, "-P", "-m", "ckptd.worker", "--fd", str(theirs.fileno()), "--threads", str(threads)]
        self.process = subprocess.Popen(
            [*command, *options], pass_fds=(theirs.fileno(),), env=environment, stderr=subprocess.DEVNULL
        )
        theirs.close()
        self._splitter = Splitter(protocol.FRAME_BYTES_MAX)
        self._frames: list[dict[str, Any]] = []
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()
        if self.process.poll() is None:
            self.process.wait(timeout=60)

    def send(self, request: protocol.Request, fd: int | None = None) -> int:
        """Send one request and return its number."""
        self._number += 1
        body = {"id": self._number, **msgspec.to_builtins(request), **({} if fd is None else {"fds": 1})}
        self.send_raw(msgspec.json.encode(body) + b"\n", fd)
        return self._number

    def send_raw(self, frame: bytes, fd: int | None = None) -> None:
        if fd is None:
            self.socket.sendall(frame)
        else:
            sent = socket.send_fds(self.socket, [frame], [fd])
            self.socket.sendall(frame[sent:])

    def cancel(self, number: int) -> None:
        self.send_raw(msgspec.json.encode({"id": number, "verb": "cancel"}) + b"\n")

    def frame(self) -> dict[str, Any]:
        """Return the next frame. Died when the worker's socket ended."""
        while not self._frames:
            try:
                data = self.socket.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                raise Died(self.process.wait(timeout=60))
            self._frames += [msgspec.json.decode(frame) for frame in self._splitter.feed(data)]
        return self._frames.pop(0)

    def reply(self, number: int) -> dict[str, Any]:
        """Return the reply to one request; parts and signs of life before it are skipped."""
        while True:
            frame = self.frame()
            if frame["id"] == number and "ok" in frame:
                return frame

    def ask(self, request: protocol.Request, fd: int | None = None) -> Any:
        """Return the typed reply, or the error object of one that failed."""
        frame = self.reply(self.send(request, fd))
        return msgspec.convert(frame["result"], verbs.REPLY_OF[type(request)]) if frame["ok"] else frame["error"]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
