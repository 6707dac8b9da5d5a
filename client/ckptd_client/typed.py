"""Plain values as typed JSON text; decode.py turns it back into the same types and the same bits.

None, bool, str, finite float, int of at most 64 bits and list are plain JSON. All else is an object
with one key, its tag: {"tuple": [...]}, {"dict": {...}}, {"float": "nan"}; docs/reference/state.md
lists them.
"""

import base64
import datetime as dt
import json
import pathlib
import struct
from typing import Any, Callable, Dict, Optional, Sequence

from ckptd_client.errors import UnsupportedValue

INT_MAX = 1 << 63
NAN_BITS = 0x7FF8000000000000  # the NaN that arithmetic and float("nan") give

quote: Callable[[str], str] = json.encoder.encode_basestring_ascii
encode_flat: Callable[[Any], str] = json.JSONEncoder(
    allow_nan=False, check_circular=False, separators=(",", ":")
).encode

PATHS = {
    kind.__name__: kind
    for kind in (
        pathlib.PosixPath,
        pathlib.PurePosixPath,
        pathlib.WindowsPath,
        pathlib.PureWindowsPath,
    )
}
FACTORIES: Dict[str, Any] = {kind.__name__: kind for kind in (list, dict, set, int, float, str, tuple, bool)}


def tag(name: str, body: str) -> str:
    """Write one tagged node."""
    return f'{{"{name}":{body}}}'


def int_text(value: int) -> str:
    """Write an int; one that few JSON readers keep goes in hexadecimal, which has no digit limit."""
    if -INT_MAX <= value < INT_MAX:
        return repr(value)
    return tag("int", quote(hex(value)))


def float_text(value: float) -> str:
    """Write a float; repr gives the shortest text that reads back to the same bits."""
    if value - value == 0.0:  # neither NaN nor infinite
        return repr(value)
    if value == value:  # noqa: PLR0124  # infinite
        return tag("float", '"inf"' if value > 0 else '"-inf"')
    bits = struct.unpack("<Q", struct.pack("<d", value))[0]
    return tag("float", '"nan"' if bits == NAN_BITS else f'"{bits:016x}"')


def _b64(value: Any) -> str:
    return quote(base64.b64encode(value).decode("ascii"))


def _datetime_text(value: dt.datetime) -> str:
    if value.fold or (value.tzinfo is not None and type(value.tzinfo) is not dt.timezone):
        raise UnsupportedValue("a time in a zone by name is more than its offset", "", hint="store it in UTC")
    return tag("datetime", quote(value.isoformat()))


# exact type -> text
SCALARS: Dict[type, Callable[[Any], str]] = {
    type(None): lambda _: "null",
    bool: lambda value: "true" if value else "false",
    int: int_text,
    float: float_text,
    str: quote,
    complex: lambda value: tag("complex", f"[{float_text(value.real)},{float_text(value.imag)}]"),
    bytes: lambda value: tag("bytes", _b64(value)),
    bytearray: lambda value: tag("bytearray", _b64(value)),
    range: lambda value: tag("range", f"[{int_text(value.start)},{int_text(value.stop)},{int_text(value.step)}]"),
    dt.datetime: _datetime_text,
    dt.date: lambda value: tag("date", quote(value.isoformat())),
    dt.timedelta: lambda value: tag("timedelta", f"[{value.days},{value.seconds},{value.microseconds}]"),
}
SCALARS.update(
    {kind: lambda value: tag("path", f"[{quote(type(value).__name__)},{quote(str(value))}]") for kind in PATHS.values()}
)


def numpy_scalar_text(value: Any) -> Optional[str]:
    """Write a NumPy scalar by the bytes of its item."""
    dtype = value.dtype
    if dtype.hasobject or dtype.kind == "V":
        return None
    return tag("scalar", f"[{quote(dtype.str)},{_b64(value.tobytes())}]")


def list_text(value: Any) -> Optional[str]:
    """Write a list or tuple of many plain items of one type at C speed; None when it is not such."""
    kinds = set(map(type, value))
    if len(kinds) != 1:
        return None
    kind = kinds.pop()
    if kind is int and not (min(value) >= -INT_MAX and max(value) < INT_MAX):
        return None
    if kind not in (int, float, str, bool):
        return None
    try:
        return encode_flat(value)
    except ValueError:  # a NaN or an infinity among them
        return None


def compose(token: Any, texts: Sequence[str]) -> str:
    """Write one container from the texts of its children; `token` is the container's (see flatten.py)."""
    name, extra = token[0], token[1]
    if name == "dict":
        return '{"dict":{' + ",".join(map(":".join, zip(map(quote, token[2]), texts))) + "}}"  # noqa: B905  # strict= came with Python 3.10
    if name in MAPPINGS:
        keys = map(quote, token[2]) if token[2] is not None else token[3]
        pairs = "[" + ",".join([f"[{key},{text}]" for key, text in zip(keys, texts)]) + "]"  # noqa: B905  # as above
        if name == "ordered":
            return tag(name, f"[{pairs},{texts[-1]}]" if extra else f"[{pairs}]")
        return tag(name, pairs if extra is None else f"[{extra},{pairs}]")
    items = "[" + ",".join(texts) + "]"
    if name == "list":
        return items
    return tag(name, items if extra is None else f"[{extra},{items}]")


MAPPINGS = ("dict", "items", "ordered", "defaultdict", "counter")
