"""What can wait and what can't: the order in which a queue gives its slots away."""

from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from ckptd.catalog import Catalog, queue
from ckptd.jobs import NewJob
from tests.support.catalog import StillClock, Told, opened
from tests.support.lined_up import SETTINGS, Queue


@pytest.fixture
def clock() -> StillClock:
    return StillClock()


@pytest.fixture
async def catalog(tmp_path: Path, clock: StillClock) -> AsyncIterator[Catalog]:
    async with opened(tmp_path / "c.sqlite", Told(), clock) as found:
        yield found


@pytest.fixture
def jobs(catalog: Catalog, clock: StillClock) -> Queue:
    return Queue(catalog, SETTINGS, clock, Random(1))


async def test_what_can_wait_comes_behind_what_came_later_and_never_takes_the_last_slots(
    jobs: Queue, clock: StillClock
) -> None:
    """A thousand files must not stand between a training's memory and the disk."""
    files = [await jobs.put(f"f{number}", can_wait=True) for number in range(20)]
    clock.pass_s(5.0)
    running = await jobs.claim(8)
    assert [job.id for job in running] == [job.id for job in files[:6]], "two slots stay free of them"
    assert await jobs.next_due() == SETTINGS.lease_s, "no spin, although files are due"
    saves = [await jobs.put(f"s{number}") for number in range(10)]
    assert await jobs.next_due() == 0.0
    running += await jobs.claim(2)
    assert [job.id for job in running[6:]] == [job.id for job in saves[:2]]
    for job in running:
        await jobs.do("finish", job)
    mixed = await jobs.claim(8)
    assert [job.id for job in mixed] == [*(job.id for job in saves[2:9]), files[6].id], "one slot is theirs"
    await jobs.do("finish", mixed[-1])
    assert [job.id for job in await jobs.claim(1)] == [files[7].id], "and stays theirs while any of them waits"


async def test_with_one_slot_what_can_wait_waits(catalog: Catalog, clock: StillClock) -> None:
    jobs = Queue(catalog, SETTINGS.model_copy(update={"running_max": 1}), clock, Random(1))
    file = await jobs.put("f", can_wait=True)
    save = await jobs.put("s")
    assert [job.id for job in await jobs.claim(1)] == [save.id]
    await jobs.do("finish", await jobs.row(save))
    assert [job.id for job in await jobs.claim(1)] == [file.id]


async def test_a_job_that_follows_another_in_its_lane_is_as_urgent_as_that_one(jobs: Queue) -> None:
    """Else what can wait would stand in the way of what can't."""
    first = await jobs.put("a")
    behind = NewJob(checkpoint_id=first.checkpoint_id, lane="x", stage="verify", can_wait=True)
    await jobs.do("enqueue_behind", behind)
    lane = await jobs._catalog.read(lambda conn: queue.in_lane(conn, "a"))
    assert [(job.stage, job.can_wait) for job in lane] == [("publish", False), ("verify", False)]
