"""Hooks that open published checkpoints: numeric health, and unit quaternions. They run in a child host.

Each is thin: find the file, read, ask the pure module, answer with a finding.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ckptd.errors import CkptdError
from ckptd.hooks.builtin import health, quaternions
from ckptd.hooks.builtin.arithmetic import Arithmetic, Figures, arithmetic, figures
from ckptd.hooks.builtin.neighbour import path_before
from ckptd.hooks.builtin.tensors import opened
from ckptd.hooks.context import Context
from ckptd.hooks.declaration import BaseHook
from ckptd.hooks.result import Finding, Level
from ckptd.section import parse_size
from ckptd_client.quaternions import TOLERANCE, WIDTH

REMEMBERED_MAX = 64  # checkpoints whose figures one host keeps; each some 100 bytes a tensor


def bytes_of(size: int | str) -> int:
    """Return bytes of a size as the configuration writes it. ValueError for what is none."""
    found = parse_size(size)
    if not isinstance(found, int) or found < 0:
        message = f"bytes_max = {size!r} is no size"
        raise ValueError(message)
    return found


class NumericHealth(BaseHook):
    """Looks for NaN, infinity, exploding and dead tensors, and for norms that jumped since the checkpoint before."""

    def __init__(self, *, bytes_max: int | str = 0, **limits: Any) -> None:
        """Take the limits (health.Limits) and how many bytes may be read, 0 for what the arithmetic allows."""
        super().__init__()
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in limits.items()
        }
        self._limits = health.Limits(**given)
        self._bytes_max = bytes_of(bytes_max)
        self._known: OrderedDict[tuple[str, str], Figures] = OrderedDict()

    def execute(self, context: Context) -> Finding | None:
        """Read the checkpoint and judge it."""
        path = context.data.get("path")
        if not isinstance(path, str) or not path:
            return None
        by = arithmetic()
        try:
            now = self._figures(path, by)
        except FileNotFoundError:
            return None  # retired before its turn came
        except CkptdError as error:
            return Finding(Level.ERROR, f"its numbers can't be read: {error.message}", {"error": error.to_wire()})
        now = _at_step(now, context.data.get("step"))
        if not now.tallies:
            return Finding(Level.INFO, "it holds no floating-point tensors that can be read", {"unread": now.unread})
        verdict = health.judge(now, self._previous(context, path, now, by), self._limits)
        self._remember((context.experiment_id, context.checkpoint_id), now)
        return Finding(Level(verdict.level), verdict.text(), verdict.facts())

    def _figures(self, path: str, by: Arithmetic) -> Figures:
        with opened(path) as tensors:
            return figures(tensors, by, self._bytes_max)

    def _previous(self, context: Context, path: str, now: Figures, by: Arithmetic) -> Figures | None:
        """Return the figures of the checkpoint before: remembered, or from its file; None when it can't be had."""
        for (experiment, checkpoint), known in reversed(self._known.items()):
            earlier = known.step is None or now.step is None or known.step < now.step
            if experiment == context.experiment_id and checkpoint != context.checkpoint_id and earlier:
                return known
        try:
            other = path_before(path)
            return None if other is None else self._figures(other, by)
        except (OSError, CkptdError):
            return None  # retired or damaged; it has findings of its own, and this one is judged without it

    def _remember(self, key: tuple[str, str], known: Figures) -> None:
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > REMEMBERED_MAX:
            self._known.popitem(last=False)


def _at_step(found: Figures, step: object) -> Figures:
    return replace(found, step=step) if type(step) is int else found


class QuaternionValidation(BaseHook):
    """Counts quaternions that are not of unit length or hold a NaN, in tensors named by pattern and in metrics."""

    def __init__(
        self,
        *,
        tensors: Iterable[str] = quaternions.PATTERNS,
        tolerance: float = TOLERANCE,
        pose_offset: int = 0,
        bytes_max: int | str = 0,
    ) -> None:
        """Take the names (quaternions.Wanted) and how many bytes may be read, 0 for what the arithmetic allows."""
        super().__init__()
        if tolerance <= 0 or not 0 <= pose_offset <= quaternions.POSE - WIDTH:
            message = f"tolerance must be above 0, pose_offset 0 to {quaternions.POSE - WIDTH}"
            raise ValueError(message)
        self._wanted = quaternions.Wanted(tuple(tensors), float(tolerance), int(pose_offset))
        self._bytes_max = bytes_of(bytes_max)

    def execute(self, context: Context) -> list[Finding]:
        """Look at the metrics, and at the file where there is one. Nothing named like quaternions is no finding."""
        verdicts = [quaternions.of_metrics(context.data.get("metrics") or {}, self._wanted.tolerance)]
        path = context.data.get("path")
        if isinstance(path, str) and path:
            try:
                verdicts += self._of_file(path)
            except CkptdError as error:
                return [Finding(Level.ERROR, f"its tensors can't be read: {error.message}", {"error": error.to_wire()})]
        return [
            Finding(Level(verdict.level), verdict.text(), verdict.facts())
            for verdict in verdicts
            if verdict.found or verdict.skipped
        ]

    def _of_file(self, path: str) -> list[quaternions.Verdict]:
        try:
            with opened(path) as tensors:
                return [quaternions.of_tensors(tensors, arithmetic(), self._wanted, self._bytes_max)]
        except FileNotFoundError:
            return []  # retired before its turn came; its metrics are known nevertheless
