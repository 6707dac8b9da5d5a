"""The I/O worker process: `python -m ckptd.worker --fd 3 ...`. Plain blocking code in threads.

One thread reads requests from the socket pair and hands each to a lane; verbs answer from their own
threads. Nothing here touches a file system, so a hung one never keeps this loop from its socket.
"""

import argparse
import importlib
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import msgspec

from ckptd import failpoint
from ckptd.errors import BadRequest, Bug, Busy, CkptdError
from ckptd.worker import fetching, heap, kernel, protocol, rootmark, trashlist, verbs
from ckptd.worker.context import Context, Limits, TakesLong
from ckptd.worker.fault import coded
from ckptd.worker.lane import Lane
from ckptd_client.wire import FrameError, Splitter

READ_BYTES = 256 << 10
FDS_MAX = 16  # descriptors in one message; the daemon sends one with a frame
LOST = -1  # in the place of a descriptor that did not arrive
RETRY_S = 1.0
WAITING_MAX = 1024  # requests that wait in one lane
WATCHES_MAX = 256  # watches run until cancelled: each has a thread of its own


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a verb lives, and the lane it runs in.

    long  the lane it is asked again in when it turns out to take long
    """

    module: str
    function: str = "run"
    lane: str = "quick"
    long: str = ""


VERBS: dict[type[protocol.Request], Verb] = {
    protocol.Publish: Verb("publish", lane="publish"),
    protocol.Digest: Verb("digest", lane="read"),
    protocol.Verify: Verb("verify", lane="read"),
    protocol.Scan: Verb("scan", lane="scan"),
    protocol.Watch: Verb("watch", lane="watch"),
    protocol.Inspect: Verb("inspect"),
    protocol.Settle: Verb("settle", long="read"),
    protocol.Link: Verb("link"),
    protocol.Trash: Verb("trash", "trash"),
    protocol.Restore: Verb("trash", "restore"),
    protocol.Purge: Verb("trash", "purge"),
    trashlist.TrashList: Verb("trash", "listed"),
    protocol.Strip: Verb("strip", "strip"),
    protocol.Unstrip: Verb("strip", "unstrip"),
    protocol.Sweep: Verb("sweep"),
    protocol.Usage: Verb("usage"),
    protocol.Amend: Verb("amend"),
    fetching.FetchBegin: Verb("fetched", "begin"),
    fetching.FetchKeep: Verb("fetched", "keep", lane="read"),
    fetching.FetchDrop: Verb("fetched", "drop"),
    fetching.FetchedList: Verb("fetched", "listed"),
}


# Asked for where something is watched. Its library brings a reader of pickles along, which other workers need not have.
LATER = frozenset({"watch"})


def preload() -> None:
    """Import every verb but those in LATER, before anything is asked for.

    Later there may be no descriptor left to open a module with, or another version may lie in the place of this one.
    """
    for verb in VERBS.values():
        if verb.module not in LATER:
            load(verb)


def load(verb: Verb) -> Callable[[Any, Context], Any]:
    """Return the function behind a verb. Busy when it can't be imported now."""
    try:
        found: Callable[[Any, Context], Any] = getattr(
            importlib.import_module(f"ckptd.worker.{verb.module}"), verb.function
        )
    except (ImportError, OSError) as error:
        # A library without a descriptor to be opened with is an ImportError, and says so in words alone.
        raise Busy(f"{verb.module} can't be loaded now: {error}", retry_after_s=RETRY_S) from error
    return found


def make_lanes(threads: int) -> dict[str, Lane]:
    """Share the threads out, so that nothing waits behind what may take much longer, or matters less.

    publish  a trainer's arena is held until it is done; each takes a second thread for its digests
    read     scrubbing terabytes must not delay a publish; also a settle that must read what it looks at
    scan     one at a time: it has the whole tree to itself, and all of reconcile hangs on it
    quick    questions of a millisecond, and removals, which a full disk waits for
    watch    runs until it is cancelled
    """
    sizes = {
        "publish": max(1, threads // 2),
        "read": max(1, threads // 4),
        "scan": 1,
        "quick": max(2, threads // 4),
        "watch": WATCHES_MAX,
    }
    return {name: Lane(name, threads_max=size, waiting_max=WAITING_MAX) for name, size in sizes.items()}


class Loop:
    """One connection to the daemon and the requests under way."""

    def __init__(self, sock: socket.socket, limits: Limits, *, threads: int) -> None:
        """Take the connected socket; `threads` are shared out as make_lanes says."""
        self._socket = sock
        self._limits = limits
        self._sending = threading.Lock()
        self._running: dict[int, Context] = {}
        self._table = threading.Lock()
        self._lanes = make_lanes(threads)
        self._free = heap.Seldom()

    def run(self) -> NoReturn:
        """Serve until the socket ends, then end the process at once."""
        splitter = Splitter(protocol.FRAME_BYTES_MAX)
        arenas: list[int] = []  # received and not yet claimed by a frame, oldest first
        while True:
            data = self._receive(arenas)
            try:
                frames = splitter.feed(data)
            except FrameError as error:
                _die(f"the daemon broke the framing rules: {error}")
            for frame in frames:
                self._take(frame, arenas)

    def _receive(self, arenas: list[int]) -> bytes:
        """Read what is there. Received descriptors close on exec from the start: a parser child never has them."""
        try:
            data, messages, flags, _ = self._socket.recvmsg(
                READ_BYTES, socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, messages, flags = b"", [], 0
        if not data:
            # The daemon is gone, or wants us gone. exit_group stops every thread before it runs
            # another line of ours, so an orphan never starts a rename: a publish either was
            # inside its renameat2, and then its directory is whole, or it never happens. Python's
            # own exit would wait for threads that may hang in the kernel for ever.
            os._exit(0)
        came: list[int] = []
        for level, kind, payload in messages:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                width = len(payload) - len(payload) % 4
                came.extend(memoryview(payload)[:width].cast("i"))
        if flags & socket.MSG_CTRUNC and not came:
            # There was no room for it in this process's table. Frames bring one at most, and the kernel ends a read
            # behind it (unix(7)): so it is known whose it was, and that request alone has to come again.
            came = [LOST]
        arenas.extend(came)
        return data

    def _take(self, frame: bytes, arenas: list[int]) -> None:
        try:
            message = msgspec.json.decode(frame)
            number, fds = int(message.pop("id")), int(message.pop("fds", 0))
            if fds not in {0, 1} or fds > len(arenas):
                _die(f"a frame claims {fds} descriptors, {len(arenas)} came")
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            _die(f"the daemon sent no request: {error}")
        if message.get("verb") == "cancel":
            self._cancel(number)
            return
        fd = arenas.pop(0) if fds else None
        if fd == LOST:
            self._fail(number, Busy("the worker has no descriptor left to be lent an arena", retry_after_s=RETRY_S))
            return
        try:
            request = msgspec.convert(message, verbs.AnyRequest)
        except msgspec.ValidationError as error:
            if fd is not None:
                os.close(fd)
            self._fail(number, BadRequest(str(error)))
            return
        self._start(number, request, fd)

    def _start(self, number: int, request: protocol.Request, fd: int | None) -> None:
        verb = VERBS[type(request)]
        lane = self._lanes[verb.lane]
        context = Context(send=partial(self._speak, number, lane), fd=fd, limits=self._limits, quick=bool(verb.long))
        with self._table:
            self._running[number] = context
        self._submit(number, request, context, lane)

    def _again(self, number: int, request: protocol.Request, context: Context) -> None:
        """Ask the verb again in its long lane; it stays the same request, and may be cancelled all along."""
        lane = self._lanes[VERBS[type(request)].long]
        context.quick = False
        context.send = partial(self._speak, number, lane)
        self._submit(number, request, context, lane)

    def _submit(self, number: int, request: protocol.Request, context: Context, lane: Lane) -> None:
        try:
            lane.submit(number, partial(self._serve, number, request, context))
        except CkptdError as error:
            with self._table:
                del self._running[number]
            context.close()
            self._fail(number, error)

    def _cancel(self, number: int) -> None:
        with self._table:
            context = self._running.get(number)
        if context is not None:  # else the cancel and the answer crossed
            context.cancelled.set()

    def _serve(self, number: int, request: protocol.Request, context: Context) -> None:
        """Run one verb and answer, whatever happens: the border where bugs become replies."""
        verb = VERBS[type(request)]
        try:
            if not isinstance(request, protocol.Watch):
                context.alive()  # cancelled while it waited
            run = load(verb)
            with rootmark.checked(request, context):
                reply = run(request, context)
        except TakesLong:
            self._again(number, request, context)
            return
        except CkptdError as error:
            outcome = partial(self._fail, number, error, context.root)
        except OSError as error:
            outcome = partial(self._fail, number, coded(error) or self._bug(request, error), context.root)
        except Exception as error:  # noqa: BLE001  the border
            outcome = partial(self._fail, number, self._bug(request, error), context.root)
        else:
            outcome = partial(self._send, {"id": number, "ok": True, "result": reply, **_mark(context.root)})
        with self._table:
            del self._running[number]
        try:
            outcome()
        finally:
            context.close()
        self._free.give_back()  # behind an answer: a worker at rest wakes up for nothing

    def _bug(self, request: protocol.Request, error: Exception) -> Bug:
        trace = "".join(traceback.format_exception(error))
        _log("worker.internal", verb=type(request).__name__, traceback=_text(trace))
        return Bug(f"{type(error).__name__}: {error}")

    def _fail(self, number: int, error: CkptdError, root: protocol.RootMark | None = None) -> None:
        told = {name: _text(value) if isinstance(value, str) else value for name, value in error.to_wire().items()}
        self._send({"id": number, "ok": False, "error": told, **_mark(root)})

    def _speak(self, number: int, lane: Lane, body: dict[str, object]) -> None:
        """Send what a verb says before its reply.

        A sign of life speaks for those that wait behind it in its lane as well: they are not hung,
        and when this one hangs they fall silent with it.
        """
        self._send({"id": number, **body})
        if "alive" in body:
            for other in lane.waiting():
                self._send({"id": other, **body})

    def _send(self, body: dict[str, object]) -> None:
        """Write one frame whole. Blocks while the daemon does not read; ends the process when it is gone."""
        try:
            frame = _frame(body)
        except Bug as bug:
            frame = _frame({"id": body["id"], "ok": False, "error": bug.to_wire()})
        try:
            with self._sending:
                self._socket.sendall(frame)
        except OSError:
            os._exit(0)  # as at the end of the socket


def _frame(body: dict[str, object]) -> bytes:
    """Return what is sent. Bug: it can't be: too long, or a name in it is no text, which a verb has to see to."""
    try:
        frame = msgspec.json.encode(body) + b"\n"
    except (TypeError, ValueError) as error:
        raise Bug(f"a reply that can't be written down: {_text(str(error))}") from error
    if len(frame) > protocol.FRAME_BYTES_MAX:
        raise Bug(f"a reply of {len(frame)} bytes, {protocol.FRAME_BYTES_MAX} at most")
    return frame


def _text(told: str) -> str:
    """Spell out what a file's name may have in it and no frame can: bytes that are not UTF-8."""
    return told.encode(errors="backslashreplace").decode()


def _mark(root: protocol.RootMark | None) -> dict[str, object]:
    """Say what a root is known by, also beside an error: the mark may have been written before it."""
    return {} if root is None else {"root": root}


def _log(event: str, **facts: object) -> None:
    """Write one JSON line for the daemon's log; stderr is inherited from it."""
    line = msgspec.json.encode({"event": event, "level": "error", "pid": os.getpid(), **facts})
    sys.stderr.write(line.decode() + "\n")
    sys.stderr.flush()


def _die(reason: str) -> NoReturn:
    _log("worker.protocol", reason=reason)
    os._exit(os.EX_PROTOCOL)


def _thread_ended(told: threading.ExceptHookArgs) -> NoReturn:
    """End the process: with its thread a request ended that nobody would answer before the worker is taken for hung."""
    trace = "".join(traceback.format_exception(told.exc_type, told.exc_value, told.exc_traceback))
    try:
        _log("worker.internal", traceback=_text(trace))
    finally:
        os._exit(os.EX_SOFTWARE)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ckptd.worker")
    parser.add_argument("--fd", type=int, default=3)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--idle-io", action="store_true")
    parser.add_argument("--parser-bytes-max", type=int, default=Limits().parser_bytes_max)
    parser.add_argument("--parser-cpu-s", type=float, default=Limits().parser_cpu_s)
    parser.add_argument("--alive-every-s", type=float, default=Limits().alive_every_s)
    return parser.parse_args()


def _yield_to_training(nice: int) -> None:
    """Take the given niceness, as a process and as a session.

    With autogroups (on in most kernels, off under systemd's CPU control) niceness counts only among
    processes of one session, and each session has an equal share: a worker in the daemon's would take
    as much as the whole training. So it is a session of its own, with the same niceness. It is then
    out of the process group that is killed behind a dead daemon: the kernel ends it in that case.
    SCHED_BATCH, because a writer that wakes up after each write would else take the core from whoever
    computes there: a save beside a running publish took a seventh longer.
    """
    kernel.end_with_parent()
    os.nice(nice)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with suppress(OSError):  # it leads one already
        os.setsid()
    with suppress(OSError), open("/proc/self/autogroup", "w", encoding="ascii") as autogroup:
        autogroup.write(str(nice))


def main() -> NoReturn:
    """Set this process up and serve. The order matters: threads inherit what is set before them."""
    arguments = _arguments()
    # SIGIO kills by default, and a lease that is broken sends it. Ctrl-C and the service manager's
    # SIGTERM reach the whole group while the daemon drains: it ends us by the socket, when done.
    for number in (signal.SIGIO, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.excepthook = _thread_ended
    heap.bound()
    preload()
    _yield_to_training(arguments.nice)
    if arguments.idle_io:
        kernel.idle_io()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if failpoint.armed():
        _log("worker.failpoints", points=list(failpoint.armed()))
    limits = Limits(arguments.parser_bytes_max, arguments.parser_cpu_s, arguments.alive_every_s)
    sock = socket.socket(fileno=arguments.fd)
    sock.setblocking(True)
    sock.set_inheritable(False)
    Loop(sock, limits, threads=arguments.threads).run()


if __name__ == "__main__":
    main()
