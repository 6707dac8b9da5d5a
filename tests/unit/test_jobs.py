"""The queue: order, leases, retries, parking, clocks that lie."""

from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import anyio
import pytest

from ckptd.catalog import Catalog
from ckptd.errors import Bug, NoSpace, TimedOut
from ckptd.jobs import DONE_KEPT, JITTER, NewJob
from ckptd.model import JobState, new_id
from tests.support.catalog import StillClock, Told, opened
from tests.support.lined_up import SETTINGS, Queue


@pytest.fixture
def clock() -> StillClock:
    return StillClock()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def catalog(tmp_path: Path, clock: StillClock, told: Told) -> AsyncIterator[Catalog]:
    async with opened(tmp_path / "c.sqlite", told, clock) as found:
        yield found


@pytest.fixture
def jobs(catalog: Catalog, clock: StillClock) -> Queue:
    return Queue(catalog, SETTINGS, clock, Random(1))


async def test_a_lane_runs_one_at_a_time_in_order_of_arrival(jobs: Queue) -> None:
    first, second = await jobs.put("a"), await jobs.put("a")
    claimed = await jobs.claim(5)
    assert [job.id for job in claimed] == [first.id]
    assert await jobs.claim(5) == []
    await jobs.do("finish", claimed[0])
    assert [job.id for job in await jobs.claim(5)] == [second.id]


async def test_a_lane_with_a_running_job_is_never_claimed_from_however_many_are_asked_for(
    jobs: Queue, clock: StillClock
) -> None:
    """Two stages of one experiment at once would write the same names, and break the order of its saves."""
    first, second = await jobs.put("a"), await jobs.put("a")
    assert [job.id for job in await jobs.claim(10)] == [first.id]
    assert await jobs.claim(10) == []
    clock.pass_s(1.0)
    assert await jobs.claim(10) == []
    assert await jobs.next_due() == pytest.approx(SETTINGS.lease_s - 1.0), "only the end of the lease is waited for"
    await jobs.do("finish", await jobs.row(first))
    assert [job.id for job in await jobs.claim(10)] == [second.id]


async def test_a_job_never_overtakes_an_older_one_of_its_lane_that_waits(jobs: Queue, clock: StillClock) -> None:
    first = await jobs.put("a")
    await jobs.do("postpone", await jobs.one(), 30.0)
    second, other = await jobs.put("a"), await jobs.put("b")
    assert [job.id for job in await jobs.claim(10)] == [other.id]
    assert await jobs.next_due() == pytest.approx(30.0), "the older one's time, not the younger one's"
    clock.pass_s(31.0)
    assert [job.id for job in await jobs.claim(10)] == [first.id]
    assert (await jobs.row(second)).state is JobState.QUEUED


async def test_lanes_run_side_by_side(jobs: Queue) -> None:
    made = [await jobs.put(lane) for lane in ("a", "b", "a", "c")]
    assert [job.id for job in await jobs.claim(10)] == [made[0].id, made[1].id, made[3].id]


async def test_a_job_that_waits_holds_its_own_lane_only(jobs: Queue, clock: StillClock) -> None:
    """Order within an experiment is kept even while its first job backs off."""
    await jobs.put("a")
    await jobs.put("a")
    other = await jobs.put("b")
    first = (await jobs.claim(1))[0]
    await jobs.do("retry", first, NoSpace("full"))
    assert [job.id for job in await jobs.claim(5)] == [other.id]
    clock.pass_s(2)
    assert [job.id for job in await jobs.claim(5)] == [first.id]


async def test_a_parked_job_holds_up_nobody_and_can_be_woken(jobs: Queue, told: Told) -> None:
    await jobs.put("a")
    second = await jobs.put("a")
    first = await jobs.one()
    await jobs.do("park", first, NoSpace("full"))
    assert told.events[-1].name == "job.parked"
    assert told.events[-1].data["error"]["code"] == "no_space"
    assert (await jobs.one()).id == second.id
    assert await jobs.do("wake", checkpoint_id=first.checkpoint_id) == 1
    assert await jobs.claim(5) == [], "its lane is taken: still one at a time"
    await jobs.do("finish", await jobs.row(second))
    woken = await jobs.one()
    assert (woken.id, woken.attempts) == (first.id, 0)


async def test_retries_pause_longer_each_time_and_end_in_parking(jobs: Queue, clock: StillClock, told: Told) -> None:
    await jobs.put()
    pauses = []
    for tries in range(1, 4):
        again = await jobs.do("retry", await jobs.one(), NoSpace("full"))
        assert (again.state, again.attempts) == (JobState.QUEUED, tries)
        pauses.append((again.not_before - clock.now()).total_seconds())
        assert await jobs.claim() == []
        clock.pass_s(pauses[-1])
    for tries, pause in enumerate(pauses):
        assert (1 - JITTER) * 2**tries <= pause <= 2**tries
    parked = await jobs.do("retry", await jobs.one(), NoSpace("full"))
    assert parked.state is JobState.PARKED
    assert parked.error["code"] == "no_space"
    assert told.names[-4:] == ["job.retried", "job.retried", "job.retried", "job.parked"]


async def test_no_pause_is_longer_than_the_limit_however_often_it_failed(catalog: Catalog, clock: StillClock) -> None:
    settings = SETTINGS.model_copy(update={"retries_max": 10_000})
    jobs = Queue(catalog, settings, clock, Random(1))
    await jobs.put()
    job = await jobs.one()
    assert jobs._pause_s(5000) <= 60.0
    again = await jobs.do("postpone", job, 1e9)
    assert (again.not_before - clock.now()).total_seconds() == 60.0


async def test_a_postponed_job_is_no_failed_one(jobs: Queue, clock: StillClock, told: Told) -> None:
    """Waiting for the writer of a file is not an error, however often it is asked."""
    await jobs.put()
    for _ in range(10):
        again = await jobs.do("postpone", await jobs.one(), 5.0, {"asked": True})
        assert (again.attempts, again.payload) == (0, {"asked": True})
        assert await jobs.next_due() == 5.0
        clock.pass_s(5)
    assert told.names == []


async def test_a_checkpoint_has_one_job_at_a_time(jobs: Queue) -> None:
    one = await jobs.put("a", "c" * 32)
    assert (await jobs.put("a", "c" * 32)).id == one.id
    claimed = await jobs.one()
    assert (await jobs.put("b", "c" * 32)).id == one.id
    await jobs.do("park", claimed, NoSpace("full"))
    new = await jobs.put("a", "c" * 32)
    assert new.id != one.id
    assert (await jobs.row(one)).state is JobState.DONE
    assert (await jobs.one()).id == new.id


async def test_stages_go_on_under_the_same_claim(jobs: Queue) -> None:
    await jobs.put(x=1)
    claimed = await jobs.one()
    onward = await jobs.do("advance", claimed, "verify")
    assert (onward.stage, onward.payload, onward.state) == ("verify", {"x": 1}, JobState.RUNNING)
    last = await jobs.do("advance", onward, "link", {"y": 2})
    assert last.payload == {"y": 2}
    await jobs.do("finish", last)
    with pytest.raises(TimedOut):
        await jobs.do("finish", last)


async def test_a_claim_that_was_taken_over_can_do_nothing_more(jobs: Queue, clock: StillClock) -> None:
    """The fence: a worker that comes back after its lease ran out must not end another's work."""
    await jobs.put()
    stale = await jobs.one()
    clock.pass_s(SETTINGS.lease_s)
    fresh = await jobs.one()
    assert (fresh.id, fresh.claim) == (stale.id, stale.claim + 1)
    for act in (
        ("finish", stale),
        ("advance", stale, "verify"),
        ("postpone", stale, 1.0),
        ("retry", stale, NoSpace("x")),
        ("park", stale, NoSpace("x")),
    ):
        with pytest.raises(TimedOut):
            await jobs.do(*act)
    with pytest.raises(TimedOut):
        await jobs.renew(stale)
    await jobs.do("finish", fresh)


async def test_a_renewed_job_is_not_claimed_again(jobs: Queue, clock: StillClock) -> None:
    await jobs.put()
    job = await jobs.one()
    for _ in range(5):
        clock.pass_s(SETTINGS.lease_s - 1)
        job = await jobs.renew(job)
        assert await jobs.claim() == []
    await jobs.do("finish", job)


@pytest.mark.parametrize("jump_s", [86400.0, -3600.0, -2e9])
async def test_a_clock_that_jumps_takes_no_running_job_and_stops_no_waiting_one(
    jobs: Queue, clock: StillClock, jump_s: float
) -> None:
    """F11: durations are monotonic; a stored wait further away than any wait counts as over."""
    await jobs.put("a")
    await jobs.put("b")
    running, waiting = await jobs.claim(2)
    await jobs.do("postpone", waiting, 30.0)
    clock.step_wall_s(jump_s)
    assert await jobs.next_due() == 0.0
    assert [job.id for job in await jobs.claim(5)] == [waiting.id]
    await jobs.do("finish", running)


async def test_after_a_crash_running_jobs_are_claimed_again_and_counted(
    jobs: Queue, catalog: Catalog, clock: StillClock
) -> None:
    """M021; F24: a job that takes the daemon down each time is parked in the end."""
    await jobs.put("a")
    await jobs.put("b")
    await jobs.one()
    for crash in range(1, 4):
        reborn = Queue(catalog, SETTINGS, clock, Random(1))
        assert reborn.boot != jobs.boot
        assert await reborn.recover() == 1
        (again,) = [job for job in await reborn.claim(2) if job.lane == "a"] or await reborn.claim(2)
        assert again.attempts == crash
        for job in await reborn.unfinished():
            if job.state is JobState.RUNNING and job.lane == "b":
                await reborn.do("postpone", job, 0.0)
    assert await Queue(catalog, SETTINGS, clock, Random(1)).recover() == 1
    assert (await jobs.counts())[JobState.PARKED] == 1


async def test_waking_a_lane_ends_its_waits(jobs: Queue, clock: StillClock) -> None:
    """A hint that a file was closed makes its settle job ask again at once."""
    await jobs.put("/data/x.pt")
    await jobs.do("postpone", await jobs.one(), 30.0)
    assert await jobs.claim() == []
    assert await jobs.do("wake", lane="/data/x.pt") == 1
    assert len(await jobs.claim()) == 1
    assert await jobs.do("wake", lane="/data/x.pt") == 0, "a running job is awake"
    with pytest.raises(Bug):
        await jobs.do("wake")


async def test_a_waiting_job_can_be_cancelled_and_a_running_one_not(jobs: Queue) -> None:
    """on_overlap = "replace" drops the oldest staged save that nobody works on."""
    waiting = await jobs.put("a")
    assert await jobs.do("cancel", waiting.checkpoint_id)
    assert not await jobs.do("cancel", waiting.checkpoint_id)
    running = await jobs.put("a")
    await jobs.one()
    assert not await jobs.do("cancel", running.checkpoint_id)


async def test_lanes_of_any_length_and_bytes_are_told_apart(jobs: Queue) -> None:
    lanes = ["/" + "x" * 4000, "/" + "x" * 3999 + "y", "/caf\udce9", "/café"]
    for lane in lanes:
        await jobs.put(lane)
        await jobs.put(lane)
    assert len(await jobs.claim(20)) == len(lanes)


async def test_a_failed_transaction_changes_nothing_about_the_queue(jobs: Queue, catalog: Catalog) -> None:
    await jobs.put()
    claimed = await jobs.one()

    async def fails(tx: Any) -> None:
        await jobs.finish(tx, claimed)
        raise ValueError

    with pytest.raises(ValueError):
        await catalog.write(fails)
    assert (await jobs.row(claimed)).state is JobState.RUNNING
    assert await jobs.claim() == []
    await jobs.renew(claimed)


async def test_waiting_ends_when_a_job_comes_or_its_lane_is_free(jobs: Queue) -> None:
    """No polling: a pipeline with nothing to do sleeps until there is something."""
    send, receive = anyio.create_memory_object_stream[int](2)

    async def worker() -> None:
        for _ in range(2):
            while not (found := await jobs.claim()):
                await jobs.wait()
            await send.send(found[0].id)

    with send, receive, anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(worker)
            await anyio.wait_all_tasks_blocked()
            first, second = await jobs.put("a"), await jobs.put("a")
            assert await receive.receive() == first.id
            await anyio.wait_all_tasks_blocked()
            await jobs.do("finish", await jobs.row(first))
            assert await receive.receive() == second.id


async def test_waiting_sleeps_exactly_until_the_next_job_is_due(jobs: Queue, clock: StillClock) -> None:
    assert await jobs.next_due() is None
    await jobs.put("a")
    await jobs.put("a")
    assert await jobs.next_due() == 0.0
    job = await jobs.one()
    assert await jobs.next_due() == SETTINGS.lease_s, "the second one waits for its lane, not for time"
    await jobs.do("postpone", job, 12.5)
    assert await jobs.next_due() == 12.5


async def test_finished_jobs_do_not_pile_up(jobs: Queue, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptd.jobs.TRIM_EVERY", 1)
    monkeypatch.setattr("ckptd.jobs.DONE_KEPT", 3)
    for _ in range(10):
        await jobs.put()
        await jobs.do("finish", await jobs.one())
    left = await catalog.read(lambda conn: conn.exec_driver_sql("SELECT count(*) FROM job"))
    assert left.scalar_one() <= 5 < DONE_KEPT


async def test_what_must_run_again_waits_behind_a_job_that_is_past_it(jobs: Queue) -> None:
    """Damage found while the checkpoint is being linked: its present job has read it back already."""
    present = await jobs.put("a")
    running = await jobs.one()
    again = NewJob(checkpoint_id=present.checkpoint_id, lane="elsewhere", stage="verify")
    for _ in range(2):
        await jobs.do("enqueue_behind", again)
    assert await jobs.claim(5) == [], "one at a time for each checkpoint"
    await jobs.do("finish", running)
    (behind,) = await jobs.claim(5)
    assert (behind.stage, behind.lane) == ("verify", "a")
    await jobs.do("enqueue_behind", again)
    await jobs.do("finish", behind)
    assert (await jobs.one()).stage == "verify", "what runs may have read it before"


async def test_what_must_run_again_starts_at_once_when_nothing_runs(jobs: Queue) -> None:
    await jobs.do("enqueue_behind", NewJob(checkpoint_id=new_id(), lane="b", stage="verify"))
    assert (await jobs.one()).lane == "b"


async def test_a_lease_renewed_in_the_commit_that_ends_its_job_is_not_remembered(jobs: Queue, catalog: Catalog) -> None:
    """A stage may end just while its lease is renewed. What is remembered of it would be claimed again for ever."""
    await jobs.put("a")
    job, gate = await jobs.one(), anyio.Event()

    async def hold_up(_: object) -> None:
        await gate.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(catalog.write, hold_up)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(jobs.renew, job)  # both wait behind it, and share a commit
        await anyio.wait_all_tasks_blocked()
        group.start_soon(jobs.do, "finish", job)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    assert (await jobs.row(job)).state is JobState.DONE
    assert await jobs.next_due() is None


async def test_a_lease_of_a_job_that_is_forgotten_by_now_ends_no_claim(jobs: Queue, clock: StillClock) -> None:
    """Its row was trimmed: whatever is still remembered of it is let go, and others are claimed."""
    jobs._hold(4711)
    clock.pass_s(SETTINGS.lease_s + 1.0)
    job = await jobs.put("a")
    assert [one.id for one in await jobs.claim(5)] == [job.id]
    await jobs.do("finish", await jobs.row(job))
    assert await jobs.next_due() is None


async def test_how_many_jobs_there_are_is_read_once_for_each_change(
    jobs: Queue, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await jobs.put("a")
    reads: list[object] = []
    read = catalog.read

    async def counted(fn: Any) -> Any:
        reads.append(fn)
        return await read(fn)

    monkeypatch.setattr(catalog, "read", counted)
    assert [(await jobs.counts())[JobState.QUEUED] for _ in range(3)] == [1, 1, 1]
    assert len(reads) == 1
    await jobs.put("b")
    await jobs.claim(1)
    found = await jobs.counts()
    assert (found[JobState.QUEUED], found[JobState.RUNNING]) == (1, 1)
