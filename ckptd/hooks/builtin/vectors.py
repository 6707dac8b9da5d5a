"""Figures of numbers with numpy, for hooks' own processes on machines that have it; plain.py says what they mean.

The one module of ckptd that imports numpy. The daemon never imports it: it is loaded by `arithmetic()`,
which only a hook's process calls.
"""

import math
from typing import Any

import numpy as np

from ckptd.hooks.builtin.plain import Tally, table

_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<f4", "C128": "<f8"}


def decode(dtype: str, raw: bytes) -> Any:
    """Return the numbers that little-endian bytes of one of plain.FLOATS hold, in double precision."""
    if dtype not in _TYPES and dtype != "BF16":
        return np.array(table(dtype))[np.frombuffer(raw, np.uint8)]
    with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
        if dtype == "BF16":
            return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
        return np.frombuffer(raw, _TYPES[dtype]).astype(np.float64)


def tally(numbers: Any) -> Tally:
    """Return the figures of these numbers."""
    count = int(numbers.size)
    if not count:
        return Tally()
    zero = count - int(np.count_nonzero(numbers))
    with np.errstate(all="ignore"):
        squares = float(numbers @ numbers)
        if math.isfinite(squares):
            largest = max(float(numbers.max()), -float(numbers.min()))
            return Tally(count, 0, 0, zero, largest, _norm(squares, largest, numbers))
        nan = int(np.isnan(numbers).sum())
        finite = numbers[np.isfinite(numbers)]
        largest = max(float(finite.max()), -float(finite.min())) if finite.size else 0.0
        return Tally(count, nan, count - int(finite.size) - nan, zero, largest, _norm(math.inf, largest, finite))


def row_norms(numbers: Any, row: int, part: slice) -> list[float]:
    """Return the norm of a `part` of each `row` numbers; NaN for one with a NaN or an infinity in it."""
    rows = numbers[: numbers.size // row * row].reshape(-1, row)[:, part]
    with np.errstate(all="ignore"):
        norms = np.sqrt((rows * rows).sum(-1))
    norms[~np.isfinite(norms)] = math.nan
    found: list[float] = norms.tolist()
    return found


def _norm(squares: float, largest: float, numbers: Any) -> float:
    if float(np.finfo(np.float64).tiny) < squares < math.inf or not largest:
        return math.sqrt(squares) if largest else 0.0
    scaled = numbers / largest
    return largest * math.sqrt(float(scaled @ scaled))
