"""What the daemon says: JSON lines, or readable ones on a terminal, through a sink that never blocks.

    log.get("intake").warning("intake.refused", cause="quota", uid=1000, experiment=id)

Names are noun.verb; facts are fields (experiment, checkpoint, step, job, uid, ms, bytes), never text
glued into the name. Secrets are masked and control characters escaped here, whoever logs. A record
with `cause` is said once per CAUSE_EVERY_S for that cause, with the count of those kept back.
"""

import codecs
import itertools
import json
import logging
import os
import re
import select
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import structlog

from ckptd import config
from ckptd.clock import Clock
from ckptd_client.wire import number

QUEUED_MAX = 4096  # lines
LINE_BYTES_MAX = 16 << 10
CAUSE_EVERY_S = 30.0
CAUSES_MAX = 1024
CAUSE_CHARS_MAX = 200
TEXT_CHARS_MAX = 512  # of one field, in a line that is too long otherwise
FRAMES_MAX = 8  # of a trace, the innermost
LEAVES_MAX = 4  # of a group of errors
CLOSE_WAIT_S = 2.0
MASK = "***"

_SECRET_KEY = re.compile(r"(?i)token|secret|passw|authorization|credential|api_?key|private_?key|cookie")
_SECRET_TEXT = (
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s@]*:[^/\s@]*@"), rf"\1{MASK}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {MASK}"),
    (
        re.compile(r"(?i)\b((?:[a-z0-9_-]*(?:token|secret|passw(?:or)?d|api_?key|signature))\s*[=:]\s*)[^\s&,;]+"),
        rf"\1{MASK}",
    ),
)
codecs.lookup("unicode_escape")  # loaded from a file at its first use, when no descriptor may be left for it
# C0, DEL, C1, line and paragraph separators, and the marks that turn the direction of text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

Record = MutableMapping[str, Any]
_sinks: list["Sink"] = []  # of the process, as structlog's own configuration is


class Sink:
    """Lines to a file descriptor, through a thread: a full pipe or a dead journal blocks the thread, not us.

    At most QUEUED_MAX lines wait; beyond that the new ones are dropped and counted, and the count is
    said as `log.dropped` when lines flow again.
    """

    def __init__(self, fd: int) -> None:
        """Write to `fd`, which stays the caller's."""
        self.dropped = 0  # in all
        self._fd = fd
        self._unsaid = 0
        self._lines: deque[bytes] = deque()
        self._more = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue one line; never blocks."""
        raw = line.encode(errors="backslashreplace")
        with self._more:
            if len(self._lines) >= QUEUED_MAX:
                self.dropped += 1
                self._unsaid += 1
                return
            self._lines.append(raw + b"\n")
            self._more.notify()

    def close(self, wait_s: float = CLOSE_WAIT_S) -> None:
        """Let what is queued go out for `wait_s`; what a blocked descriptor does not take by then is lost."""
        with self._more:
            self._closing = True
            self._more.notify()
        self._thread.join(wait_s)

    def _run(self) -> None:
        while True:
            with self._more:
                while not self._lines:
                    if self._closing:
                        return
                    self._more.wait()
                line = self._lines.popleft()
                unsaid, self._unsaid = self._unsaid, 0
            if unsaid:
                report = {"level": "warning", "event": "log.dropped", "count": unsaid}
                line = json.dumps(report).encode() + b"\n" + line
            try:
                while line:
                    select.select((), (self._fd,), ())  # somebody may have made it non-blocking
                    line = line[os.write(self._fd, line[: select.PIPE_BUF]) :]
            except OSError:
                with self._more:  # nobody reads the log any more: count what they miss
                    self.dropped += 1
                    self._unsaid += 1


@dataclass(eq=False)
class _Limiter:
    """Says each cause once per interval; remembers CAUSES_MAX causes, the least recent goes first."""

    clock: Clock

    def __post_init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str], list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, _logger: object, _method: str, record: Record) -> Record:
        cause = record.get("cause")
        if cause is None:
            return record
        key = (str(record["event"]), str(cause))
        now_s = self.clock.monotonic_s()
        with self._lock:
            entry = self._seen.get(key)
            if entry is not None and now_s - entry[0] < CAUSE_EVERY_S:
                entry[1] += 1
                raise structlog.DropEvent
            if entry is not None and entry[1]:
                record["repeated"] = int(entry[1])
            self._seen[key] = [now_s, 0]
            self._seen.move_to_end(key)
            while len(self._seen) > CAUSES_MAX:
                self._seen.popitem(last=False)
        return record


class Log:
    """The daemon's log, from `start()` until `close()`."""

    def __init__(self, sink: Sink) -> None:
        """Own the sink."""
        self._sink = sink

    @property
    def dropped(self) -> int:
        """How many lines nobody will ever read."""
        return self._sink.dropped

    def close(self) -> None:
        """Flush for at most CLOSE_WAIT_S; what is logged later goes to nobody."""
        self._sink.close()


def start(settings: config.Log, clock: Clock, fd: int = 2) -> Log:
    """Set up logging for this process, libraries included. Call `close()` on the result at the end.

    With format "auto" a terminal gets readable lines, everything else JSON lines.
    """
    sink = Sink(fd)
    readable = settings.format == "console" or (settings.format == "auto" and os.isatty(fd))
    lowest = _LEVELS[settings.level]

    def stamp(_logger: object, _method: str, record: Record) -> Record:
        record["timestamp"] = clock.now().isoformat(timespec="milliseconds")
        return record

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _Limiter(clock),
            stamp,
            explain,
            clean,
            render_console if readable else render_json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=lambda *_: _Printer(sink),
        cache_logger_on_first_use=False,
    )
    _sinks[:] = [sink]
    root = logging.getLogger()
    root.handlers = [_Library()]
    root.setLevel(max(lowest, logging.WARNING))  # libraries chat at info
    return Log(sink)


def dropped() -> int:
    """Return how many lines of this process's log nobody will ever read."""
    return sum(sink.dropped for sink in _sinks)


def get(name: str = "", **fields: Any) -> Any:
    """Return a logger that adds `source` and `fields` to whatever it says."""
    return structlog.get_logger(**({"source": name} if name else {}), **fields)


def explain(_logger: object, _method: str, record: Record) -> Record:
    """Turn an exception into fields: its class, its message, its code and where it came from.

    Of a group, the first LEAVES_MAX errors in it as well: the group itself says nothing of the cause.
    """
    error = record.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()[1]
    if isinstance(error, tuple):
        error = error[1]
    if isinstance(error, BaseException):
        record["error"] = _told(error)
        if isinstance(error, BaseExceptionGroup):
            record["errors"] = [_told(leaf) for leaf in itertools.islice(_leaves(error), LEAVES_MAX)]
    return record


def clean(_logger: object, _method: str, record: Record) -> Record:
    """Mask secrets and escape control characters in every text of a record, keys included."""
    return {_escaped(str(key)): _cleaned(str(key), value) for key, value in record.items()}


def render_json(_logger: object, _method: str, record: Record) -> str:
    """One JSON object, the fields people look for first in front; too long a line loses its long texts."""
    line = _json(_ordered(record))
    if len(line) > LINE_BYTES_MAX:
        line = _json({key: _shortened(value) for key, value in _ordered(record).items()})
    return line


def render_console(_logger: object, _method: str, record: Record) -> str:
    """One readable line: time, level, event, then key=value."""
    ordered = _ordered(record)
    time, level, event = (str(ordered.pop(key, "")) for key in ("timestamp", "level", "event"))
    facts = " ".join(f"{k}={v if isinstance(v, str) and ' ' not in v else _json(v)}" for k, v in ordered.items())
    return f"{time[11:23]} {level:<8} {event}  {facts}".rstrip()[:LINE_BYTES_MAX]


class _Printer:
    """structlog's last step: hand the line to the sink."""

    def __init__(self, sink: Sink) -> None:
        self.msg = sink.put

    debug = info = warning = error = critical = property(lambda self: self.msg)


class _Library(logging.Handler):
    """Records of libraries that use the standard logging module."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower()
        say = getattr(get(record.name), level if level in _LEVELS else "warning")
        say(
            "library.said",
            message=record.getMessage(),
            cause=f"{record.name} {record.msg}"[:CAUSE_CHARS_MAX],
            exc_info=record.exc_info,
        )


def _told(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "code": getattr(error, "code", None),
        "trace": _trace(error),
    }


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _trace(error: BaseException) -> list[str]:
    """The innermost frames, without source text: file, line, function."""
    frames = []
    here = error.__traceback__
    while here is not None:
        code = here.tb_frame.f_code
        frames.append(f"{os.path.basename(code.co_filename)}:{here.tb_lineno} {code.co_qualname}")
        here = here.tb_next
    return frames[-FRAMES_MAX:]


def _cleaned(key: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value  # a count of tokens is no secret
    if isinstance(value, float):
        return number(value)
    if _SECRET_KEY.search(key) and value:
        return MASK
    if isinstance(value, str):
        for pattern, replacement in _SECRET_TEXT:
            value = pattern.sub(replacement, value)
        return _escaped(value)
    if isinstance(value, Mapping):
        return {_escaped(str(k)): _cleaned(str(k), v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_cleaned("", v) for v in value]
    return _cleaned("", str(value))


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def _ordered(record: Mapping[str, Any]) -> dict[str, Any]:
    first = {key: record[key] for key in ("timestamp", "level", "event") if key in record}
    return {**first, **{key: value for key, value in record.items() if key not in first}}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _shortened(value: Any) -> Any:
    text = value if isinstance(value, str) else _json(value)
    return value if len(text) <= TEXT_CHARS_MAX else f"{text[:TEXT_CHARS_MAX]}... ({len(text)} characters)"
