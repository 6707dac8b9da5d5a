"""Hooks that look at what an event says, and nothing else: rotation losses, recovery, silent experiments, notices for people.

They are awaited in the daemon's process, so they read no file and compute for microseconds.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ckptd.clock import SystemClock
from ckptd.hooks.builtin import rotations
from ckptd.hooks.builtin.notification import STANDARD, Notices, describe, quiet_from, rule_from
from ckptd.hooks.context import Context
from ckptd.hooks.declaration import BaseHook
from ckptd.hooks.points import HookEvent
from ckptd.hooks.result import Finding, Level
from ckptd_client.rotations import LOSSES, known


class RotationLoss(BaseHook):
    """Finds rotation losses among a checkpoint's metrics that are NaN, infinite or implausible."""

    def __init__(self, *, metrics: Iterable[str] = (), loss: str = "") -> None:
        """Take patterns of further metrics to judge, and the loss that is used. ValueError for one that is not known."""
        super().__init__()
        if loss and known(loss) is None:
            message = f"loss = {loss!r} is no known rotation loss; known are {', '.join(LOSSES)}"
            raise ValueError(message)
        self._named = tuple(metrics)

    def execute(self, context: Context) -> list[Finding]:
        """Judge the metrics of the checkpoint."""
        judged = rotations.judge(context.data.get("metrics") or {}, self._named)
        return [
            Finding(
                Level(one.verdict.level),
                one.verdict.problem,
                {"metric": one.metric, "loss": one.verdict.loss, "hints": list(one.verdict.hints)},
            )
            for one in judged
            if not one.verdict.ok
        ]


class Recovery(BaseHook):
    """Stores with an experiment that failed or was lost how to go on: the last good checkpoint and the command."""

    def execute(self, context: Context) -> Finding | None:
        """Put what the event says into a finding."""
        found = context.data.get("recovery")
        if not isinstance(found, Mapping):
            return None
        good = found.get("checkpoint")
        parts = [
            f"last good checkpoint: step {good['step']}, {good['path']}" if good else "it has no verified checkpoint",
            f"resume with: {found['command']}" if found.get("command") else "",
        ]
        return Finding(Level.WARNING, "; ".join(part for part in parts if part), dict(found))


class Silence(BaseHook):
    """Marks experiments that fell silent, died, or failed, so that a sweep's dead are found among its findings."""

    def execute(self, context: Context) -> Finding:
        """Say which one, and where it was."""
        keys = ("project", "name", "step", "quiet_s", "tags", "parent")
        level = Level.WARNING if context.event == HookEvent.EXPERIMENT_STALLED else Level.ERROR
        facts = {key: context.data[key] for key in keys if context.data.get(key) is not None}
        return Finding(level, describe(context), facts)


class Notify(BaseHook):
    """Turns events into notices for people by rules, at a bounded rate, and keeps quiet at night."""

    def __init__(
        self,
        *,
        rules: Mapping[str, Mapping[str, Any]] | None = None,
        only: Iterable[str] = (),
        quiet: str = "",
        quiet_errors: bool = False,
    ) -> None:
        """Take rules by name beside or over notification.STANDARD, which of them to use, and hours of quiet ("22:00-07:00").

        ValueError says what is wrong with them.
        """
        super().__init__()
        given = {name: rule_from(name, table) for name, table in (rules or {}).items()}
        every = {rule.name: rule for rule in STANDARD} | given
        wanted = tuple(only) or tuple(every)
        if unknown := sorted(set(wanted) - every.keys()):
            message = f"only = {unknown}: there are no such rules; there are {sorted(every)}"
            raise ValueError(message)
        hours = quiet_from(quiet, errors=quiet_errors) if quiet else None
        self._notices = Notices([every[name] for name in wanted], hours)
        self._clock = SystemClock()

    def execute(self, context: Context) -> list[Finding]:
        """Return the notices of this moment as findings."""
        if "notice" in (context.data.get("facts") or {}):
            return []  # a notice about a notice would never end
        notices = self._notices.see(context, self._clock.now().astimezone(), self._clock.monotonic_s())
        about = {key: context.data[key] for key in ("project", "name", "step") if context.data.get(key) is not None}
        return [
            Finding(
                notice.severity,
                notice.text,
                {"notice": notice.rule, "held_back": notice.held_back, "event": context.event, **about},
            )
            for notice in notices
        ]
