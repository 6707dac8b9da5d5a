"""Ask a parser child about foreign bytes; the children are bounded, reused and replaced.

A file that ends its parser (memory, CPU time, a crash) gets the verdict invalid_format and costs one
process. A disk that does not answer gets TimedOut. Starting a child takes some 100 ms, asking one
that waits takes less than one, so a burst of 20,000 files starts a handful.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from functools import cache

import msgspec

from ckptd.errors import Bug, Busy, TimedOut, from_wire
from ckptd.worker.context import Context, Limits
from ckptd.worker.parser import ANSWER_BYTES_MAX, IDLE_S, Answer, Question
from ckptd.worker.protocol import Inspected

FREE_MAX = 4  # children kept for the next question; each ends by itself when idle
STUCK_MAX = 4  # killed, but the kernel still waits for their disk
SILENCE_S = 60.0  # without an answer or a beat: the disk hangs. Below workers.request_s (120 s by default)
START_AGAIN_S = 1.0
_SLICE_S = 0.25
_REAP_S = 1.0
_BURIAL_S = 30.0  # for a child whose stdout has ended; with the silence before, still below workers.request_s
TIDY_S = IDLE_S + 1.0  # after a question; by then a child that waits has ended, unless it was asked again
_READ_BYTES = 1 << 16


def command(limits: Limits) -> list[str]:
    """Return the child's command line; as isolated from the environment as this process is.

    -P keeps the working directory off sys.path: nobody's files are imported by accident.
    """
    isolated = ["-I"] if sys.flags.isolated else []
    numbers = [str(limits.parser_bytes_max), str(limits.parser_cpu_s)]
    return [sys.executable, "-P", *isolated, "-m", "ckptd.worker.parser", *numbers]


class _EndedError(Exception):
    """The child's stdout ended before its answer."""


class _Child:
    """One parser process from the outside."""

    def __init__(self, limits: Limits) -> None:
        self._process = subprocess.Popen(
            command(limits),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin, self._stdout, self._stderr = self._process.stdin, self._process.stdout, self._process.stderr
        self._poll = select.poll()
        self._poll.register(self._stdout, select.POLLIN)
        self.began = False  # it has come so far that it reads questions

    def ask(self, question: Question, context: Context) -> Answer:
        """Return the answer. _EndedError, TimedOut, or Cancelled: the child is of no more use then."""
        try:
            self._stdin.write(msgspec.json.encode(question) + b"\n")
        except BrokenPipeError as error:
            raise _EndedError from error
        heard_s = time.monotonic()
        buffer = bytearray()
        while True:
            if self._poll.poll(_SLICE_S * 1000):
                part = os.read(self._stdout.fileno(), _READ_BYTES)
                if not part:
                    raise _EndedError
                buffer += part
                self.began = True
                heard_s = time.monotonic()
                while (cut := buffer.find(b"\n")) >= 0:
                    answer = msgspec.json.decode(memoryview(buffer)[:cut], type=Answer)
                    if not answer.beat:
                        return answer
                    del buffer[: cut + 1]
                    context.alive()
                if len(buffer) > ANSWER_BYTES_MAX:
                    raise Bug(f"a parser's answer is over {ANSWER_BYTES_MAX} bytes")
            if context.cancelled.is_set():
                context.alive()  # raises Cancelled
            if time.monotonic() - heard_s > SILENCE_S:
                raise TimedOut(f"nothing could be read for {SILENCE_S:.0f} s", path=question.path)

    def end(self) -> bool:
        """Kill it. False when the kernel does not let it die yet."""
        for pipe in (self._stdin, self._stdout, self._stderr):
            pipe.close()
        self._process.kill()
        return self.reaped(_REAP_S)

    def reaped(self, wait_s: float) -> bool:
        """Say whether it is dead, after waiting at most so long."""
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def last_words(self, question: Question, context: Context) -> tuple[int, str]:
        """Return how it ended after its stdout did: 0 by its own choice, -N by signal N; and its traceback.

        TimedOut or Cancelled: it can't be buried yet, so nobody knows. That says nothing of the file.
        """
        begun_s = time.monotonic()
        while not self.reaped(_SLICE_S):
            if context.cancelled.is_set():
                context.alive()  # raises Cancelled
            if time.monotonic() - begun_s > _BURIAL_S:
                raise TimedOut(f"its parser has not ended for {_BURIAL_S:.0f} s", path=question.path)
        text = os.read(self._stderr.fileno(), _READ_BYTES).decode(errors="replace")
        return self._process.returncode, text


class Parsers:
    """The parser children of one set of limits. Safe to use from many threads."""

    def __init__(self, limits: Limits) -> None:
        """Start nothing yet."""
        self._limits = limits
        self._lock = threading.Lock()
        self._free: list[_Child] = []
        self._stuck: list[_Child] = []
        self._tidies = False
        self.started = 0

    def ask(self, question: Question, context: Context) -> Answer:
        """Return the answer to one question, from a child of its own while it lasts.

        TimedOut  nothing was read for SILENCE_S: the disk hangs
        Busy      STUCK_MAX children hang already, or none can be started now
        Bug       the parser failed in a way that no file should make it fail
        """
        child = self._take()
        while True:
            try:
                answer = child.ask(question, context)
            except _EndedError:
                verdict = self._buried(child, question, context)
                if verdict is not None:
                    return verdict
                child = self._start()
            except BaseException:
                self._drop(child)
                raise
            else:
                self._give_back(child)
                return answer

    def _buried(self, child: _Child, question: Question, context: Context) -> Answer | None:
        """Say what a child's end means for its question; None when it had gone idle just before."""
        try:
            status, words = child.last_words(question, context)
        finally:
            self._drop(child)
        if not child.began:  # no memory, no descriptor: nothing of the file was read yet
            why = words.strip().rpartition("\n")[2] or f"exit status {status}"
            raise Busy(f"no parser can be started now: {why}", retry_after_s=START_AGAIN_S)
        if status > 0:
            raise Bug(f"the parser failed on {question.path!r}", traceback=words) from None
        return _verdict(-status, self._limits) if status < 0 else None

    def close(self) -> None:
        """End all children that wait."""
        with self._lock:
            free, self._free = self._free, []
        for child in free:
            child.end()

    def _take(self) -> _Child:
        with self._lock:
            if self._free:
                return self._free.pop()
        return self._start()

    def _start(self) -> _Child:
        with self._lock:
            self._stuck = [child for child in self._stuck if not child.reaped(0)]
            if len(self._stuck) >= STUCK_MAX:
                raise Busy(f"{STUCK_MAX} parsers hang on this file system", retry_after_s=SILENCE_S)
            self.started += 1
        return _Child(self._limits)

    def _give_back(self, child: _Child) -> None:
        with self._lock:
            if len(self._free) < FREE_MAX:
                self._free.append(child)
                self._tidy_later()
                return
        self._drop(child)

    def _tidy_later(self) -> None:
        """Look once more when those that wait may have ended. Called with the lock held."""
        if not self._tidies:
            self._tidies = True
            timer = threading.Timer(TIDY_S, self._tidy)
            timer.daemon = True
            timer.start()

    def _tidy(self) -> None:
        """Bury children that have ended: else each keeps three pipes and an entry among the processes until it is asked."""
        with self._lock:
            ended = [child for child in self._free if child.reaped(0)]
            self._free = [child for child in self._free if child not in ended]
            self._tidies = False
            if self._free:
                self._tidy_later()
        for child in ended:
            child.end()

    def _drop(self, child: _Child) -> None:
        if not child.end():
            with self._lock:
                self._stuck.append(child)


def _verdict(number: int, limits: Limits) -> Answer:
    """Say what a file is whose parser the kernel ended by a signal."""
    if number == signal.SIGXCPU:
        problem = f"invalid_format: reading it takes over {limits.parser_cpu_s:g} s of CPU time"
    else:
        problem = f"invalid_format: it ended its parser with {signal.Signals(number).name}"
    return Answer(found=Inspected(format="opaque", complete=False, problem=problem))


@cache
def parsers(limits: Limits) -> Parsers:
    """Return this process's children for `limits`, always the same ones."""
    return Parsers(limits)


def examine(question: Question, context: Context) -> Inspected:
    """Return what `question.path` looks like; what it breaks is in `problem`. Blocks; nothing is executed.

    OSError (ENOENT: gone), BadPath (a link, or outside of the root), and what `Parsers.ask` raises.
    """
    answer = parsers(context.limits).ask(question, context)
    if answer.failed is not None:
        raise OSError(answer.failed[0], answer.failed[1], question.path)
    if answer.error is not None:
        raise from_wire(dict(answer.error))
    assert answer.found is not None
    return answer.found
