"""The queue behind the doors: one job takes one checkpoint along the stages of the pipeline.

Order: jobs of one lane run one at a time and in order of arrival; lanes run side by side. A memory
hand-off's lane is its experiment, a file's lane is its path (it may wait long for its writer and
must not hold up others). A parked job holds up nobody. What can wait, because its bytes are on the disk
already, comes behind what a training's memory waits for: docs/decisions/0012-what-can-wait.md.

Time: what is stored is wall time, because monotonic time ends with the machine. No wait is ever
longer than jobs.backoff_s_max, so a stored time further away than that only says that the clock was
set back, and counts as now. The lease of a running job is kept in monotonic time beside the row: a
clock that jumps forward takes no job away from who works on it.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from random import Random
from typing import Any

import anyio

from ckptd import config
from ckptd.catalog import Catalog, queue
from ckptd.catalog.queue import Failing, Job, NewJob
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.errors import Bug, CkptdError, TimedOut
from ckptd.model import JOB_TRANSITIONS, JobState, new_id

__all__ = ["Failing", "Job", "Jobs", "NewJob"]

DONE_KEPT = 1000  # finished jobs that stay for `ckpt status`; the event log has the rest
TRIM_EVERY = 256
SLOTS_KEPT = 2  # of jobs.running_max, for what a training's memory waits for
FAILING_TRIES = 3  # so often one after another: not what passes by itself within seconds
FAILING_MAX = 200  # of them are told of
JITTER = 0.5  # a pause is shortened by up to this share, so that jobs that failed together come back apart
CRASHED = {"code": "worker_lost", "message": "the daemon ended while this job ran"}


class Jobs:
    """The queue. Methods that take `tx` join the caller's transaction, so that a checkpoint's row
    and its job never disagree.
    """

    boot: str  # names this run of the daemon: monotonic times noted under another one mean nothing

    def __init__(self, catalog: Catalog, settings: config.Jobs, clock: Clock, random: Random) -> None:
        """Keep what it works with; nothing is read yet."""
        self.boot = new_id()
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._random = random
        self._changed = anyio.Event()
        self._leases_s: dict[int, float] = {}  # job -> monotonic end of its lease; what this process runs
        self._can_wait: set[int] = set()  # those of them that can wait
        self._counted: tuple[int | None, dict[JobState, int]] = (None, {})  # at which edition of the catalog

    async def recover(self) -> int:
        """At start, before anything is claimed: RUNNING -> QUEUED; return how many were running.

        It counts as an attempt: a job that takes the daemon down with it is parked in the end.
        """

        async def requeue(tx: Tx) -> int:
            found = await queue.running(tx.conn)
            for job in found:
                await self._again(tx, job, CRASHED, 0.0)
            return len(found)

        return await self._catalog.write(requeue)

    async def enqueue(self, tx: Tx, new: NewJob) -> Job:
        """Add a job; a checkpoint has one at a time: while one waits or runs, that one is returned.

        A parked one gives way to the new one.
        """
        known = await queue.of_checkpoint(tx.conn, new.checkpoint_id)
        if known is not None:
            if known.state is not JobState.PARKED:
                return known
            await self._change(tx, known, state=JobState.DONE)
        added = await queue.add(tx, new)
        tx.after(self._wake)
        return added

    async def enqueue_after(self, tx: Tx, new: NewJob) -> None:
        """Add a job that comes after the checkpoint's present one: in the same lane, in order; one waiting is enough."""
        known = await self.enqueue(tx, new)
        if known.state is JobState.RUNNING:
            await self.enqueue_new(tx, [new])

    async def enqueue_behind(self, tx: Tx, new: NewJob) -> None:
        """Add a job that starts when the checkpoint's present one has ended, whatever that one has done already.

        It may be past the stage that is asked for. One waiting there is enough.
        """
        known = await queue.of_checkpoint(tx.conn, new.checkpoint_id)
        if known is None or known.state is JobState.PARKED:
            await self.enqueue(tx, new)
            return
        behind = [job for job in await queue.in_lane(tx.conn, known.lane) if job.checkpoint_id == new.checkpoint_id]
        if not any(job.stage == new.stage and job.state is JobState.QUEUED for job in behind):
            await self.enqueue_new(tx, [replace(new, lane=known.lane, can_wait=known.can_wait)])

    async def enqueue_aside(self, tx: Tx, new: NewJob) -> None:
        """Add a job that is not the checkpoint's own and in nobody's way; one waiting in its lane is enough.

        A parked one gives way to the new one.
        """
        there = await queue.in_lane(tx.conn, new.lane)
        for job in there:
            if job.state is JobState.PARKED:
                await self._change(tx, job, state=JobState.DONE)
        if not any(job.state is JobState.QUEUED for job in there):
            await self.enqueue_new(tx, [new])

    async def try_parked(self, limit: int = 100) -> int:
        """Give parked jobs of checkpoints that are still PENDING one more try each; return how many."""

        async def again(tx: Tx) -> int:
            found = await queue.parked_pending(tx.conn, limit)
            for job in found:
                values = {"attempts": self._settings.retries_max, "not_before": self._clock.now()}
                await self._change(tx, job, state=JobState.QUEUED, **values)
            tx.after(self._wake)
            return len(found)

        return await self._catalog.write(again)

    async def enqueue_new(self, tx: Tx, new: Sequence[NewJob]) -> None:
        """Add the first jobs of checkpoints that were entered in this very transaction."""
        await queue.add_many(tx, new)
        tx.after(self._wake)

    async def claim(self, limit: int = 1) -> list[Job]:
        """Take up to `limit` due jobs, longest due first; they are RUNNING and leased to the caller.

        What a training's memory waits for comes before what can wait, so that a burst of files holds up no save.
        SLOTS_KEPT are never taken by what can wait; and while any of it waits, one slot is its own.
        """

        async def take(tx: Tx) -> list[Job]:
            now = self._clock.now()
            await queue.clamp(tx, now, now + timedelta(seconds=self._settings.backoff_s_max))
            ended = self._abandoned()
            found = await queue.running_of(tx.conn, ended)
            for job_id in ended - {job.id for job in found}:  # it runs no more, and its row may be forgotten by now
                tx.after(partial(self._let_go, job_id))
            found += await self._due(tx, now, max(0, limit - len(found)))
            return await self._lease_all(tx, found[:limit], now)

        return await self._catalog.write(take)

    async def _due(self, tx: Tx, now: datetime, room: int) -> list[Job]:
        if room <= 0:
            return []
        most = min(room, self._room_to_wait())
        can_wait = await queue.due(tx.conn, now, most, can_wait=True) if most > 0 else []
        shares = bool(can_wait) and not self._can_wait and self._settings.running_max > 1
        first = await queue.due(tx.conn, now, room - shares, can_wait=False)
        return [*first, *can_wait[: room - len(first)]]

    def _room_to_wait(self) -> int:
        """How many more of what can wait may run."""
        return max(1, self._settings.running_max - SLOTS_KEPT) - len(self._can_wait)

    async def renew(self, job: Job) -> Job:
        """Extend the lease of a claimed job. TimedOut when the claim was lost."""
        return await self._catalog.write(lambda tx: self._lease(tx, job, claim=job.claim))

    async def advance(self, tx: Tx, job: Job, stage: str, payload: dict[str, Any] | None = None) -> Job:
        """Go on to `stage` under the same claim, with the lease extended and attempts set to 0.

        TimedOut  the claim was lost
        """
        gone_on = {"stage": stage, "attempts": 0, "payload": job.payload if payload is None else payload, "error": None}
        await self._change(tx, job, **gone_on)
        tx.after(lambda: self._hold(job.id))
        return replace(job, **gone_on, fresh=None)  # type: ignore[arg-type]

    async def move(self, tx: Tx, job: Job, stage: str, lane: str) -> Job:
        """RUNNING -> QUEUED for `stage` in another lane, due now: its old lane is free for the next job at once.

        TimedOut  the claim was lost
        """
        return await self._requeue(tx, job, 0.0, stage=stage, lane=queue.lane_key(lane), attempts=0, error=None)

    async def finish(self, tx: Tx, job: Job) -> None:
        """RUNNING -> DONE. TimedOut when the claim was lost."""
        await self._change(tx, job, state=JobState.DONE, lease_until=None)
        if job.id % TRIM_EVERY == 0:
            await queue.trim(tx, job.id - DONE_KEPT)
        tx.after(lambda: self._let_go(job.id))

    async def postpone(self, tx: Tx, job: Job, after_s: float, payload: dict[str, Any] | None = None) -> Job:
        """RUNNING -> QUEUED, due again in `after_s` (jobs.backoff_s_max at most); not an attempt. TimedOut.

        Nothing failed now: what failed before is no longer what it waits for.
        """
        values = {} if payload is None else {"payload": payload}
        return await self._requeue(tx, job, after_s, error=None, **values)

    async def put_off(self, tx: Tx, job: Job, error: CkptdError) -> Job:
        """RUNNING -> QUEUED after the longest pause: tried for as long as what is in its way may pass. TimedOut."""
        longest_s = self._settings.backoff_s_max
        return await self._requeue(tx, job, longest_s, attempts=job.attempts + 1, error=error.to_wire())

    async def retry(self, tx: Tx, job: Job, error: CkptdError) -> Job:
        """RUNNING -> QUEUED after a pause that doubles each time, or PARKED after jobs.retries_max.

        Emits job.retried or job.parked. TimedOut when the claim was lost.
        """
        return await self._again(tx, job, error.to_wire(), self._pause_s(job.attempts))

    async def park(self, tx: Tx, job: Job, error: CkptdError) -> Job:
        """RUNNING -> PARKED: a person or a new event must wake it. Emits job.parked. TimedOut."""
        return await self._park(tx, job, error.to_wire())

    async def wake(self, tx: Tx, *, checkpoint_id: str | None = None, lane: str | None = None) -> int:
        """Make parked and waiting jobs of a checkpoint or of a lane due now; return how many."""
        if checkpoint_id is not None:
            one = await queue.of_checkpoint(tx.conn, checkpoint_id)
            found = [] if one is None else [one]
        elif lane is not None:
            found = await queue.in_lane(tx.conn, lane)
        else:
            raise Bug("wake() needs a checkpoint or a lane")
        woken = 0
        for job in found:
            if job.state is not JobState.RUNNING:
                attempts = 0 if job.state is JobState.PARKED else job.attempts
                await self._change(tx, job, state=JobState.QUEUED, attempts=attempts, not_before=self._clock.now())
                woken += 1
        tx.after(self._wake)
        return woken

    async def cancel(self, tx: Tx, checkpoint_id: str) -> bool:
        """End the waiting or parked job of a checkpoint; False when it runs, or there is none."""
        job = await queue.of_checkpoint(tx.conn, checkpoint_id)
        if job is None or job.state is JobState.RUNNING:
            return False
        await self._change(tx, job, state=JobState.DONE)
        tx.after(self._wake)
        return True

    async def next_due(self) -> float | None:
        """Seconds until a job may be claimed: 0 when one is due, None when none waits for time alone."""
        of_all = self._room_to_wait() > 0
        at = await self._catalog.read(lambda conn: queue.next_time(conn, of_all=of_all))
        waits_s = [max(0.0, end_s - self._clock.monotonic_s()) for end_s in self._leases_s.values()]
        if at is not None:
            wait_s = (at - self._clock.now()).total_seconds()
            # Further away than any wait: the clock was set back, and claim() will clamp it.
            waits_s.append(0.0 if wait_s > self._settings.backoff_s_max else max(0.0, wait_s))
        return min(waits_s, default=None)

    async def wait(self) -> None:
        """Sleep until something may be claimable: a job fell due, came, or made room in its lane."""
        changed = self._changed  # taken before looking: what comes in between sets this one
        due_s = await self.next_due()
        with anyio.move_on_after(due_s):
            await changed.wait()

    async def counts(self) -> dict[JobState, int]:
        """How many jobs are in each unfinished state; of a node at rest it is known without asking."""
        edition = self._catalog.edition()
        if edition is None or edition != self._counted[0]:
            self._counted = edition, await self._catalog.read(queue.counts)
        return dict(self._counted[1])

    async def failing(self, uid: int | None = None) -> Sequence[Failing]:
        """Return jobs that gave up and those that go on failing, oldest first, FAILING_MAX at most; None: everybody's."""
        tries = max(1, min(FAILING_TRIES, self._settings.retries_max))
        return await self._catalog.read(lambda conn: queue.failing(conn, tries, uid=uid, limit=FAILING_MAX))

    async def unfinished(self, limit: int = 500) -> Sequence[Job]:
        """Return queued, running and parked jobs, oldest first."""
        return await self._catalog.read(lambda conn: queue.unfinished(conn, limit))

    def _pause_s(self, attempts: int) -> float:
        # The exponent is bounded before it is used: 2.0 ** 1100 is an OverflowError.
        longest_s = min(self._settings.backoff_s * 2.0 ** min(attempts, 32), self._settings.backoff_s_max)
        return longest_s * (1.0 - JITTER * self._random.random())

    async def _again(self, tx: Tx, job: Job, error: dict[str, Any], after_s: float) -> Job:
        tries = job.attempts + 1
        if tries > self._settings.retries_max:
            return await self._park(tx, job, error)
        again = await self._requeue(tx, job, after_s, attempts=tries, error=error)
        data = {"job": job.id, "kind": job.stage, "tries": tries, "error": error, "retry_after_s": after_s}
        tx.tell("job.retried", data, checkpoint=job.checkpoint_id)
        return again

    async def _park(self, tx: Tx, job: Job, error: dict[str, Any]) -> Job:
        tries = job.attempts + 1
        await self._change(tx, job, state=JobState.PARKED, attempts=tries, error=error, lease_until=None)
        data = {"job": job.id, "kind": job.stage, "tries": tries, "error": error}
        tx.tell("job.parked", data, checkpoint=job.checkpoint_id)
        tx.after(lambda: self._let_go(job.id))
        return await queue.get(tx.conn, job.id)

    async def _requeue(self, tx: Tx, job: Job, after_s: float, **values: Any) -> Job:
        wait_s = min(max(0.0, after_s), self._settings.backoff_s_max)
        not_before = self._clock.now() + timedelta(seconds=wait_s)
        await self._change(tx, job, state=JobState.QUEUED, not_before=not_before, lease_until=None, **values)
        tx.after(lambda: self._let_go(job.id))
        return await queue.get(tx.conn, job.id)

    async def _lease_all(self, tx: Tx, found: list[Job], now: datetime) -> list[Job]:
        """Lease what was read in this very transaction, in one statement."""
        until = now + timedelta(seconds=self._settings.lease_s)
        await queue.lease(tx, [job.id for job in found], until)
        for job in found:
            tx.after(partial(self._hold, job.id))
            if job.can_wait:
                tx.after(partial(self._can_wait.add, job.id))
        return [replace(job, state=JobState.RUNNING, claim=job.claim + 1, lease_until=until) for job in found]

    async def _lease(self, tx: Tx, job: Job, *, claim: int) -> Job:
        until = self._clock.now() + timedelta(seconds=self._settings.lease_s)
        await self._change(tx, job, state=JobState.RUNNING, claim=claim, lease_until=until)
        tx.after(partial(self._hold, job.id))
        return replace(job, state=JobState.RUNNING, claim=claim, lease_until=until)

    async def _change(self, tx: Tx, job: Job, **values: Any) -> None:
        new = values.get("state", job.state)
        if new is not job.state and new not in JOB_TRANSITIONS[job.state]:
            raise Bug(f"a job can't go from {job.state} to {new}")
        if not await queue.change(tx, job, values):
            raise TimedOut(f"the claim of job {job.id} was lost: its lease ran out and it was claimed again")

    def _abandoned(self) -> set[int]:
        now_s = self._clock.monotonic_s()
        return {job_id for job_id, end_s in self._leases_s.items() if end_s <= now_s}

    def _hold(self, job_id: int) -> None:
        """Remember a lease. Only from `tx.after`: the order of commits decides between a renewal and an end beside it."""
        self._leases_s[job_id] = self._clock.monotonic_s() + self._settings.lease_s

    def _let_go(self, job_id: int) -> None:
        self._leases_s.pop(job_id, None)
        self._can_wait.discard(job_id)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
