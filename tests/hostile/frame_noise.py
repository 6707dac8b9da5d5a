"""Frames that no honest client sends: stored good ones damaged in every way a line of bytes can be.

Everything comes from one random.Random, so that a seed names a run. `swallow` is what the daemon does with
bytes before any handler runs: cut into frames, decoded, validated, refused with a coded error.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import msgspec

from ckptd.errors import CkptdError
from ckptd.intake import descriptor
from ckptd.intake import requests as ask
from ckptd.intake.service import failure
from ckptd_client import wire

GOLDEN = Path(__file__).parents[1] / "golden/wire"
ENDING = frozenset({"stop", "reload", "rebuild", "root.add"})  # they act on more than their own connection
ARENA_BYTES = 1 << 20
LONG_SHARE = 0.005  # of the damages that could make a frame long: such a frame costs what a thousand others do
HUGE = (b"9" * 40, b"-1", b"1e999", b"18446744073709551616", b"NaN", b"-0", b"1.5", b"9" * 5000, b"null", b"true")
ODD = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\\ud800", b"\0", b"\\u0000", b"\xe2\x80\xae", b'"', b"\\", b"{", b"]")
DESCRIPTOR = json.dumps(
    {
        "checkpoint": "c" * 32,
        "experiment": {"id": "e" * 32, "project": "p", "name": "n", "dir": "/runs", "config": {"a": [1, {"b": None}]}},
        "files": [{"path": "model.safetensors", "offset": 4096, "size_bytes": 100}],
        "step": 3,
        "metrics": {"loss": "NaN", "acc": 0.5},
        "meta": {"x": [[], {}]},
    }
).encode()


def good(*, ending: bool = True) -> list[bytes]:
    """Every stored frame of every operation, without its newline."""
    frames = [json.loads(path.read_text())["frame"] for path in sorted(GOLDEN.glob("*.json"))]
    return [json.dumps(frame).encode() for frame in frames if ending or frame["op"] not in ENDING]


def _at(rng: random.Random, frame: bytearray) -> int:
    return rng.randrange(len(frame) + 1)


def _flip(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    if frame:
        frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)


def _cut(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    start = _at(rng, frame)
    del frame[start : start + rng.randrange(1, 40)]


def _repeat(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    start = _at(rng, frame)
    frame[start:start] = frame[start : start + rng.randrange(1, 60)] * rng.randrange(1, 4)


def _put(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    start = _at(rng, frame)
    frame[start:start] = rng.choice(ODD) * rng.choice((1, 1, 1, 50))


def _splice(rng: random.Random, frame: bytearray, frames: list[bytes]) -> None:
    other = rng.choice(frames)
    frame[_at(rng, frame) :] = other[rng.randrange(len(other)) :]


def _number(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    places = [index for index, byte in enumerate(frame) if byte in b"0123456789"]
    if places:
        index = rng.choice(places)
        frame[index : index + 1] = rng.choice(HUGE)


def _key_twice(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    if frame[:1] == b"{" and b"," in frame:
        frame[1:1] = frame[1 : frame.index(b",") + 1]


def _deeper(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    depth = rng.choice((2, 31, 33, 400))
    index = frame.rfind(b"}")
    if index > 0:
        frame[index:index] = b',"meta":' + b'{"a":' * depth + b"[]" + b"}" * depth


def _longer(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    if rng.random() < LONG_SHARE:
        start = _at(rng, frame)
        frame[start:start] = rng.choice(("\u00e9", "\x7f", "x", "\U0001f600")).encode() * rng.choice((300_000, 100_000))


def _line(rng: random.Random, frame: bytearray, _: list[bytes]) -> None:
    start = _at(rng, frame)
    frame[start:start] = rng.choice((b"\n", b"\n\n\n", b"\r\n"))


_DAMAGES: tuple[Callable[[random.Random, bytearray, list[bytes]], None], ...] = (
    _flip, _flip, _cut, _repeat, _put, _splice, _number, _key_twice, _deeper, _longer, _line,
)  # fmt: skip


def damaged(rng: random.Random, frames: list[bytes]) -> bytes:
    """One of `frames` after one to four damages."""
    frame = bytearray(rng.choice(frames))
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(_DAMAGES)(rng, frame, frames)
    return bytes(frame)


def swallow(data: bytes) -> tuple[int, int]:
    """Take bytes as the daemon takes them; return how many frames were in them and how many were refused.

    Whatever is not a request or a coded error with a message that fits into a frame is let out.
    """
    taken = refused = 0
    try:
        frames = wire.Splitter().feed(data + b"\n")
    except wire.FrameError as error:
        assert error.code in {"frame_too_large", "bad_request"}
        return 1, 1
    for frame in frames:
        taken += 1
        try:
            ask.decode(frame)
        except CkptdError as error:
            refused += 1
            wire.encode(failure(ask.request_id(frame), error))
    return taken, refused


def swallow_descriptor(data: bytes) -> None:
    """Take bytes as the daemon takes what a trainer committed in its arena."""
    try:
        found = descriptor.decode(data, ARENA_BYTES)
    except CkptdError as error:
        assert error.code in {"bad_request", "bad_path"}
        wire.encode(failure(1, error))
    else:
        msgspec.to_builtins(found)
        assert all(file.offset + file.size_bytes <= ARENA_BYTES for file in found.files)


def swallow_reply(data: bytes) -> None:
    """Take bytes as a client takes what its daemon sends."""
    try:
        for frame in wire.Splitter().feed(data + b"\n"):
            message = wire.decode(frame)
            assert isinstance(message, dict)
    except wire.FrameError as error:
        assert error.code in {"frame_too_large", "bad_request"}
