"""Telling somebody outside: one message by webhook or mail, in a thread, tried again while that can help.

The thread's work can be broken off from outside (`Sending.abort`), so that a server which answers one byte
a minute holds nothing longer than the hook's timeout.
"""

import threading
from dataclasses import dataclass, field, replace
from typing import Protocol

import anyio
import anyio.to_thread
import stamina

from ckptd.clock import Clock
from ckptd.errors import Busy, CkptdError, TimedOut, Weather
from ckptd.hooks import mail, webhook
from ckptd.hooks.context import Context
from ckptd.hooks.result import TEXT_CHARS_MAX, Outcome, Run
from ckptd.hooks.spec import Kind, Spec

RETRIES = 5
RETRY_S = 60.0
PAUSE_S = 0.5  # the first; doubles, with jitter, up to PAUSE_S_MAX
PAUSE_S_MAX = 30.0
STUCK_MAX = 16  # threads given up on that may exist at once: a resolver that hangs can't be broken off


class Sending(Protocol):
    """One attempt."""

    def run(self) -> str:
        """Block until it is delivered; return what the other side said. Weather when another attempt may help."""

    def abort(self) -> None:
        """Make `run` end soon, from another thread."""


@dataclass(slots=True)
class _Threads:
    """How many threads run, and how many of them somebody still waits for."""

    running: int = 0
    awaited: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, sending: Sending) -> str:
        """Send, in a thread that may be given up on."""
        with self.lock:
            self.running += 1
        try:
            return sending.run()
        finally:
            with self.lock:
                self.running -= 1


_threads = _Threads()


@dataclass(frozen=True, slots=True)
class Letter:
    """What is to be told to whom; `clock` stamps each attempt."""

    context: Context
    spec: Spec
    clock: Clock


async def send(run: Run, letter: Letter, turns: anyio.CapacityLimiter) -> Run:
    """Return the run as it ended: delivered, refused, or given up after options' retries_max and retry_s_max.

    Waits for one of `turns` at each attempt, and holds none while it pauses.
    """
    spec = letter.spec
    tries = int(spec.options.get("retries_max", RETRIES)) + 1
    attempts = 0
    try:
        async for attempt in stamina.retry_context(
            on=Weather,
            attempts=tries,
            timeout=float(spec.options.get("retry_s_max", RETRY_S)),
            wait_initial=PAUSE_S,
            wait_max=PAUSE_S_MAX,
            wait_jitter=PAUSE_S,
        ):
            with attempt:
                attempts = attempt.num
                async with turns:
                    said = await _once(letter)
    except CkptdError as error:
        outcome = Outcome.TIMEOUT if isinstance(error, TimedOut) else Outcome.FAILED
        return replace(run, outcome=outcome, error=error.message[:TEXT_CHARS_MAX], attempts=attempts)
    return replace(run, output=said, attempts=attempts)


async def _once(letter: Letter) -> str:
    """Send it once. TimedOut after the hook's timeout_s, whatever the other side does."""
    if _threads.running - _threads.awaited >= STUCK_MAX:
        raise Busy(f"{STUCK_MAX} messages are stuck already, in looking up a name or reading a file")
    sending, timeout_s, room = _sending(letter), letter.spec.timeout_s, anyio.CapacityLimiter(1)
    _threads.awaited += 1
    try:
        with anyio.fail_after(timeout_s):
            return await anyio.to_thread.run_sync(_threads.run, sending, abandon_on_cancel=True, limiter=room)
    except TimeoutError as error:
        raise TimedOut(f"no answer within {timeout_s:g} s") from error
    finally:
        _threads.awaited -= 1
        sending.abort()


def _sending(letter: Letter) -> Sending:
    if letter.spec.kind is Kind.WEBHOOK:
        return webhook.Posting(letter.spec, letter.context, int(letter.clock.now().timestamp()))
    return mail.Mailing(letter.spec, letter.context)
