"""The child host of one hook: `python -m ckptd.hooks.host --fd N`.

Started by hosts.py, in a session of its own, under no user's code: that runs below it, in a process forked
for a Python hook (body.py) or in the program. The host measures the time and the memory, keeps a bounded part of
what is printed, and ends everything below it when the time is up, when the hook ends, and when the daemon is gone.
"""

import argparse
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptd.hooks import body, foreign, tree
from ckptd.hooks.output import Output
from ckptd.hooks.result import TEXT_CHARS_MAX

LINE_BYTES_MAX = 2 << 20  # of a request or of a body's answer
LOOK_S = 0.1  # how often memory and processes below are looked at while a hook runs
READ_BYTES = 64 << 10
VETO_STATUS = 10
OOM_SCORE = 800  # of 1000: whoever else needs the memory gets it first
_OWN = {"CKPTD_HOOK_EVENT": "event", "CKPTD_HOOK_KEY": "key", "CKPTD_EXPERIMENT": "experiment_id"}


class _HungUpError(Exception):
    """The daemon's end of the socket has closed."""


@dataclass
class _Job:
    """What runs below: a body, or a program."""

    pid: int
    out: Output
    err: Output
    channel: socket.socket | None = None
    line: bytearray = field(default_factory=bytearray)
    deaf: bool = False  # its channel has closed
    status: int | None = None  # of its end

    def streams(self) -> list[Any]:
        """Return what may have something to read."""
        found: list[Any] = [stream for stream in (self.out, self.err) if not stream.ended]
        return found if self.channel is None or self.deaf else [*found, self.channel]

    def close(self) -> None:
        """Give up its descriptors."""
        self.out.close()
        self.err.close()
        if self.channel is not None:
            self.channel.close()


class Host:
    """One host from the inside. Blocking, one thread: forking is safe here."""

    def __init__(self, sock: socket.socket) -> None:
        """Wait for what it is to run."""
        self._sock = sock
        self._received = bytearray()
        self._woken, wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the pipe
        self._setup: dict[str, Any] = {}
        self._body: _Job | None = None
        self._ready: dict[str, Any] = {}

    def serve(self) -> None:
        """Answer until the daemon hangs up."""
        try:
            self._setup = self._next()
            os.nice(self._setup["nice"])
            while True:
                request = self._next()
                self._send(self._start() if request["op"] == "start" else self._call(request))
        except _HungUpError:
            return
        finally:
            tree.end_all()

    def _next(self) -> dict[str, Any]:
        """Return the next request. Meanwhile what a hook's own threads print is read and thrown away."""
        while b"\n" not in self._received:
            job = self._body
            watched: list[Any] = [self._sock, self._woken]
            watched += job.streams() if job else []
            readable, _, _ = select.select(watched, [], [])
            if self._sock in readable:
                self._receive()
            self._reap(job)
            if job is not None:
                job.out.read()
                job.err.read()
                _printed(job)
                if job.status is not None or (job.channel in readable and _answered(job)):
                    self._drop(job)  # it ended, or spoke without being asked
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received[:] = rest
        request = json.loads(line)
        assert isinstance(request, dict)
        return request

    def _receive(self) -> None:
        data = self._sock.recv(READ_BYTES)
        if not data or len(self._received) > LINE_BYTES_MAX:
            raise _HungUpError
        self._received += data

    def _send(self, reply: Mapping[str, Any]) -> None:
        try:
            self._sock.sendall(json.dumps(reply).encode() + b"\n")
        except OSError as error:
            raise _HungUpError from error

    def _call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run the hook once; return how it ended."""
        if self._setup["kind"] == "exec":
            return self._program(request)
        if self._body is None or self._body.status is not None:
            self._start()
        if self._body is None:
            return {"outcome": "failed", "error": self._ready["problem"]}
        job, began_s = self._body, time.monotonic()
        asked = json.dumps(request["context"]).encode() + b"\n"
        ended = self._tell(job, asked, began_s + request["timeout_s"])
        ended = ended or self._attend(job, began_s + request["timeout_s"])
        if ended != "line":
            self._drop(job)
            return self._reply(job, ended, began_s, request["timeout_s"])
        answer = json.loads(job.line)
        job.line.clear()
        job.out.read_rest()
        job.err.read_rest()
        if answer.get("spent"):
            self._drop(job)
        else:
            self._end_orphans(job)
        return {**_understood(answer), **_printed(job), "duration_s": time.monotonic() - began_s}

    def _program(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run a program: JSON on stdin, the exit status is the verdict."""
        context, began_s = request["context"], time.monotonic()
        try:
            why = foreign.why_not(self._setup["target"])
        except OSError as error:
            why = f"it could not be started: {error}"
        if why:
            return {"outcome": "failed", "error": why}
        stdin = os.memfd_create("context")  # never blocks, however little the program reads
        os.write(stdin, request["stdin"].encode())
        os.lseek(stdin, 0, os.SEEK_SET)
        out, err = Output(self._setup["output_bytes_max"]), Output(self._setup["output_bytes_max"])
        try:
            process = subprocess.Popen(
                [self._setup["target"], *self._setup["arguments"]],
                stdin=stdin,
                stdout=out.write_fd,
                stderr=err.write_fd,
                cwd="/",
                env={**os.environ, **{key: str(context[name]) for key, name in _OWN.items()}},
                start_new_session=True,
                preexec_fn=self._limit,  # noqa: PLW1509 - this process has one thread
            )
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            out.close()
            err.close()
            return {"outcome": "failed", "error": f"it could not be started: {error}"}
        finally:
            os.close(stdin)
        out.close_write()
        err.close_write()
        job = _Job(process.pid, out, err)
        ended = self._attend(job, began_s + request["timeout_s"])
        job.status = tree.end_all().get(job.pid, job.status)
        process.returncode = 0  # reaped here, by number: Popen must not look for it
        out.read_rest()
        err.read_rest()
        job.close()
        return self._reply(job, ended, began_s, request["timeout_s"])

    def _reply(self, job: _Job, ended: str, began_s: float, timeout_s: float) -> dict[str, Any]:
        """Return how something ended that did not answer by itself."""
        reply: dict[str, Any] = {"outcome": "failed", **_printed(job), "duration_s": time.monotonic() - began_s}
        if ended == "timeout":
            return {**reply, "outcome": "timeout", "error": f"killed after {timeout_s:g} s"}
        if ended != "exit":
            return {**reply, "error": ended}
        status = job.status if job.status is not None else 0
        if self._setup["kind"] == "exec" and os.WIFEXITED(status):
            code = os.waitstatus_to_exitcode(status)
            first = (reply["stdout"].splitlines() or [""])[0].strip()[:TEXT_CHARS_MAX]
            if code in {0, VETO_STATUS}:
                veto = None if code == 0 else first or f"exit status {VETO_STATUS}"
                return {**reply, "outcome": "ok", "answer": {"veto": veto, "findings": []}}
        return {**reply, "error": tree.obituary(status)}

    def _start(self) -> dict[str, Any]:
        """Fork a body and wait until it has imported the code, start_s_max long; return what it says of itself."""
        if self._body is not None:
            if self._body.status is None:
                return self._ready
            self._drop(self._body)
        out, err = Output(self._setup["output_bytes_max"]), Output(self._setup["output_bytes_max"])
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            self._become_body(theirs, out, err)
        theirs.close()
        out.close_write()
        err.close_write()
        job = self._body = _Job(pid, out, err, ours)
        limit_s = self._setup["start_s_max"]
        ended = self._attend(job, time.monotonic() + limit_s)
        if ended == "line":
            self._ready = json.loads(job.line)
            job.line.clear()
        elif ended == "timeout":
            self._ready = {"problem": f"its module was not imported within {limit_s:g} s"}
        else:
            about = tree.obituary(job.status) if ended == "exit" and job.status is not None else ended
            self._ready = {"problem": f"it ended while its module was imported: {about}"}
        job.out.read_rest()
        job.err.read_rest()
        if "problem" in self._ready:
            self._ready |= _printed(job)
            self._drop(job)
        return self._ready

    def _become_body(self, channel: socket.socket, out: Output, err: Output) -> None:
        """In the forked process: take the limits, keep no descriptor of the host's, run the code. Never returns."""
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            os.dup2(out.write_fd, 1)
            os.dup2(err.write_fd, 2)
            kept = channel.fileno()
            os.closerange(3, kept)
            os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            self._limit()
            body.live(channel, self._setup)
        finally:
            os._exit(70)

    def _limit(self) -> None:
        """In a new process: die with the host, be the first to go for want of memory, take the limits."""
        tree.die_with_parent()
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(OOM_SCORE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = self._setup["memory_bytes_max"]
        if limit:
            # Of what it may write: files that are mapped to be read don't count, nor what is only reserved.
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def _tell(self, job: _Job, asked: bytes, until_s: float) -> str:
        """Send a question; "" when it is sent, else why it could not be."""
        assert job.channel is not None
        job.channel.settimeout(max(0.001, until_s - time.monotonic()))
        try:
            job.channel.sendall(asked)
        except TimeoutError:
            return "timeout"
        except OSError:  # it is dead or dying: how, _attend finds out
            return ""
        return ""

    def _attend(self, job: _Job, until_s: float) -> str:
        """Watch until the job answers ("line"), ends ("exit"), is too slow ("timeout") or takes too much (why)."""
        look_s = time.monotonic() + LOOK_S
        while True:
            now_s = time.monotonic()
            if now_s >= until_s:
                return "timeout"
            watched: list[Any] = [self._sock, self._woken]
            watched += job.streams()
            readable, _, _ = select.select(watched, [], [], max(0.0, min(until_s, look_s) - now_s))
            if self._sock in readable:
                self._receive()
            job.out.read()
            job.err.read()
            self._reap(job)
            if job.channel is not None and job.channel in readable:
                ended = _answered(job)
                if ended:
                    return ended
            if job.status is not None:
                return "exit"
            if time.monotonic() >= look_s:
                look_s = time.monotonic() + LOOK_S
                over = self._over()
                if over:
                    return over

    def _over(self) -> str:
        """Say which limit everything below exceeds together, "" when none."""
        pids = tree.below(os.getpid())
        if len(pids) > self._setup["processes_max"]:
            return f"over {self._setup['processes_max']} processes"
        limit = self._setup["memory_bytes_max"]
        if limit and tree.memory_bytes(pids) > limit:
            return f"over {limit} bytes of memory"
        return ""

    def _reap(self, job: _Job | None) -> None:
        try:
            while os.read(self._woken, 512):
                continue
        except BlockingIOError:
            ended = tree.reap()
            if job is not None and job.pid in ended:
                job.status = ended[job.pid]

    def _end_orphans(self, job: _Job) -> None:
        """End what the call has left behind: below the host, not below the body."""
        stays = {job.pid, *tree.below(job.pid)}
        tree.kill([pid for pid in tree.below(os.getpid()) if pid not in stays])
        self._reap(job)

    def _drop(self, job: _Job) -> None:
        """End a body and everything below; the next call starts another."""
        job.status = tree.end_all().get(job.pid, job.status)
        job.out.read_rest()
        job.err.read_rest()
        job.close()
        self._body = None


def _answered(job: _Job) -> str:
    """Read from a body's channel: "line" when an answer is complete, "" when not, else what is wrong."""
    assert job.channel is not None
    job.channel.setblocking(False)
    try:
        data = job.channel.recv(READ_BYTES)
    except BlockingIOError:
        return ""
    except OSError:
        data = b""
    job.line += data
    job.deaf = not data  # it is ending, which comes by another way, or has closed what it must not: then time ends it
    if job.line.endswith(b"\n"):
        return "line"
    return f"answered with over {LINE_BYTES_MAX} bytes" if len(job.line) > LINE_BYTES_MAX else ""


def _understood(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body's answer as the daemon reads it."""
    if answer.get("skipped"):
        return {"outcome": "skipped"}
    if "answer" in answer:
        return {"outcome": "ok", "answer": answer["answer"]}
    return {"outcome": "failed", "error": str(answer.get("error", ""))[:TEXT_CHARS_MAX]}


def _printed(job: _Job) -> dict[str, Any]:
    """Return what was printed since the last time."""
    stdout, out_dropped = job.out.take()
    stderr, err_dropped = job.err.take()
    return {"stdout": stdout, "stderr": stderr, "dropped_bytes": out_dropped + err_dropped}


def main() -> None:
    """Take the place of a host, then serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    tree.adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # by way of serve's end, which ends what is below
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=parser.parse_args().fd) as sock:
        Host(sock).serve()


if __name__ == "__main__":
    main()
