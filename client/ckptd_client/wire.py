"""Frames between a client and the daemon, and between the daemon and its workers. No I/O.

A frame is one JSON object on one line, at most FRAME_BYTES_MAX bytes, nested at most DEPTH_MAX
deep. A frame whose "fds" is N owns the next N descriptors received on the same connection.

Request   {"v": 1, "id": 7, "op": "commit", ...}
Reply     {"v": 1, "id": 7, "ok": true, ...}  or
          {"v": 1, "id": 7, "ok": false, "error": {"code": ..., "message": ..., "hint": ...}}
Push      {"v": 1, "push": "level", ...}      the daemon speaks first; no reply

Both ends use this file, so it imports the standard library only. Frames stored under
tests/golden/wire are never edited, only added to.
"""

import json
import math
from typing import Any, Dict, List, Union

VERSION = 1
FRAME_BYTES_MAX = 1 << 20
DEPTH_MAX = 32

Message = Dict[str, Any]

_ALL_BUT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class FrameError(ValueError):
    """The peer broke the framing rules; the connection can't be trusted any more."""

    def __init__(self, code: str, message: str) -> None:
        """Remember the stable `code` that the peer is told before the connection closes."""
        super().__init__(message)
        self.code = code


def encode(message: Message) -> bytes:
    """Turn one message into its frame, newline included.

    FrameError  the caller built a frame over FRAME_BYTES_MAX: split the message
    ValueError  a float is NaN or infinite: use `number()` first
    """
    frame = json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    if len(frame) > FRAME_BYTES_MAX:
        raise FrameError("frame_too_large", f"frame of {len(frame)} bytes, {FRAME_BYTES_MAX} at most")
    return frame


def _no_constant(name: str) -> None:
    raise FrameError("bad_request", f"{name} is not JSON")


def unique(pairs: List[Any]) -> Message:
    """Build an object for json.loads(object_pairs_hook=...). FrameError, a ValueError, when a key occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FrameError("bad_request", "a key occurs twice")
    return found


def decode(frame: Union[bytes, bytearray, memoryview]) -> Message:
    """Turn one frame (without or with its newline) into a message.

    FrameError  not UTF-8, not JSON, not an object, nested too deep, or a key occurs twice
    """
    raw = bytes(frame)
    check_depth(raw)
    message = _parse(raw)
    if not isinstance(message, dict):
        raise FrameError("bad_request", "a frame must be a JSON object")
    return message


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw, parse_constant=_no_constant, object_pairs_hook=unique)
    except FrameError:
        raise
    except (ValueError, RecursionError) as error:
        raise FrameError("bad_request", f"not JSON: {error}") from error


def check_depth(raw: bytes) -> None:
    """Refuse a frame that nests deeper than DEPTH_MAX, before any parser recurses into it.

    Strings are cut out first; then each round takes the innermost brackets away, so that what is left
    after DEPTH_MAX rounds was nested deeper, or never closed. All of it runs at C speed, for the worst
    frame too. What stands behind the first thing that is no JSON may be miscounted: no parser gets there.
    """
    if raw.count(b"[") + raw.count(b"{") <= DEPTH_MAX:
        return
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(unescaped.split(b'"')[::2]).translate(None, _ALL_BUT_BRACKETS)
    for _ in range(DEPTH_MAX):
        before = len(brackets)
        brackets = brackets.replace(b"[]", b"\0").replace(b"{}", b"\0").replace(b"\0", b"")
        if len(brackets) in {0, before}:
            break
    if brackets:
        raise FrameError("bad_request", f"nested deeper than {DEPTH_MAX}, or a bracket is never closed")


def check_keys(raw: bytes) -> None:
    """Refuse JSON in which one object holds a key twice: two readers could see two different things.

    FrameError  a key occurs twice, or `raw` is not JSON
    """
    _parse(raw)


class Splitter:
    """Cut a byte stream into frames; holds at most one unfinished frame.

    Feed it what the socket gave; it returns whole frames without their newlines. FrameError as
    soon as an unfinished frame passes FRAME_BYTES_MAX, before more is buffered.
    """

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        """Start with an empty buffer."""
        self._rest = bytearray()
        self._max = frame_bytes_max

    @property
    def waiting_bytes(self) -> int:
        """Size of the unfinished frame."""
        return len(self._rest)

    def feed(self, data: bytes) -> List[bytes]:
        """Return the frames that `data` completes, oldest first; empty lines are skipped."""
        if b"\n" not in data:
            self._rest += data
            self._check(len(self._rest))
            return []
        *frames, rest = (bytes(self._rest) + data).split(b"\n")
        self._rest = bytearray(rest)
        for frame in frames:
            self._check(len(frame))
        self._check(len(rest))
        return [frame for frame in frames if frame]

    def _check(self, size_bytes: int) -> None:
        if size_bytes > self._max:
            raise FrameError("frame_too_large", f"frame over {self._max} bytes")


def number(value: float) -> Union[float, str]:
    """Make a metric value fit for JSON: NaN and the infinities become their names."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def from_number(value: Union[float, str]) -> float:
    """Undo `number()`. ValueError when `value` is neither a number nor one of the three names."""
    if isinstance(value, str):
        return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}[value]
    return float(value)
