"""Thresholds of metrics, and facts of the daemon itself: told once, and told whatever the catalog does."""

import math
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from ckptd.catalog import eventlog
from ckptd.catalog.metrics import Point
from ckptd.errors import Bug, Busy
from ckptd.events import Event
from ckptd.hookconfig import Threshold
from ckptd.intake import facts as module
from ckptd.intake.facts import Facts
from ckptd.intake.thresholds import Thresholds
from tests.support.catalog import StillClock, Told, experiment, opened
from tests.support.in_process import eventually

AT = datetime(2030, 1, 1, tzinfo=UTC)


class Watched:
    """One experiment whose points are looked at as MetricsBuffer does it."""

    def __init__(self, catalog: Any, told: Told, *rules: Threshold) -> None:
        self.catalog, self.told, self.clock = catalog, told, StillClock()
        settings = SimpleNamespace(thresholds=rules)
        self.thresholds = Thresholds(lambda: settings, self.clock)  # type: ignore[arg-type,return-value]

    async def log(self, *values: float, name: str = "loss", of: str = "") -> list[dict[str, Any]]:
        """Take points in; return what was told because of them."""
        before = len(self.told.events)
        of = of or self.of
        points = [Point(name, step, value, AT) for step, value in enumerate(values)]
        await self.catalog.write(lambda tx: self.thresholds.look(tx, of, points))
        return [dict(event.data) for event in self.told.events[before:]]

    async def begin(self, name: str = "run") -> "Watched":
        self.of = await experiment(self.catalog, name)
        return self


@pytest.fixture
async def watched(tmp_path):
    told = Told()
    async with opened(tmp_path / "c.sqlite", told) as catalog:

        async def begin(*rules: Threshold, name: str = "run") -> Watched:
            return await Watched(catalog, told, *rules).begin(name)

        yield begin


async def test_a_crossing_is_told_once_and_again_only_after_the_metric_was_within(watched):
    """M049."""
    metric = await watched(Threshold(metric="loss", above=10.0, again_s=0))
    assert await metric.log(1.0, 9.0) == []
    [told] = await metric.log(9.0, 11.0, 12.0)
    assert told == {
        "project": "demo", "name": "run", "step": 1, "metric": "loss", "value": 11.0, "count": 2, "above": 10.0, "below": None,
    }  # fmt: skip
    assert await metric.log(13.0) == []
    assert await metric.log(3.0) == []
    assert len(await metric.log(14.0)) == 1


async def test_a_metric_that_plays_about_its_limit_is_told_now_and_then_alone(watched):
    metric = await watched(Threshold(metric="loss", above=10.0, again_s=60))
    assert len(await metric.log(11.0)) == 1
    assert await metric.log(1.0, 11.0, 1.0) == []
    metric.clock.pass_s(61)
    assert len(await metric.log(11.0)) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_what_is_no_number_is_beyond_every_limit(watched, value):
    metric = await watched(Threshold(metric="loss", below=0.5))
    [told] = await metric.log(value)
    assert told["value"] in {"NaN", "Infinity", "-Infinity"}


async def test_a_limit_is_for_the_experiments_it_names(watched):
    metric = await watched(Threshold(metric="loss", above=1.0, name="other*"), Threshold(metric="acc", below=0.1))
    assert await metric.log(5.0) == []
    assert len(await metric.log(0.0, name="acc")) == 1


async def test_a_transaction_that_fails_has_told_nothing_and_is_told_by_the_next(watched):
    metric = await watched(Threshold(metric="loss", above=1.0))

    async def fails(tx) -> None:
        await metric.thresholds.look(tx, metric.of, [Point("loss", 1, 5.0, AT)])
        raise Busy("no")

    with pytest.raises(Busy):
        await metric.catalog.write(fails)
    assert len(await metric.log(5.0)) == 1


def test_a_threshold_without_a_limit_is_refused():
    with pytest.raises(ValueError, match="above or below"):
        Threshold(metric="loss")


async def test_facts_of_the_daemon_are_logged_and_where_they_can_not_be_they_are_told_all_the_same(
    tmp_path, monkeypatch
):
    told = Told()
    started = Event("daemon.started", AT, data={"pid": 1})
    async with opened(tmp_path / "c.sqlite", told) as catalog, anyio.create_task_group() as group:
        facts = Facts(catalog, told.publish)
        group.start_soon(facts.run)
        facts.tell(started)
        await eventually(lambda: told.names == ["daemon.started"])
        assert told.events[0].seq == 1

        async def refuses(_fn) -> None:
            raise Busy("no")

        with monkeypatch.context() as patch:
            patch.setattr(catalog, "write", refuses)
            facts.tell(started)
            await eventually(lambda: len(told.events) == 2)
        assert told.events[1].seq is None
        with pytest.raises(Bug):
            facts.tell(Event("daemon.exploded", AT))
        monkeypatch.setattr(module, "WAITING_MAX", 2)
        for _ in range(5):
            facts.tell(started)
        group.cancel_scope.cancel()
    assert len(told.events) == 7, "what waited at the end is committed last"


async def test_a_fact_that_is_told_as_the_daemon_ends_is_in_the_log_of_the_next(tmp_path):
    async with opened(tmp_path / "c.sqlite") as catalog, anyio.create_task_group() as group:
        facts = Facts(catalog, Told().publish)
        group.start_soon(facts.run)
        await anyio.lowlevel.checkpoint()
        facts.tell(Event("daemon.stopping", AT, data={"pid": 1}))
        group.cancel_scope.cancel()
    async with opened(tmp_path / "c.sqlite") as catalog:
        assert [one.event.name for one in await catalog.read(eventlog.newest)] == ["daemon.stopping"]
