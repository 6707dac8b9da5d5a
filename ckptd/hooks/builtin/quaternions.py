"""Unit quaternions among the tensors of a checkpoint, or among its metrics."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ckptd.hooks.builtin.arithmetic import Arithmetic
from ckptd.hooks.builtin.plain import SIZES
from ckptd.hooks.builtin.tensors import Tensor, Tensors
from ckptd_client.quaternions import TOLERANCE, WIDTH, Quaternions, of_norms, tolerance_of

# By the end of a name: `quat_head.bias` has four numbers, too, and is no quaternion.
PATTERNS = ("*quaternion", "*quaternions", "*quat", "*quats", "*orientation", "*orientations", "*pose", "*poses")
POSE = 7  # a quaternion and a translation in one row
_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_PARTS = (("w", "x", "y", "z"), ("qw", "qx", "qy", "qz"), ("q0", "q1", "q2", "q3"))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which tensors are quaternions.

    patterns      shell patterns of names
    tolerance     of |q| - 1; more where the element type rounds more
    pose_offset   where the quaternion begins in a row of POSE numbers
    """

    patterns: tuple[str, ...] = PATTERNS
    tolerance: float = TOLERANCE
    pose_offset: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found, by tensor or metric; `skipped` fit a pattern and are no rows of quaternions."""

    found: Mapping[str, Quaternions]
    skipped: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def bad(self) -> dict[str, Quaternions]:
        """Those with anything wrong."""
        return {name: one for name, one in self.found.items() if not one.ok}

    @property
    def level(self) -> str:
        """Return "error" where one holds NaN or infinity, "warning" where one is not of unit length, else "info"."""
        bad = self.bad.values()
        return "error" if any(one.nan for one in bad) else "warning" if bad else "info"

    def text(self) -> str:
        """Say it in one line."""
        sample = f" (a sample of {self.share:.1%} was read)" if self.share < 1.0 else ""
        bad = self.bad
        if bad:
            name, worst = max(bad.items(), key=lambda item: (item[1].nan, item[1].nonunit))
            others = f"; {len(bad) - 1} more are bad" if len(bad) > 1 else ""
            return f"{name}: {worst}{others}{sample}"
        if not self.found:
            return "nothing here is named like quaternions"
        count = sum(one.total for one in self.found.values())
        return f"{count} unit quaternions in {len(self.found)}{sample}"

    def facts(self) -> dict[str, Any]:
        """Return JSON: every tensor's counts and norms."""
        return {
            "checked": {name: one._asdict() for name, one in self.found.items()},
            "skipped": list(self.skipped),
            "share": self.share,
        }


def of_tensors(tensors: Tensors, by: Arithmetic, wanted: Wanted, bytes_max: int = 0) -> Verdict:
    """Look at the tensors that fit a pattern. Blocks; InvalidFormat when a file ends early.

    bytes_max  read about so many bytes, in samples when there are more; 0: what `by` allows
    """
    named = [tensor for tensor in tensors.listed if _fits(tensor.key, wanted.patterns)]
    rows = [tensor for tensor in named if tensor.dtype in _TYPES and _row(tensor.shape)]
    limit = bytes_max or by.bytes_max
    size_bytes = sum(tensor.size_bytes for tensor in rows)
    share = 1.0 if size_bytes <= limit else limit / size_bytes
    found = {tensor.key: _of_one(tensors, tensor, by, wanted, share=share) for tensor in rows}
    skipped = tuple(tensor.key for tensor in named if tensor.key not in found)
    return Verdict(found, skipped, share=min(1.0, tensors.read_bytes / size_bytes) if size_bytes else 1.0)


def _of_one(tensors: Tensors, tensor: Tensor, by: Arithmetic, wanted: Wanted, *, share: float) -> Quaternions:
    row = tensor.shape[-1]
    first = wanted.pose_offset if row == POSE else 0
    tolerance = tolerance_of(_TYPES[tensor.dtype], wanted.tolerance)
    whole = Quaternions(tolerance=tolerance)
    for piece in tensors.pieces(tensor, share, row * SIZES[tensor.dtype]):
        norms = by.row_norms(by.decode(tensor.dtype, piece), row, slice(first, first + WIDTH))
        whole = whole.plus(of_norms(norms, tolerance))
    return whole


def of_metrics(metrics: Mapping[str, Any], tolerance: float = TOLERANCE) -> Verdict:
    """Look at metrics that are the four parts of one quaternion: pose.w, pose.x, pose.y, pose.z (also qw..., q0...).

    And at the counts that `ckptd_client.quaternions.Quaternions.metrics` logs.

    >>> of_metrics({"head/qw": 1.0, "head/qx": 0.0, "head/qy": 0.0, "head/qz": 0.5}).text()
    'head: of 1 quaternions 1 not of unit length (norms 1.11803 to 1.11803, tolerance 1e-06)'
    """
    numbers = {name: number for name, value in metrics.items() if (number := _number(value)) is not None}
    found = {
        name: of_norms([norm if math.isfinite(norm := math.hypot(*parts)) else math.nan], tolerance)
        for name, parts in _groups(numbers)
    }
    for name in numbers:
        stem, _, word = name.rpartition(".")
        if word == "nonunit" and f"{stem}.nan" in numbers:
            found[stem] = _counted(numbers, stem, tolerance)
    return Verdict(found)


def _counted(numbers: Mapping[str, float], stem: str, tolerance: float) -> Quaternions:
    """Return what a batch's own check counted; a count that can't be one is none."""
    return Quaternions(
        total=_whole(numbers.get(f"{stem}.total", 0.0)),
        nan=_whole(numbers.get(f"{stem}.nan", 0.0)),
        nonunit=_whole(numbers.get(f"{stem}.nonunit", 0.0)),
        near_zero=_whole(numbers.get(f"{stem}.near_zero", 0.0)),
        norm_min=numbers.get(f"{stem}.norm_min", 0.0),
        norm_max=numbers.get(f"{stem}.norm_max", 0.0),
        norm_mean=numbers.get(f"{stem}.norm_mean", 0.0),
        tolerance=tolerance,
    )


def _whole(number: float) -> int:
    return int(number) if math.isfinite(number) else 0


def _groups(numbers: Mapping[str, float]) -> Iterator[tuple[str, list[float]]]:
    for parts in _PARTS:
        first, *others = parts
        for name in numbers:
            stem = name.removesuffix(first)
            if stem != name and (not stem or stem[-1] in "._/-") and all(stem + part in numbers for part in others):
                yield stem.rstrip("._/-") or "metrics", [numbers[stem + part] for part in parts]


def _number(value: object) -> float | None:
    """Return a metric's value; non-finite ones travel as text."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in {"NaN", "Infinity", "-Infinity"} else None


def _row(shape: Sequence[int]) -> bool:
    return bool(shape) and shape[-1] in {WIDTH, POSE} and math.prod(shape) > 0


def _fits(key: str, patterns: Sequence[str]) -> bool:
    name = key.partition(":")[2] or key
    return any(fnmatchcase(key, pattern) or fnmatchcase(name, pattern) for pattern in patterns)
