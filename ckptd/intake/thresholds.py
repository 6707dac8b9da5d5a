"""Metrics against the limits of [[thresholds]]: told once when a series goes beyond, again only after it was within.

Looked at in the transaction that commits the points, so that the event and the points are there together.
What is beyond is remembered in memory alone: a daemon that starts anew tells once more.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ckptd.catalog import experiments
from ckptd.catalog.metrics import Point
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.config import Settings
from ckptd.hookconfig import Threshold
from ckptd_client.wire import number

KNOWN_MAX = 10_000  # series whose state is remembered; the longest untouched is forgotten

_Key = tuple[str, Threshold]


@dataclass(frozen=True, slots=True)
class _Series:
    """Whether a series is beyond its limit, and when that was last told (monotonic)."""

    beyond: bool = False
    told_s: float = -math.inf


class Thresholds:
    """What of the configured limits is passed."""

    def __init__(self, settings: Callable[[], Settings], clock: Clock) -> None:
        """Know nothing to be beyond its limit."""
        self._settings = settings
        self._clock = clock
        self._series: OrderedDict[_Key, _Series] = OrderedDict()

    async def look(self, tx: Tx, experiment_id: str, points: Sequence[Point]) -> None:
        """Tell what these points pass. NotFound for an experiment that is not there."""
        rules = self._settings().thresholds
        named = {point.name for point in points} if rules else set()
        rules = tuple(rule for rule in rules if rule.metric in named)
        if not rules:
            return
        about = await experiments.get(tx.conn, experiment_id)
        after: dict[_Key, _Series] = {}
        for rule in rules:
            if fnmatchcase(about.project, rule.project) and fnmatchcase(about.name, rule.name):
                key = (experiment_id, rule)
                after[key], told = self._judge(rule, self._series.get(key, _Series()), points)
                if told is not None:
                    data = {"project": about.project, "name": about.name, **told}
                    tx.tell("metric.crossed", data, experiment=experiment_id)
        tx.after(lambda: self._keep(after))  # a transaction may be tried twice: its state holds from its commit on

    def _judge(
        self, rule: Threshold, series: _Series, points: Sequence[Point]
    ) -> tuple[_Series, dict[str, Any] | None]:
        now_s = self._clock.monotonic_s()
        first: Point | None = None
        beyond, count = series.beyond, 0
        for point in points:
            if point.name == rule.metric:
                was, beyond = beyond, _is_beyond(rule, point.value)
                count += beyond
                first = point if beyond and not was and first is None else first
        if first is None or now_s - series.told_s < rule.again_s:
            return _Series(beyond, series.told_s), None
        told = {"step": first.step, "metric": rule.metric, "value": number(first.value), "count": count}
        return _Series(beyond, now_s), {**told, "above": rule.above, "below": rule.below}

    def _keep(self, after: dict[_Key, _Series]) -> None:
        for key, series in after.items():
            self._series[key] = series
            self._series.move_to_end(key)
        while len(self._series) > KNOWN_MAX:
            self._series.popitem(last=False)


def _is_beyond(rule: Threshold, value: float) -> bool:
    if not math.isfinite(value):
        return True
    return (rule.above is not None and value > rule.above) or (rule.below is not None and value < rule.below)
