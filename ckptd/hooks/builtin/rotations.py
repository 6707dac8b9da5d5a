"""Rotation losses among a checkpoint's metrics: which are known, and which are broken. Pure."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from ckptd_client import rotations


class Judged(NamedTuple):
    """What one metric says."""

    metric: str
    verdict: rotations.Verdict


def judge(metrics: Mapping[str, Any], named: Sequence[str] = ()) -> list[Judged]:
    """Return a verdict for each metric that is a rotation loss, worst first.

    named  shell patterns; such a metric is judged even if its name says no known loss: a NaN is one whatever it is called
    """
    found = []
    for metric, value in metrics.items():
        wanted = any(fnmatchcase(metric, pattern) for pattern in named)
        if rotations.known(metric) is not None:
            found.append(Judged(metric, rotations.check(metric, value)))
        elif wanted:
            found.append(Judged(metric, _unnamed(metric, value)))
    order = ("error", "warning", "ok")
    return sorted(found, key=lambda one: (order.index(one.verdict.level), one.metric))


def _unnamed(metric: str, value: Any) -> rotations.Verdict:
    """Judge a loss of a kind of its own: only NaN and infinity are wrong for sure."""
    verdict = rotations.check("geodesic", value)
    if verdict.level != "error":
        return rotations.Verdict("ok", None)
    return verdict._replace(loss=None, problem=verdict.problem.replace("geodesic", metric, 1))
