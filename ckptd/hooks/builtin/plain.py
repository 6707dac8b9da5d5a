"""Figures of numbers with the standard library alone: slow and right. vectors.py does the same with numpy."""

import math
import operator
import struct
import sys
from array import array
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

# (exponent bits, mantissa bits, bias, form): OCP 8-bit formats, and those of the FNUZ kind
_EIGHT_BITS = {
    "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3": (4, 3, 7, "fn"),
    "F8_E4M3FNUZ": (4, 3, 8, "fnuz"),
    "F8_E5M2FNUZ": (5, 2, 16, "fnuz"),
    "F8_E8M0": (8, 0, 127, "scale"),
}
LARGEST = {"F16": 65504.0, "F8_E5M2": 57344.0, "F8_E4M3": 448.0, "F8_E4M3FNUZ": 240.0, "F8_E5M2FNUZ": 57344.0}
_ARRAYS = {"F32": "f", "F64": "d", "C64": "f", "C128": "d"}
FLOATS = frozenset({"F16", "BF16", *_ARRAYS, *_EIGHT_BITS})  # complex numbers count as pairs
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "C64": 8, "C128": 16, **dict.fromkeys(_EIGHT_BITS, 1)}


class Tally(NamedTuple):
    """Figures of a tensor, or of a part of it. `largest` and `norm` are of its finite numbers."""

    elements: int = 0
    nan: int = 0
    inf: int = 0
    zero: int = 0
    largest: float = 0.0
    norm: float = 0.0

    def plus(self, other: "Tally") -> "Tally":
        """Return the figures of both parts together."""
        return Tally(
            self.elements + other.elements,
            self.nan + other.nan,
            self.inf + other.inf,
            self.zero + other.zero,
            max(self.largest, other.largest),
            math.hypot(self.norm, other.norm),
        )


def decode(dtype: str, raw: bytes) -> Sequence[float]:
    """Return the numbers that little-endian bytes of one of FLOATS hold."""
    if dtype == "F16":
        return struct.unpack(f"<{len(raw) // 2}e", raw)
    if dtype == "BF16":  # the upper half of a single-precision number
        wide = bytearray(len(raw) * 2)
        wide[2::4], wide[3::4] = raw[0::2], raw[1::2]
        return _array("f", bytes(wide))
    if dtype in _EIGHT_BITS:
        return [*map(table(dtype).__getitem__, raw)]
    return _array(_ARRAYS[dtype], raw)


def tally(numbers: Sequence[float]) -> Tally:
    """Return the figures of these numbers."""
    count = len(numbers)
    squares = sum(map(operator.mul, numbers, numbers))
    zero = numbers.count(0.0)
    if math.isfinite(squares):
        largest = _largest(numbers)
        return Tally(count, 0, 0, zero, largest, _norm(squares, largest, numbers))
    finite = [number for number in numbers if math.isfinite(number)]
    nan = sum(number != number for number in numbers)  # noqa: PLR0124 - what makes a NaN
    largest = _largest(finite)
    return Tally(count, nan, count - len(finite) - nan, zero, largest, _norm(math.inf, largest, finite))


def row_norms(numbers: Sequence[float], row: int, part: slice) -> list[float]:
    """Return the norm of a `part` of each `row` numbers; NaN for one with a NaN or an infinity in it."""
    rows = (numbers[at : at + row][part] for at in range(0, len(numbers) - row + 1, row))
    return [norm if math.isfinite(norm := math.hypot(*each)) else math.nan for each in rows]


def _largest(numbers: Sequence[float]) -> float:
    # Not max(*numbers, ...): a call with a million arguments.
    return max(max(numbers, default=0.0), -min(numbers, default=0.0))


def _norm(squares: float, largest: float, numbers: Sequence[float]) -> float:
    """Return the root of the sum of squares, also where a square leaves double precision at either end."""
    if sys.float_info.min < squares < math.inf or not largest:
        return math.sqrt(squares) if largest else 0.0
    return largest * math.sqrt(math.fsum((number / largest) ** 2 for number in numbers))


def _array(code: str, raw: bytes) -> "array[float]":
    numbers: array[float] = array(code, raw)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


@cache
def table(dtype: str) -> tuple[float, ...]:
    """Return what each of the 256 bytes of an 8-bit type means."""
    exponent_bits, mantissa_bits, bias, form = _EIGHT_BITS[dtype]
    if form == "scale":
        return (*(2.0 ** (byte - bias) for byte in range(255)), math.nan)
    return tuple(_eight(byte, exponent_bits, mantissa_bits, bias, form) for byte in range(256))


def _eight(byte: int, exponent_bits: int, mantissa_bits: int, bias: int, form: str) -> float:
    sign = -1.0 if byte >> 7 else 1.0
    exponent = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = byte & ((1 << mantissa_bits) - 1)
    last = (1 << exponent_bits) - 1
    if form == "fnuz" and byte == 0x80:  # noqa: PLR2004 - the sign alone: there is no minus zero, it is the NaN
        return math.nan
    if form == "ieee" and exponent == last:
        return math.nan if mantissa else sign * math.inf
    if form == "fn" and byte & 0x7F == 0x7F:  # noqa: PLR2004 - all ones is the only NaN; there is no infinity
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
