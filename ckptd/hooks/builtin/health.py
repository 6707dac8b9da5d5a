"""Are a checkpoint's numbers sound? Pure: figures in, problems out.

What a tensor was like in the checkpoint before decides what is worth a word: a mask of infinities that
was there before, or a bias that has always been zero, is how the model is made.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ckptd.hooks.builtin.arithmetic import Figures
from ckptd.hooks.builtin.plain import LARGEST, Tally

NAMED_MAX = 20  # problems that a finding lists; all are counted
ORDER = ("nan", "inf", "exploding", "dead", "norm")
GRAVE = frozenset({"nan", "inf"})


@dataclass(frozen=True, slots=True)
class Limits:
    """What counts as unsound.

    exploding    an absolute value above this; in half and 8-bit types above half of what the type holds
    norm_factor  a tensor's norm grew or shrank by more than this factor since the checkpoint before
    elements_min smaller tensors are looked at for NaN and infinity only: counters and scales have their own ways
    ignore       shell patterns of tensors that are not judged
    unsteady     patterns of those whose norm may jump: moments of an optimizer do when training begins
    """

    exploding: float = 1e6
    norm_factor: float = 10.0
    elements_min: int = 16
    ignore: tuple[str, ...] = ()
    unsteady: tuple[str, ...] = ("optimizer*", "*exp_avg*", "*momentum_buffer*")

    def __post_init__(self) -> None:
        """Raise ValueError for limits that nothing could meet."""
        if self.exploding <= 0 or self.norm_factor <= 1 or self.elements_min < 1:
            message = "exploding must be above 0, norm_factor above 1, elements_min at least 1"
            raise ValueError(message)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one tensor. `steady`: it was the same in the checkpoint before."""

    kind: str  # one of ORDER
    tensor: str
    text: str
    steady: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """All problems, gravest first; `norm` is of all tensors together, `tensors` is how many were judged."""

    problems: tuple[Problem, ...]
    tensors: int
    elements: int
    norm: float
    figures: Figures
    previous_step: int | None = None

    @property
    def level(self) -> str:
        """Return "error" for new NaN or infinity, "warning" for anything else that is new or for NaN, else "info".

        A mask is made of infinities; nothing is made of NaN, so they never pass for sound.
        """
        fresh = {problem.kind for problem in self.problems if not problem.steady}
        ill = fresh or any(problem.kind == "nan" for problem in self.problems)
        return "error" if fresh & GRAVE else "warning" if ill else "info"

    def text(self) -> str:
        """Say it in one line."""
        seen = f"{self.tensors} tensors, {self.elements} numbers"
        if self.figures.share < 1.0:
            seen += f"; a sample of {self.figures.share:.1%} was read"
        if self.figures.unread:
            seen += f"; {self.figures.unread} tensors were not read"
        fresh = [problem for problem in self.problems if not problem.steady]
        # Zeros are how biases and adapters begin; what else stays as it was is said, though it is no news.
        old = [problem for problem in self.problems if problem.steady and problem.kind != "dead"]
        told = fresh or old
        if not told:
            return f"numbers are sound ({seen})"
        counts = ", ".join(f"{count} {kind}" for kind in ORDER if (count := sum(one.kind == kind for one in told)))
        still = "" if fresh else f"as in step {self.previous_step}: "
        return f"{still}{counts}: {told[0].tensor}: {told[0].text} ({seen})"

    def facts(self) -> dict[str, Any]:
        """Return JSON: counts by kind, the first NAMED_MAX problems, what was read."""
        return {
            "problems": {kind: sum(one.kind == kind for one in self.problems) for kind in ORDER},
            "named": [
                {"kind": one.kind, "tensor": one.tensor, "text": one.text, "steady": one.steady}
                for one in self.problems[:NAMED_MAX]
            ],
            "tensors": self.tensors,
            "elements": self.elements,
            "norm": self.norm if math.isfinite(self.norm) else str(self.norm),
            "share": self.figures.share,
            "unread": self.figures.unread,
            "read_bytes": self.figures.read_bytes,
            "computed_by": self.figures.by,
            "previous_step": self.previous_step,
        }


def judge(now: Figures, previous: Figures | None, limits: Limits) -> Verdict:
    """Compare a checkpoint's figures with the limits and with those of the checkpoint before, if there is one."""
    judged = {key: tally for key, tally in now.tallies.items() if not _matches(key, limits.ignore)}
    problems: list[Problem] = []
    for key, tally in judged.items():
        before = _before(key, now, previous)
        problems += _of_one(key, tally, before, now.dtypes[key], limits)
        comparable = before is not None and not _matches(key, limits.unsteady)
        if comparable and tally.elements >= limits.elements_min:
            problems += _jump(key, tally, before, limits)
    problems.sort(key=lambda one: (one.steady, ORDER.index(one.kind), one.tensor))
    return Verdict(
        problems=tuple(problems),
        tensors=len(judged),
        elements=sum(tally.elements for tally in judged.values()),
        norm=math.hypot(*(tally.norm for tally in judged.values())),
        figures=now,
        previous_step=None if previous is None else previous.step,
    )


def _of_one(key: str, tally: Tally, before: Tally | None, dtype: str, limits: Limits) -> Iterable[Problem]:
    if tally.nan:
        yield Problem("nan", key, f"{tally.nan} of {tally.elements} are NaN", _same(tally, before, "nan"))
    if tally.inf:
        yield Problem("inf", key, f"{tally.inf} of {tally.elements} are infinite", _same(tally, before, "inf"))
    if tally.elements < limits.elements_min:
        return
    if tally.zero == tally.elements:
        alive = before is not None and before.zero < before.elements
        text = "all zero, and was not in the checkpoint before" if alive else "all zero"
        # Without a checkpoint before, zeros are how biases and adapters begin: said, and no alarm.
        yield Problem("dead", key, text, steady=not alive)
    largest = min(limits.exploding, LARGEST.get(dtype, math.inf) / 2)
    if tally.largest > largest:
        text = f"holds {tally.largest:.4g}, more than {largest:.4g}"
        yield Problem("exploding", key, text, _same(tally, before, "largest"))


def _jump(key: str, tally: Tally, before: Tally | None, limits: Limits) -> Iterable[Problem]:
    """Say that a norm changed too much; one that was or became 0 is none that jumped."""
    if before is None or not before.norm or not tally.norm or tally.nan or tally.inf or before.nan or before.inf:
        return
    factor = tally.norm / before.norm
    if not 1 / limits.norm_factor <= factor <= limits.norm_factor:
        yield Problem("norm", key, f"norm went from {before.norm:.4g} to {tally.norm:.4g}")


def _before(key: str, now: Figures, previous: Figures | None) -> Tally | None:
    """Return the tensor's figures in the checkpoint before; None when it was not there or had another shape."""
    if previous is None or previous.shapes.get(key) != now.shapes[key]:
        return None
    return previous.tallies.get(key)


def _same(tally: Tally, before: Tally | None, field: str) -> bool:
    return before is not None and getattr(tally, field) == getattr(before, field)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    """Say whether a pattern fits the key, or the name after the file's."""
    name = key.partition(":")[2] or key
    return any(fnmatchcase(key, pattern) or fnmatchcase(name, pattern) for pattern in patterns)
