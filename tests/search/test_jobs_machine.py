"""The queue against a model: whatever is done to it, lanes keep their order and no job is lost."""

import asyncio
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ckptd import config
from ckptd.errors import NoSpace
from ckptd.jobs import Job, Jobs, NewJob
from ckptd.model import JobState, new_id
from tests.support.catalog import StillClock, opened

SETTINGS = config.Jobs(retries_max=2, backoff_s=1.0, backoff_s_max=8.0, lease_s=600.0)
LANES = ("a", "b", "c")
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # hundreds of commits, and nothing of disks is tested here


class Queue(RuleBasedStateMachine):
    """The model: for every job its lane and state, in order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.home = Path(tempfile.mkdtemp(prefix="ck", dir=MEMORY))
        self.clock = StillClock()
        self.context = opened(self.home / "c.sqlite", clock=self.clock)
        self.catalog = self.loop.run_until_complete(self.context.__aenter__())
        self.jobs = Jobs(self.catalog, SETTINGS, self.clock, Random(1))
        self.lanes: dict[int, str] = {}
        self.state: dict[int, JobState] = {}
        self.claims: dict[int, Job] = {}
        self.checkpoints: dict[int, str] = {}

    def teardown(self) -> None:
        self.loop.run_until_complete(self.context.__aexit__(None, None, None))
        self.loop.close()
        shutil.rmtree(self.home)

    def do(self, what: str, *arguments: Any, **named: Any) -> Any:
        call = getattr(self.jobs, what)
        return self.loop.run_until_complete(self.catalog.write(lambda tx: call(tx, *arguments, **named)))

    def running(self, pick: int) -> Job:
        return self.claims[sorted(self.claims)[pick % len(self.claims)]]

    @rule(lane=st.sampled_from(LANES))
    def enqueue(self, lane: str) -> None:
        job = self.do("enqueue", NewJob(checkpoint_id=new_id(), lane=lane, stage="publish"))
        assert job.id not in self.lanes
        self.lanes[job.id], self.state[job.id] = lane, JobState.QUEUED
        self.checkpoints[job.id] = job.checkpoint_id

    @rule(limit=st.integers(1, 4))
    def claim(self, limit: int) -> None:
        for job in self.loop.run_until_complete(self.jobs.claim(limit)):
            assert self.state[job.id] is JobState.QUEUED
            lane = self.lanes[job.id]
            others = [other for other, of in self.lanes.items() if of == lane and other != job.id]
            assert all(self.state[other] is not JobState.RUNNING for other in others)
            assert all(self.state[other] is not JobState.QUEUED for other in others if other < job.id)
            self.state[job.id], self.claims[job.id] = JobState.RUNNING, job

    @precondition(lambda self: self.claims)
    @rule(pick=st.integers(0, 9), how=st.sampled_from(["finish", "advance", "move", "postpone", "retry", "park"]))
    def end(self, pick: int, how: str) -> None:
        job = self.running(pick)
        if how == "finish":
            self.do("finish", job)
            self.state[job.id] = JobState.DONE
        elif how == "advance":
            self.claims[job.id] = self.do("advance", job, "verify")
            return
        elif how == "move":
            self.lanes[job.id] += "+"
            self.state[job.id] = self.do("move", job, "verify", self.lanes[job.id]).state
        elif how == "postpone":
            self.state[job.id] = self.do("postpone", job, 3.0).state
        elif how == "retry":
            again = self.do("retry", job, NoSpace("full"))
            assert again.state is (JobState.PARKED if job.attempts >= SETTINGS.retries_max else JobState.QUEUED)
            self.state[job.id] = again.state
        else:
            self.state[job.id] = self.do("park", job, NoSpace("full")).state
        del self.claims[job.id]

    @precondition(lambda self: self.lanes)
    @rule(pick=st.integers(0, 99), how=st.sampled_from(["wake", "cancel"]))
    def poke(self, pick: int, how: str) -> None:
        job_id = sorted(self.lanes)[pick % len(self.lanes)]
        before = self.state[job_id]
        if how == "wake":
            woken = self.do("wake", checkpoint_id=self.checkpoints[job_id])
            assert woken == (before in {JobState.QUEUED, JobState.PARKED})
            if woken:
                self.state[job_id] = JobState.QUEUED
        else:
            ended = self.do("cancel", self.checkpoints[job_id])
            assert ended == (before in {JobState.QUEUED, JobState.PARKED})
            if ended:
                self.state[job_id] = JobState.DONE

    @rule(seconds=st.sampled_from([1.0, 10.0]), jump_s=st.sampled_from([0.0, 0.0, -3600.0, 86400.0]))
    def pass_time(self, seconds: float, jump_s: float) -> None:
        self.clock.pass_s(seconds)
        self.clock.step_wall_s(jump_s)

    @rule()
    def crash(self) -> None:
        """A new daemon on the same catalog: what ran is claimed again, or parked when it was tried too often."""
        self.jobs = Jobs(self.catalog, SETTINGS, self.clock, Random(1))
        assert self.loop.run_until_complete(self.jobs.recover()) == len(self.claims)
        for job_id, job in self.claims.items():
            parked = job.attempts >= SETTINGS.retries_max
            self.state[job_id] = JobState.PARKED if parked else JobState.QUEUED
        self.claims.clear()

    @invariant()
    def the_rows_are_the_model(self) -> None:
        rows = self.loop.run_until_complete(self.jobs.unfinished())
        expected = {job_id: state for job_id, state in self.state.items() if state is not JobState.DONE}
        assert {row.id: row.state for row in rows} == expected

    @invariant()
    def nothing_due_is_slept_over(self) -> None:
        """Whenever a lane is free and its first job is due, next_due() says now; and it never sleeps for ever."""
        due_s = self.loop.run_until_complete(self.jobs.next_due())
        waiting = [job_id for job_id, state in self.state.items() if state is JobState.QUEUED]
        busy = {self.lanes[job_id] for job_id in self.claims}
        free = [job_id for job_id in waiting if self.lanes[job_id] not in busy]
        if free or self.claims:
            assert due_s is not None
            assert due_s <= (SETTINGS.backoff_s_max if free else SETTINGS.lease_s)
        else:
            assert due_s is None


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
