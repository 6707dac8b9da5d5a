"""One I/O worker process and the socket to it, as the daemon sees them.

A reader and a writer task move frames; requests wait in a table by number. Descriptors ride with
the first byte of the frame that names them. Nothing here decides: handle.py does.
"""

import contextlib
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import TaskStatus

from ckptd.errors import Busy, CkptdError, WorkerLost, from_wire
from ckptd.worker import protocol, starter
from ckptd_client.wire import FrameError, Splitter

OUTBOX_MAX = 64  # requests that wait for the socket; more wait in their callers
PARTS_BYTES_MAX = 64 << 20  # parts of one request that nobody read yet
READ_BYTES = 256 << 10
INLINE_BYTES_MAX = 512 << 10  # a larger frame is parsed in a thread: 1 MiB of JSON takes some 5 ms
EOF_GRACE_S = 2.0
TERM_GRACE_S = 2.0
KILL_GRACE_S = 2.0
LOOK_S = 0.05

# What a child must not inherit: it neither speaks to the service manager nor lets users' shells
# change how it watches.
_FOREIGN = ("WATCHFILES_", "LISTEN_", "NOTIFY_SOCKET", "WATCHDOG_", "FDSTORE", "PYTHONMALLOC")


class _Frame(msgspec.Struct):
    id: int
    ok: bool | None = None
    result: msgspec.Raw = msgspec.Raw()
    part: msgspec.Raw = msgspec.Raw()
    error: dict[str, Any] | None = None
    alive: bool = False
    root: protocol.RootMark | None = None


class _Letter(NamedTuple):
    frame: bytes
    fd: int | None
    counted: bool  # takes one of OUTBOX_MAX places


_decode = msgspec.json.Decoder(_Frame).decode


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker: the daemon's, less what is meant for the daemon alone."""
    return {key: value for key, value in environ.items() if not key.startswith(_FOREIGN)}


@dataclass(eq=False)
class Pending:
    """A request on its way. `heard_s` is when the worker last spoke of it, `changed` is set then.

    root  what the worker saw of its root's mark, once it has ended
    """

    number: int
    heard_s: float
    outcome: msgspec.Raw | CkptdError | None = None
    root: protocol.RootMark | None = None
    parts: deque[msgspec.Raw] = field(default_factory=deque)
    parts_bytes: int = 0
    changed: anyio.Event = field(default_factory=anyio.Event)

    def settle(self, outcome: msgspec.Raw | CkptdError) -> None:
        """End the request; the first outcome stays."""
        if self.outcome is None:
            self.outcome = outcome
        self.changed.set()

    def add_part(self, part: msgspec.Raw) -> None:
        """Queue a part; a reader that lags PARTS_BYTES_MAX behind loses the request, not the daemon's memory."""
        self.parts_bytes += len(part)
        if self.parts_bytes > PARTS_BYTES_MAX:
            self.parts.clear()
            self.settle(Busy(f"over {PARTS_BYTES_MAX} bytes of a worker's answer were left unread"))
            return
        self.parts.append(part)
        self.changed.set()

    def take_part(self) -> msgspec.Raw:
        """Return the oldest part."""
        part = self.parts.popleft()
        self.parts_bytes -= len(part)
        return part


class Child:
    """A running worker. `dead` is set once its socket ended; every pending request then has WorkerLost."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        """Own both from now on."""
        self.pid = process.pid
        self.dead = anyio.Event()
        self.started_s = anyio.current_time()
        self.answered = False  # at least one reply came: this worker can do its work
        self._process = process
        self._socket = sock
        self._pending: dict[int, Pending] = {}
        self._number = 0
        self._outbox: deque[_Letter] = deque()
        self._room = anyio.Semaphore(OUTBOX_MAX)
        self._more = anyio.Event()

    @property
    def busy(self) -> int:
        """How many requests are on their way."""
        return len(self._pending)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Move frames until the worker's end of the socket closes. Does not end the process."""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._write)
                task_status.started()
                await self._read()
                group.cancel_scope.cancel()
        finally:
            self.end()

    async def ask(self, request: protocol.Request, arena_fd: int | None) -> Pending:
        """Queue a request and return its entry. The arena's fd is copied before this returns.

        Waits while OUTBOX_MAX requests wait for the socket. WorkerLost when the worker is gone, Busy without
        a descriptor for the copy.
        """
        body = msgspec.to_builtins(request)
        self._number += 1
        number = self._number
        try:
            copy = None if arena_fd is None else os.dup(arena_fd)
        except OSError as error:
            message = f"no descriptor is left to lend an arena to a worker: {error.strerror}"
            raise Busy(message, retry_after_s=1.0) from error
        try:
            fds = {} if copy is None else {"fds": 1}
            frame = msgspec.json.encode({"id": number, **body, **fds}) + b"\n"
            await self._enter()
        except BaseException:
            if copy is not None:
                os.close(copy)
            raise
        pending = self._pending[number] = Pending(number, anyio.current_time())
        self._post(_Letter(frame, copy, counted=True))
        return pending

    def forget(self, pending: Pending) -> None:
        """Tell the worker that nobody waits for this request any more, unless it has ended."""
        if self._pending.pop(pending.number, None) is not None and not self.dead.is_set():
            # Cancels take no place: there is at most one for each request, and nobody could wait here.
            frame = msgspec.json.encode({"id": pending.number, "verb": "cancel"}) + b"\n"
            self._post(_Letter(frame, None, counted=False))

    def abandon(self) -> None:
        """SIGKILL, and no longer listen: `run()` returns although the process may be unable to die.

        A process in an uninterruptible call dies when that call returns, before it runs any code
        of ours: an abandoned worker never finishes what it was asked.
        """
        self._process.kill()
        self.hang_up()

    def hang_up(self) -> None:
        """End the conversation; a healthy worker exits at once."""
        with contextlib.suppress(OSError):  # already disconnected is what we want
            self._socket.shutdown(socket.SHUT_RDWR)

    async def close(self) -> bool:
        """End the process: end of its socket, SIGTERM, SIGKILL, each with a bound. False: it can't die now."""
        self.hang_up()
        if await self.gone(EOF_GRACE_S):
            return True
        self._process.terminate()
        if await self.gone(TERM_GRACE_S):
            return True
        self._process.kill()
        return await self.gone(KILL_GRACE_S)

    async def gone(self, timeout_s: float | None) -> bool:
        """Wait until the process is dead and reaped; False when `timeout_s` passed first."""
        if self._process.poll() is not None:
            return True
        try:
            watched = os.pidfd_open(self.pid)  # not reaped yet, so the number is still this process
        except OSError:  # no descriptor is left: look at it now and then
            with anyio.move_on_after(timeout_s):
                while self._process.poll() is None:  # noqa: ASYNC110 - there is no event to wait for
                    await anyio.sleep(LOOK_S)
            return self._process.returncode is not None
        try:
            with anyio.move_on_after(timeout_s):
                while self._process.poll() is None:
                    await anyio.wait_readable(watched)
        finally:
            os.close(watched)
        return self._process.returncode is not None

    def obituary(self) -> str:
        """Say how the process ended, as far as it is known."""
        code = self._process.poll()
        if code is None:
            return "its socket ended"
        return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def rss_bytes(self) -> int | None:
        """Resident memory, None when the kernel does not say."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]
        except (OSError, IndexError):
            return None
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    async def _enter(self) -> None:
        """Take one of OUTBOX_MAX places. WorkerLost when the worker is gone."""
        await self._room.acquire()
        if self.dead.is_set():
            self._room.release()  # the next one who waits for room must learn it too
            raise self._lost()

    def _post(self, letter: _Letter) -> None:
        self._outbox.append(letter)
        self._more.set()

    async def _write(self) -> None:
        """Send the outbox in order.

        Only the whole child is ever cancelled here, so a frame is never half sent to a worker that
        goes on reading.
        """
        while True:
            while self._outbox:
                letter = self._outbox[0]
                if not await self._send(memoryview(letter.frame), letter.fd):
                    # The reader sees the same end; after an error that ended nothing (no memory, too many
                    # descriptors on their way) half a frame may be sent, so it is made one.
                    self.hang_up()
                    return
                self._outbox.popleft()
                if letter.fd is not None:
                    os.close(letter.fd)
                if letter.counted:
                    self._room.release()
            self._more = anyio.Event()
            await self._more.wait()

    async def _send(self, frame: memoryview, fd: int | None) -> bool:
        while frame:
            try:
                if fd is None:
                    sent = self._socket.send(frame, socket.MSG_NOSIGNAL)
                else:
                    sent = socket.send_fds(self._socket, [frame], [fd], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
            except OSError:
                return False
            else:
                frame, fd = frame[sent:], None
        return True

    async def _read(self) -> None:
        splitter = Splitter(protocol.FRAME_BYTES_MAX)
        while True:
            await anyio.wait_readable(self._socket)
            try:
                data = self._socket.recv(READ_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            try:
                for frame in splitter.feed(data):
                    inline = len(frame) <= INLINE_BYTES_MAX
                    self._take(_decode(frame) if inline else await anyio.to_thread.run_sync(_decode, frame))
            except (FrameError, msgspec.DecodeError):
                self._process.kill()  # our own worker never does this: something wrote over its memory
                return

    def _take(self, frame: _Frame) -> None:
        pending = self._pending.get(frame.id)
        if pending is None:
            return  # forgotten: the cancel and the answer crossed
        pending.heard_s = anyio.current_time()
        if frame.ok is not None:
            self.answered = True
            del self._pending[frame.id]
            pending.root = frame.root
            pending.settle(frame.result if frame.ok else from_wire(frame.error or {}))
        elif frame.part:
            pending.add_part(frame.part)
        pending.changed.set()

    def _lost(self) -> WorkerLost:
        return WorkerLost(f"the I/O worker {self.pid} is gone: {self.obituary()}")

    def end(self) -> None:
        """Close our end and tell everybody who waits."""
        self.dead.set()
        self._socket.close()
        while self._outbox:
            fd = self._outbox.popleft().fd
            if fd is not None:
                os.close(fd)
        for pending in self._pending.values():
            pending.settle(self._lost())
        self._pending.clear()
        self._room.release()  # who waits for room finds `dead` instead, and wakes the next one


async def spawn(command: Sequence[str]) -> Child:
    """Start a worker: `command` plus "--fd N", the socket as that descriptor, stdin empty, stderr ours.

    OSError when the machine has no process, memory or descriptor left for it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            ours.setblocking(False)
            # In a thread: fork and exec of a big daemon take milliseconds. Shielded, so that a process once started
            # always gets an owner.
            whole = [*command, "--fd", str(theirs.fileno())]
            with anyio.CancelScope(shield=True):
                process = await anyio.to_thread.run_sync(starter.start, partial(_start, whole, theirs))
    except BaseException:
        ours.close()
        raise
    return Child(process, ours)


def _start(command: list[str], theirs: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,  # whatever a library prints belongs with the log
        pass_fds=(theirs.fileno(),),
        env=clean_environment(os.environ),
        cwd="/",  # a worker's directory must not keep a mount busy
    )
