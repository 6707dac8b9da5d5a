"""Jobs that go on failing: which they are, with what error, and whose."""

from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from ckptd.errors import Denied, NoSpace
from ckptd.model import JobState
from tests.support.catalog import StillClock, Told, opened
from tests.support.lined_up import SETTINGS, Queue

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> StillClock:
    return StillClock()


@pytest.fixture
async def jobs(tmp_path: Path, clock: StillClock) -> AsyncIterator[Queue]:
    async with opened(tmp_path / "c.sqlite", Told(), clock) as catalog:
        yield Queue(catalog, SETTINGS, clock, Random(1))


async def test_what_goes_on_failing_is_told_with_its_last_error_until_it_does_well(
    jobs: Queue, clock: StillClock
) -> None:
    """A user's job is that user's; one whose checkpoint is not known, everybody's who may see all."""
    await jobs.put("a")
    await jobs.put("b")
    for tries in range(1, 4):
        assert await jobs.failing() == []
        job = next(job for job in await jobs.claim(2) if job.lane == "a")
        assert (await jobs.do("retry", job, NoSpace("full"))).attempts == tries
        clock.pass_s(60.0)
    (found,) = await jobs.failing()
    assert (found.job.lane, found.job.error["message"], found.uid) == ("a", "full", None)  # type: ignore[index]
    assert await jobs.failing(1000) == []
    (job,) = [job for job in await jobs.claim(2) if job.lane == "a"]
    again = await jobs.do("put_off", job, Denied("may not"))
    assert (again.state, again.attempts) == (JobState.QUEUED, 4)
    assert (again.not_before - clock.now()).total_seconds() == SETTINGS.backoff_s_max
    assert [one.job.error["message"] for one in await jobs.failing()] == ["may not"]  # type: ignore[index]
    clock.pass_s(SETTINGS.backoff_s_max)
    (job,) = [job for job in await jobs.claim(2) if job.lane == "a"]
    await jobs.do("postpone", job, 1.0)
    assert await jobs.failing() == [], "it waits, and does not fail"


async def test_what_gave_up_is_told_at_once(jobs: Queue) -> None:
    await jobs.put("a")
    await jobs.do("park", await jobs.one(), Denied("may not"))
    (found,) = await jobs.failing()
    assert (found.job.state, found.job.attempts) == (JobState.PARKED, 1)
