"""A clock that is set between two looks, in the middle of a commit, or before this machine knew the time. F11

Each time in the catalog is of the clock as it was when all of them were last moved, whoever wrote it and when.
"""

import errno
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import insert, select

from ckptd.catalog import Catalog, cached, checkpoints, holds, queue, schema, striptable, timesteps, writer
from ckptd.catalog.columns import Utc
from ckptd.catalog.readholds import READ_LEASE_S
from ckptd.catalog.strips import StripState
from ckptd.catalog.tombstones import graveyards
from ckptd.catalog.tx import Tx
from ckptd.errors import CatalogFault
from ckptd.pipeline.filecache import HOLD_S
from tests.support.catalog import StillClock, experiment, opened, saved

DAY_S = 86_400.0
STEPS = pytest.mark.parametrize("step_s", [-2 * DAY_S, DAY_S], ids=["back", "on"])

# Times that nothing moves: shown only, or measured by another clock (the module says why).
LEFT_ALONE = {
    "audit.at", "best.decided_at", "cached.fetched_at", "cached.used_at", "checkpoint.checked_at",
    "checkpoint.created_at", "checkpoint.dropped_at", "checkpoint.durable_at", "checkpoint.staged_at",
    "checkpoint.verified_at", "copy.checked_at", "copy.copied_at", "event.at", "experiment.closed_at",
    "experiment.created_at", "finding.at", "hook.added_at", "hook.last_at", "hook_run.at", "job.lease_until",
    "job.not_before", "metric.at", "metric_summary.last_at", "pin.pinned_at", "root.added_at", "root.reconciled_at",
    "segment.opened_at",
}  # fmt: skip


async def trash(tx: Tx, checkpoint_id: str) -> None:
    await checkpoints.mark_trashed(tx, checkpoint_id, checkpoint_id, "why")


async def ages_s(catalog: Catalog, clock: StillClock) -> list[float]:
    """How long the oldest tombstone of each experiment has stood, by the wall clock."""
    return [(clock.now() - one.since).total_seconds() for one in await catalog.read(graveyards)]


async def held_s(catalog: Catalog, clock: StillClock, checkpoint_id: str) -> list[float]:
    """For how long each reader of a checkpoint still holds it."""
    long_ago = datetime(1900, 1, 1, tzinfo=UTC)
    found = await catalog.read(lambda conn: holds.of_checkpoint(conn, checkpoint_id, long_ago))
    return [(hold.until - clock.now()).total_seconds() for hold in found if hold.until is not None]


@STEPS
async def test_what_is_retired_or_read_after_a_step_that_nobody_saw_yet_has_its_whole_time(
    catalog: Catalog, clock: StillClock, step_s: float
) -> None:
    """Whoever writes first after a step accounts for it; upkeep looks only every few seconds."""
    await catalog.follow_clock()
    known = await experiment(catalog)
    before, after, read = [await saved(catalog, known, step) for step in (1, 2, 3)]
    await catalog.write(lambda tx: trash(tx, before.id))
    clock.pass_s(5)
    clock.step_wall_s(step_s)
    await catalog.write(lambda tx: holds.lease(tx, read.id, "pid 1", 60))
    await catalog.write(lambda tx: trash(tx, after.id))
    await catalog.follow_clock()
    assert await held_s(catalog, clock, read.id) == [60.0]
    rows = [await catalog.read(lambda conn, of=one.id: checkpoints.get(conn, of)) for one in (before, after)]  # type: ignore[misc]
    assert [(clock.now() - row.trashed_at).total_seconds() for row in rows] == [5.0, 0.0]


@STEPS
async def test_a_step_in_the_middle_of_a_transaction_moves_what_that_one_stamps(
    catalog: Catalog, clock: StillClock, step_s: float
) -> None:
    """Another look in that moment, from a task that only reads, changes nothing of it."""
    await catalog.follow_clock()
    one = await saved(catalog, await experiment(catalog), 1)
    begun, seen = anyio.Event(), anyio.Event()

    async def slowly(tx: Tx) -> None:
        begun.set()
        await seen.wait()
        await trash(tx, one.id)

    async def look() -> None:
        await begun.wait()
        clock.step_wall_s(step_s)
        group.start_soon(catalog.follow_clock)
        await anyio.wait_all_tasks_blocked()
        seen.set()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(catalog.write, slowly)
            group.start_soon(look)
    assert await ages_s(catalog, clock) == [0.0]


async def test_writers_that_share_a_commit_share_one_step_and_one_that_fails_takes_it_from_none(
    catalog: Catalog, clock: StillClock
) -> None:
    await catalog.follow_clock()
    known = await experiment(catalog)
    first, second = [await saved(catalog, known, step) for step in (1, 2)]
    await catalog.write(lambda tx: trash(tx, first.id))
    gate = anyio.Event()

    async def slow(_: Tx) -> None:
        await gate.wait()

    async def fails(tx: Tx) -> None:
        await trash(tx, second.id)
        raise ValueError("no")

    async def fail() -> None:
        with pytest.raises(ValueError, match="no"):
            await catalog.write(fails)

    async with anyio.create_task_group() as group:
        group.start_soon(catalog.write, slow)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(fail)
        group.start_soon(catalog.write, lambda tx: holds.lease(tx, second.id, "pid 1", 60))
        await anyio.wait_all_tasks_blocked()
        clock.pass_s(7)
        clock.step_wall_s(-DAY_S)
        gate.set()
    await catalog.follow_clock()
    assert await ages_s(catalog, clock) == [7.0]
    assert await held_s(catalog, clock, second.id) == [60.0]


@pytest.mark.parametrize("where", ["its function", "its commit"])
async def test_a_step_in_a_transaction_that_is_undone_is_owed_and_applied_once(
    catalog: Catalog, clock: StillClock, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    await catalog.follow_clock()
    one = await saved(catalog, await experiment(catalog), 1)
    await catalog.write(lambda tx: trash(tx, one.id))
    clock.step_wall_s(DAY_S)

    def breaks(point: str) -> None:
        if where == "its commit" and point == "catalog.commit":
            raise OSError(errno.EIO, "no")

    async def fails(_: Tx) -> None:
        if where == "its function":
            raise CatalogFault("no")

    with monkeypatch.context() as broken:
        broken.setattr(writer.failpoint, "hit", breaks)
        for _ in range(3):
            with pytest.raises(CatalogFault):
                await catalog.write(fails)
    assert await ages_s(catalog, clock) == [DAY_S]
    for _ in range(3):
        await catalog.follow_clock()
        assert await ages_s(catalog, clock) == [0.0]


async def test_a_look_that_is_cancelled_while_its_step_is_written_is_not_repeated(
    catalog: Catalog, clock: StillClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked for a plan went away (Ctrl-C) in the very commit that moved the graces."""
    await catalog.follow_clock()
    one = await saved(catalog, await experiment(catalog), 1)
    await catalog.write(lambda tx: trash(tx, one.id))
    gate, scope = anyio.Event(), anyio.CancelScope()
    shift = timesteps.shift

    async def cancelling(tx: Tx, by: timedelta) -> None:
        scope.cancel()
        await shift(tx, by)

    async def slow(_: Tx) -> None:
        await gate.wait()

    async def ask() -> None:
        with scope:
            await catalog.follow_clock()

    monkeypatch.setattr(timesteps, "shift", cancelling)
    async with anyio.create_task_group() as group:
        # Two others: the first keeps the writer busy, the second commits for all who wait then.
        group.start_soon(catalog.write, slow)
        await anyio.wait_all_tasks_blocked()
        clock.step_wall_s(-DAY_S)
        group.start_soon(catalog.write, slow)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    monkeypatch.undo()
    assert scope.cancel_called
    for _ in range(2):
        await catalog.follow_clock()
        assert await ages_s(catalog, clock) == [0.0]


async def test_no_lease_ends_in_an_upkeep_whose_look_at_the_clock_failed(
    catalog: Catalog, clock: StillClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """recover() goes on after a failure; what comes next makes good for it or fails with it."""
    await catalog.follow_clock()
    one = await saved(catalog, await experiment(catalog), 1)
    await catalog.write(lambda tx: holds.lease(tx, one.id, "pid 1", 60))
    clock.step_wall_s(DAY_S)

    async def full(*_: object) -> None:
        raise CatalogFault("no")

    with monkeypatch.context() as broken:
        broken.setattr(timesteps, "shift", full)
        await catalog.recover()
        with pytest.raises(CatalogFault):
            await catalog.write(lambda tx: holds.expire(tx, tx.clock.now()))
    assert await catalog.write(lambda tx: holds.expire(tx, tx.clock.now())) == 0
    assert await held_s(catalog, clock, one.id) == [60.0]


async def a_strip(tx: Tx, sequence: int, state: StripState) -> None:
    values = {"state": state, "at": tx.clock.now(), "files": {}, "size_bytes": 0}
    await tx.conn.execute(insert(striptable.strip).values(checkpoint_no=sequence, **values))


WAITED_FOR = {
    "strip.at": select(striptable.strip.c.at).where(striptable.strip.c.state != StripState.GONE),
    "experiment.heartbeat_at": select(schema.experiment.c.heartbeat_at),
    "job.queued_at": select(schema.job.c.queued_at),
    "cached_use.until": select(schema.cached_use.c.until),
}


async def waited_for(catalog: Catalog) -> dict[str, datetime]:
    async def read(conn: Any) -> dict[str, datetime]:
        return {name: (await conn.execute(one)).scalar_one() for name, one in WAITED_FOR.items()}

    return await catalog.read(read)


async def fill(tx: Tx, kept: int, gone: int) -> None:
    await a_strip(tx, kept, StripState.STRIPPED)
    await a_strip(tx, gone, StripState.GONE)
    await queue.add(tx, queue.NewJob(checkpoint_id="c" * 32, lane="lane", stage="publish"))
    await cached.add(tx, "k" * 32, 1)
    await cached.use(tx, "k" * 32, "pid 1", 60.0)


@STEPS
async def test_every_time_that_something_waits_for_is_moved_and_what_is_over_is_not(
    catalog: Catalog, clock: StillClock, step_s: float
) -> None:
    await catalog.follow_clock()
    known = await experiment(catalog)
    kept, gone = [await saved(catalog, known, step) for step in (1, 2)]
    await catalog.write(lambda tx: fill(tx, kept.sequence, gone.sequence))
    before = await waited_for(catalog)
    clock.step_wall_s(step_s)
    await catalog.follow_clock()
    assert await waited_for(catalog) == {name: at + timedelta(seconds=step_s) for name, at in before.items()}
    over = select(striptable.strip.c.at).where(striptable.strip.c.state == StripState.GONE)

    async def read(conn: Any) -> datetime:
        return (await conn.execute(over)).scalar_one()  # type: ignore[no-any-return]

    assert await catalog.read(read) == before["strip.at"]


async def test_a_machine_that_boots_in_1970_and_learns_the_time_gives_no_lease_of_56_years(tmp_path: Path) -> None:
    """Neither what an earlier daemon lent by the right clock, nor its graces, are carried into the next century."""
    right = StillClock()
    async with opened(tmp_path / "c.sqlite", clock=right) as catalog:
        known = await experiment(catalog)
        kept, gone, trashed = [await saved(catalog, known, step) for step in (1, 2, 3)]
        await catalog.write(lambda tx: fill(tx, kept.sequence, gone.sequence))
        await catalog.write(lambda tx: holds.lease(tx, kept.id, "pid 1", READ_LEASE_S))
        await catalog.write(lambda tx: trash(tx, trashed.id))
    lost = right.wall - datetime(1970, 1, 1, tzinfo=UTC)
    booted = StillClock()
    booted.wall -= lost
    async with opened(tmp_path / "c.sqlite", clock=booted) as catalog:
        await catalog.recover()
        assert await held_s(catalog, booted, kept.id) == [READ_LEASE_S]
        found = await waited_for(catalog)
        assert found.pop("cached_use.until") == booted.wall + timedelta(seconds=HOLD_S)
        assert set(found.values()) == {booted.wall}
        booted.pass_s(60)
        booted.wall += lost
        await catalog.recover()
        assert await held_s(catalog, booted, kept.id) == [READ_LEASE_S - 60]
        assert await ages_s(catalog, booted) == [60.0]


async def test_a_step_that_comes_before_the_first_look_moves_nothing_into_the_future(tmp_path: Path) -> None:
    """The first write of a daemon meets the step, and nobody had looked through what the one before it left."""
    right = StillClock()
    async with opened(tmp_path / "c.sqlite", clock=right) as catalog:
        known = await experiment(catalog)
        read, trashed = [await saved(catalog, known, step) for step in (1, 2)]
        await catalog.write(lambda tx: holds.lease(tx, read.id, "pid 1", 60.0))
        await catalog.write(lambda tx: trash(tx, trashed.id))
    booted = StillClock()
    booted.wall -= timedelta(days=20_000)
    async with opened(tmp_path / "c.sqlite", clock=booted) as catalog:
        booted.wall = right.wall
        await saved(catalog, known, 3)
        assert await held_s(catalog, booted, read.id) == [READ_LEASE_S]
        assert await ages_s(catalog, booted) == [0.0]


def test_no_reader_is_given_more_than_a_clock_that_is_set_leaves_it() -> None:
    assert (timesteps.LEASE_S_MAX, timesteps.USE_S_MAX) == (READ_LEASE_S, HOLD_S)


def test_every_time_of_the_schema_is_moved_with_the_clock_or_known_to_be_left_alone() -> None:
    """A new column that something compares with now belongs into timesteps.py."""
    times = {
        f"{table.name}.{column.name}"
        for table in schema.metadata.tables.values()
        for column in table.columns
        if isinstance(column.type, Utc)
    }
    moved = {"checkpoint.trashed_at", "lease.until", *WAITED_FOR}
    assert times == moved | LEFT_ALONE
    assert not moved & LEFT_ALONE
