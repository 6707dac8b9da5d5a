"""Are these unit quaternions? For batches in a training loop, and for tensors in a checkpoint.

    found = quaternions.check(poses)              # a tensor, an array or nested lists whose last dimension is 4
    run.log(found.metrics("poses"), step=step)    # poses.nonunit, poses.nan, ...
    if not found.ok:
        print(found)

Needs the standard library only; tensors and arrays are reduced where they are, by the library they come from.
"""

import math
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence

WIDTH = 4
TOLERANCE = 1e-6  # of |q| - 1 in single and double precision
NEAR_ZERO = 1e-8  # a norm below this has no direction: dividing by it would invent a rotation
EPSILONS = 8  # roundings of the element type that normalising may leave behind
_DEPTH_MAX = 16
# What rounding to the type costs, by the last part of torch's and numpy's names of it.
_EPSILON = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}


class Quaternions(NamedTuple):
    """What a batch of quaternions looks like. Norms are of the finite ones; 0.0 where there is none.

    total      how many there are
    nan        with a NaN or an infinity in them
    nonunit    finite, and |q| further from 1 than `tolerance`
    near_zero  of those: without a direction
    """

    total: int = 0
    nan: int = 0
    nonunit: int = 0
    near_zero: int = 0
    norm_min: float = 0.0
    norm_max: float = 0.0
    norm_mean: float = 0.0
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """All of them are unit quaternions."""
        return self.nan == 0 and self.nonunit == 0

    def metrics(self, name: str) -> Dict[str, float]:
        """Return the counts and norms as metrics below `name`, for `run.log`."""
        words = ("total", "nan", "nonunit", "near_zero", "norm_min", "norm_max", "norm_mean")
        return {f"{name}.{word}": float(getattr(self, word)) for word in words}

    def plus(self, other: "Quaternions") -> "Quaternions":
        """Return what both batches together look like; the wider tolerance is named."""
        finite, others = self.total - self.nan, other.total - other.nan
        if not finite or not others:
            known = self if finite else other
            norms = known.norm_min, known.norm_max, known.norm_mean
        else:
            share = finite / (finite + others)
            mean = self.norm_mean * share + other.norm_mean * (1 - share)
            norms = min(self.norm_min, other.norm_min), max(self.norm_max, other.norm_max), mean
        return Quaternions(
            self.total + other.total,
            self.nan + other.nan,
            self.nonunit + other.nonunit,
            self.near_zero + other.near_zero,
            *norms,
            max(self.tolerance, other.tolerance),
        )

    def __str__(self) -> str:
        """Say it in one line."""
        if self.ok:
            return f"{self.total} unit quaternions"
        parts = [f"{self.nan} with NaN or infinity"] if self.nan else []
        if self.nonunit:
            zero = f", {self.near_zero} of them near zero" if self.near_zero else ""
            norms = f"norms {self.norm_min:.6g} to {self.norm_max:.6g}"
            parts.append(f"{self.nonunit} not of unit length ({norms}, tolerance {self.tolerance:.2g}{zero})")
        return f"of {self.total} quaternions " + " and ".join(parts)


def tolerance_of(dtype: object, tolerance: float = TOLERANCE) -> float:
    """Return `tolerance`, or what rounding to an element type of that name leaves, whichever is more."""
    return max(tolerance, EPSILONS * _EPSILON.get(str(dtype).rpartition(".")[2], 0.0))


def check(batch: Any, tolerance: Optional[float] = None) -> Quaternions:
    """Look at every quaternion of a batch: a torch tensor, a numpy array, or nested sequences of numbers.

    tolerance  of |q| - 1; None: TOLERANCE, more for half precision

    Waits for the device that a tensor is on. ValueError when the last dimension is not 4.
    """
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        return _of_array(batch, tolerance_of(batch.dtype) if tolerance is None else tolerance)
    return of_norms([math.hypot(*row) for row in _rows(batch, 0)], TOLERANCE if tolerance is None else tolerance)


def of_norms(norms: Sequence[float], tolerance: float = TOLERANCE) -> Quaternions:
    """Judge quaternions whose norms are known; NaN and infinity stand for one that holds such a number."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    return Quaternions(
        total=len(norms),
        nan=len(norms) - len(finite),
        nonunit=sum(abs(norm - 1.0) > tolerance for norm in finite),
        near_zero=sum(norm < NEAR_ZERO for norm in finite),
        norm_min=min(finite, default=0.0),
        norm_max=max(finite, default=0.0),
        norm_mean=math.fsum(norm / len(finite) for norm in finite),  # each share first: no sum overflows
        tolerance=tolerance,
    )


def _of_array(batch: Any, tolerance: float) -> Quaternions:
    """Reduce a tensor or an array; the operators used here mean the same in torch and numpy."""
    if not batch.shape or batch.shape[-1] != WIDTH:
        message = f"a batch of shape {tuple(batch.shape)}: the last dimension must be {WIDTH}"
        raise ValueError(message)
    wide = _wide(batch)
    norms = ((wide * wide).sum(-1) ** 0.5).reshape(-1)
    finite = (norms - norms) == 0
    good = norms[finite]
    count = len(norms)
    if not len(good):
        return Quaternions(total=count, nan=count, tolerance=tolerance)
    return Quaternions(
        total=count,
        nan=count - len(good),
        nonunit=int((abs(good - 1.0) > tolerance).sum()),
        near_zero=int((good < NEAR_ZERO).sum()),
        norm_min=float(good.min()),
        norm_max=float(good.max()),
        norm_mean=float(good.mean()),
        tolerance=tolerance,
    )


def _wide(batch: Any) -> Any:
    """Return it in double precision, in single where a device has no double, without its gradient."""
    if not hasattr(batch, "detach"):
        return batch.astype("float64")
    plain = batch.detach()
    return plain.float() if plain.device.type == "mps" else plain.double()


def _rows(batch: Any, depth: int) -> Iterator[Sequence[float]]:
    if not isinstance(batch, (list, tuple)) or depth > _DEPTH_MAX:
        message = f"{type(batch).__name__} in place of quaternions: give a tensor, an array or nested lists"
        raise ValueError(message)
    if all(isinstance(item, (int, float)) for item in batch) and batch:
        if len(batch) != WIDTH:
            message = f"{len(batch)} numbers in a row: a quaternion has {WIDTH}"
            raise ValueError(message)
        yield batch
        return
    for item in batch:
        yield from _rows(item, depth + 1)
