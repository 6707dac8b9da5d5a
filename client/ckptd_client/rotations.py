"""Losses between rotations: which ones are known, and what their values may be.

    verdict = rotations.check("geodesic", loss)
    if not verdict.ok:
        print(verdict.problem, verdict.hints)

Needs the standard library only; of a tensor its one value is taken.
"""

import math
from typing import Any, Dict, NamedTuple, Optional, Tuple


class Loss(NamedTuple):
    """One loss: what it measures, the largest value an unweighted mean of it can have, other names for it."""

    meaning: str
    largest: float
    aliases: Tuple[str, ...] = ()


LOSSES: Dict[str, Loss] = {
    "geodesic": Loss("angle of the relative rotation, in radians", math.pi, ("angular", "so3", "riemannian")),
    "chordal": Loss("Frobenius norm of the difference of the matrices", 2 * math.sqrt(2), ("frobenius", "matrix")),
    "chordal_squared": Loss("square of the chordal distance", 8.0, ("frobenius_squared",)),
    "quaternion": Loss("1 - <p, q>^2, or 1 - |<p, q>|, of unit quaternions", 1.0, ("quat", "quaternion_dot")),
    "quaternion_l2": Loss("min(|p - q|, |p + q|) of unit quaternions", math.sqrt(2), ("quat_l2",)),
    "6d": Loss(
        "distance of the first two columns of the matrices", 2 * math.sqrt(2), ("rot6d", "six_d", "continuous_6d")
    ),
    "euler": Loss("difference of the angles, each wrapped to [-pi, pi]", math.pi, ("euler_angles", "rpy")),
    "axis_angle": Loss("distance of the rotation vectors", 2 * math.pi, ("rotvec", "rotation_vector", "so3_log")),
}
_NAMES = {alias: name for name, loss in LOSSES.items() for alias in (name, *loss.aliases)}
_WORDS = frozenset({"loss", "rotation", "rot", "train", "val", "valid", "validation", "test", "eval", "mean", "avg"})

NONFINITE_HINTS = (
    "normalise predictions before the loss: |q| near 0 has no direction",
    "clamp what goes into acos or asin to [-1 + eps, 1 - eps]: their gradients are infinite at the ends",
    "lower the learning rate, or clip gradients",
    "compute the loss in single precision where the model runs in half",
)


class Verdict(NamedTuple):
    """What a value of a rotation loss says. `level`: "ok", "warning" (implausible) or "error" (NaN, infinity)."""

    level: str
    loss: Optional[str]
    problem: str = ""
    hints: Tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing is wrong with it."""
        return self.level == "ok"


def known(name: str) -> Optional[str]:
    """Return which of LOSSES a metric's or a setting's name means; None when it names none of them.

    >>> known("val/geodesic_loss"), known("loss_rot6d"), known("cross_entropy")
    ('geodesic', '6d', None)
    """
    plain = name.strip().lower()
    for mark in "/.:- ":
        plain = plain.replace(mark, "_")
    if plain in _NAMES:
        return _NAMES[plain]
    return _NAMES.get("_".join(word for word in plain.split("_") if word and word not in _WORDS))


def check(name: str, value: Any) -> Verdict:
    """Judge one value of the loss `name`: a number, or a tensor or array of one element. Never raises for the value.

    A value above what an unweighted mean can reach, or below 0, is a warning: it is weighted, or in other units.
    """
    loss = known(name)
    if loss is None:
        supported = ", ".join(LOSSES)
        return Verdict("warning", None, f"{name!r} is no known rotation loss; known are {supported}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return Verdict("error", loss, f"{name} is {type(value).__name__}, not one number")
    if not math.isfinite(number):
        return Verdict("error", loss, f"{name} is {number}", NONFINITE_HINTS)
    if number < 0:
        return Verdict("warning", loss, f"{name} is {number:.6g}: a distance is never below 0")
    largest = LOSSES[loss].largest
    if number > largest * (1 + 1e-6):
        degrees = " It may be in degrees." if loss in {"geodesic", "euler", "axis_angle"} else ""
        return Verdict(
            "warning", loss, f"{name} is {number:.6g}, its unweighted mean is {largest:.6g} at most.{degrees}"
        )
    return Verdict("ok", loss)
