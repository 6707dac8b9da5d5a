"""One child host and the socket to it, as the daemon sees them: one question at a time."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import anyio
import anyio.to_thread

from ckptd.errors import Busy, TimedOut, WorkerLost
from ckptd.hooks import tree

FRAME_BYTES_MAX = 8 << 20
READ_BYTES = 256 << 10
EXIT_S_MAX = 2.0  # a host that was hung up on ends what is below it, then itself
_COMMAND = (sys.executable, "-P", "-m", "ckptd.hooks.host")  # -P: the working directory is no place for modules

# What a hook keeps of the daemon's environment; everything else is not its business.
_KEPT = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR",
    "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "CKPTD_SOCKET",
})  # fmt: skip


def clean_environment(environ: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a hook: a short list of the daemon's, and what its configuration sets."""
    kept = {key: value for key, value in environ.items() if key in _KEPT or key.startswith("LC_")}
    return {"PATH": os.defpath, **kept, **more}


class Child:
    """A running host. Use from one task at a time."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        """Own both from now on."""
        self.pid = process.pid
        self._process = process
        self._socket = sock
        self._received = bytearray()

    @property
    def is_alive(self) -> bool:
        """Whether it may still answer."""
        return self._socket.fileno() >= 0 and self._process.poll() is None

    async def send(self, request: Mapping[str, Any]) -> None:
        """Send one frame. WorkerLost when nobody is there to read it."""
        frame = memoryview(json.dumps(request, default=str).encode() + b"\n")
        while frame:
            try:
                frame = frame[self._socket.send(frame, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
            except OSError as error:
                raise self._lost() from error

    async def ask(self, request: Mapping[str, Any], silence_s: float) -> dict[str, Any]:
        """Return the answer. TimedOut after `silence_s`, WorkerLost when it ended; then, and when cancelled, end it."""
        try:
            with anyio.fail_after(silence_s):
                await self.send(request)
                return await self._answer()
        except TimeoutError as error:
            raise TimedOut(f"the hook's host {self.pid} did not answer within {silence_s:g} s") from error

    async def _answer(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            await self._more()
        line, _, rest = self._received.partition(b"\n")
        self._received = rest
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    async def _more(self) -> None:
        """Read what comes next. WorkerLost at the end."""
        try:
            await anyio.wait_readable(self._socket)
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except (OSError, anyio.ClosedResourceError) as error:
            raise self._lost() from error
        self._received += data
        if not data or len(self._received) > FRAME_BYTES_MAX:
            raise self._lost()

    def _lost(self) -> WorkerLost:
        code = self._process.poll()
        return WorkerLost(f"the hook's host {self.pid} is gone" + ("" if code is None else f": exit status {code}"))

    async def close(self, grace_s: float = EXIT_S_MAX) -> None:
        """End it and everything below: it is asked to for `grace_s`, then it is done from here. Shield this."""
        if self._socket.fileno() >= 0:
            anyio.notify_closing(self._socket)  # whoever still waits for an answer learns it
            self._socket.close()
        with anyio.move_on_after(grace_s):
            while self._process.poll() is None:  # noqa: ASYNC110 - its end is no event of ours
                await anyio.sleep(0.01)
        if self._process.poll() is None:
            await anyio.to_thread.run_sync(tree.end_from_outside, self.pid)
            with anyio.move_on_after(EXIT_S_MAX):  # one that can't die now is reaped when somebody looks again
                while self._process.poll() is None:  # noqa: ASYNC110 - as above
                    await anyio.sleep(0.01)


async def start(name: str, setup: Mapping[str, Any], environment: Mapping[str, str]) -> Child:
    """Start a host in a session of its own. Busy when the machine has no process, memory or descriptor left."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise Busy(f"no host for the hook {name!r}: {error.strerror}", retry_after_s=1.0) from error
    try:
        with theirs, anyio.CancelScope(shield=True):  # a process once started always gets an owner
            ours.setblocking(False)
            command = [*_COMMAND, "--fd", str(theirs.fileno())]
            process = await anyio.to_thread.run_sync(_start, command, theirs, dict(environment))
        child = Child(process, ours)
    except OSError as error:
        ours.close()
        raise Busy(f"no host for the hook {name!r}: {error.strerror}", retry_after_s=1.0) from error
    with contextlib.suppress(WorkerLost):  # whoever asks it next is told
        await child.send(setup)
    return child


def _start(command: list[str], theirs: socket.socket, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,  # the host itself prints nothing; a crash of its interpreter belongs with the log
        pass_fds=(theirs.fileno(),),
        env=environment,
        cwd="/",
        start_new_session=True,
    )
