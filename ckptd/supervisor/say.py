"""The supervisor's own few lines, shaped like the daemon's log, without its machinery."""

import contextlib
import json
import os
import select
from typing import Any

from ckptd.clock import SystemClock
from ckptd.errors import CkptdError

_STDERR = 2


class Voice:
    """Writes lines to stderr: JSON, or readable on a terminal. Nothing said here is worth dying for."""

    def __init__(self, log_format: str) -> None:
        """Take "auto", "json" or "console"."""
        self._format = log_format

    def say(self, level: str, event: str, **facts: Any) -> None:
        """Say one fact. A full pipe loses the line, not the supervisor's time."""
        now = SystemClock().now().isoformat(timespec="milliseconds")
        if self._format == "console" or (self._format == "auto" and os.isatty(_STDERR)):
            details = " ".join(f"{key}={value}" for key, value in facts.items())
            self._write(f"{now[11:23]} {level:<8} {event}  {details}".rstrip())
        else:
            self._write(json.dumps({"timestamp": now, "level": level, "event": event, **facts}))

    def refuse(self, error: CkptdError) -> None:
        """Say why the command ends: for people on a terminal, with code and details elsewhere."""
        if self._format != "json" and os.isatty(_STDERR):
            self._write(f"ckptd: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
        else:
            self.say("error", "supervisor.refused", error=error.to_wire())

    def _write(self, line: str) -> None:
        raw = line.encode(errors="backslashreplace")[: select.PIPE_BUF - 1] + b"\n"
        poll = select.poll()
        poll.register(_STDERR, select.POLLOUT)
        # A pipe with room for PIPE_BUF takes a line of that length without blocking. Making the
        # descriptor non-blocking instead would do so for everybody who shares it.
        if any(events & select.POLLOUT for _, events in poll.poll(0)):
            with contextlib.suppress(OSError):  # nobody left to tell
                os.write(_STDERR, raw)
