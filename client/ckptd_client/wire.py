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

_BACKSLASH, _QUOTE = b'\\"'
_OPENING, _CLOSING = b"[{", b"]}"


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


def _unique(pairs: List[Any]) -> Message:
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
    try:
        message = json.loads(raw, parse_constant=_no_constant, object_pairs_hook=_unique)
    except FrameError:
        raise
    except (ValueError, RecursionError) as error:
        raise FrameError("bad_request", f"not JSON: {error}") from error
    if not isinstance(message, dict):
        raise FrameError("bad_request", "a frame must be a JSON object")
    return message


def check_depth(raw: bytes) -> None:  # noqa: C901 - one pass over a state machine of three states
    """Refuse a frame that nests deeper than DEPTH_MAX before any parser recurses into it.

    Counts brackets outside of strings; a frame with few brackets is cleared by two C-speed counts.
    """
    if raw.count(b"[") + raw.count(b"{") <= DEPTH_MAX:
        return
    depth = 0
    in_string = escaped = False
    for byte in raw:
        if in_string:
            if escaped:
                escaped = False
            elif byte == _BACKSLASH:
                escaped = True
            elif byte == _QUOTE:
                in_string = False
        elif byte == _QUOTE:
            in_string = True
        elif byte in _OPENING:
            depth += 1
            if depth > DEPTH_MAX:
                raise FrameError("bad_request", f"nested deeper than {DEPTH_MAX}")
        elif byte in _CLOSING:
            depth -= 1


class Splitter:
    """Cut a byte stream into frames; holds at most one unfinished frame.

    Feed it what the socket gave; it returns whole frames without their newlines. FrameError as
    soon as an unfinished frame passes FRAME_BYTES_MAX, before more is buffered.
    """

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        """Start with an empty buffer."""
        self._rest = bytearray()
        self._max = frame_bytes_max

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
