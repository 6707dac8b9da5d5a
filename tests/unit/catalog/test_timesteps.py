"""Clocks that are set under a running daemon, or before it: graces and leases are as long as they were meant to be. F11"""

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from ckptd.catalog import Catalog, checkpoints, holds, timesteps
from ckptd.catalog.tombstones import graveyards
from tests.support.catalog import StillClock, experiment, opened, saved

STEPS = {"an hour back": -3600.0, "a day on": 86_400.0, "to 1970": -60 * 365.25 * 86_400}


async def ages_s(catalog: Catalog, clock: StillClock) -> list[float]:
    """How long the oldest tombstone of each experiment has stood, by the wall clock."""
    return [(clock.now() - one.since).total_seconds() for one in await catalog.read(graveyards)]


@pytest.mark.parametrize("step_s", STEPS.values(), ids=STEPS.keys())
async def test_a_clock_that_is_set_makes_no_grace_and_no_lease_longer_or_shorter(
    catalog: Catalog, clock: StillClock, step_s: float
) -> None:
    await catalog.follow_clock()
    known = await experiment(catalog)
    trashed, read = [await saved(catalog, known, step) for step in (1, 2)]
    await catalog.write(lambda tx: checkpoints.mark_trashed(tx, trashed.id, "t", "why"))
    await catalog.write(lambda tx: holds.lease(tx, read.id, "pid 1", 60))
    clock.pass_s(20)
    clock.step_wall_s(step_s)
    clock.pass_s(10)
    await catalog.follow_clock()
    assert await ages_s(catalog, clock) == [30.0]
    (held,) = await catalog.read(lambda conn: holds.of_checkpoint(conn, read.id, clock.now()))
    assert held.until == clock.now() + timedelta(seconds=30)
    clock.pass_s(31)
    await catalog.follow_clock()
    assert await ages_s(catalog, clock) == [61.0]
    assert await catalog.write(lambda tx: holds.expire(tx, clock.now())) == 1


async def test_a_clock_that_is_slewed_moves_nothing(catalog: Catalog, clock: StillClock) -> None:
    """Many small steps are what keeps a clock right; they are what time is."""
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    await catalog.write(lambda tx: checkpoints.mark_trashed(tx, one.id, "t", "why"))
    for _ in range(100):
        clock.step_wall_s(timesteps.STEP_S - 1)
        await catalog.follow_clock()
    assert await ages_s(catalog, clock) == [100 * (timesteps.STEP_S - 1)]


async def test_a_step_that_could_not_be_written_is_owed_until_it_is(
    catalog: Catalog, clock: StillClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in that moment must not make the trash a day older."""
    from ckptd.errors import NoSpace

    await catalog.follow_clock()
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    await catalog.write(lambda tx: checkpoints.mark_trashed(tx, one.id, "t", "why"))
    clock.step_wall_s(86_400)

    async def full(*_: object) -> None:
        raise NoSpace("no space")

    with monkeypatch.context() as broken:
        broken.setattr(timesteps, "shift", full)
        with pytest.raises(NoSpace):
            await catalog.follow_clock()
    clock.pass_s(5)
    await catalog.follow_clock()
    assert await ages_s(catalog, clock) == [5.0]


async def test_a_grace_from_the_future_begins_anew_with_the_next_daemon(tmp_path: Path) -> None:
    """The clock was ahead while no daemon looked: kept for one more grace, not for ever."""
    ahead = StillClock()
    async with opened(tmp_path / "c.sqlite", clock=ahead) as catalog:
        one = await saved(catalog, await experiment(catalog), 1)
        await catalog.write(lambda tx: checkpoints.mark_trashed(tx, one.id, "t", "why"))
    right = StillClock()
    right.wall = datetime(2029, 1, 1, tzinfo=right.wall.tzinfo)
    async with opened(tmp_path / "c.sqlite", clock=right) as catalog:
        await catalog.recover()
        right.pass_s(7)
        assert await ages_s(catalog, right) == [7.0]
