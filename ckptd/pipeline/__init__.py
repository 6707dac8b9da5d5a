"""The work: each job carries one checkpoint through the stages below, in their order.

    memory hand-off            publish ─► verify ─► link ─► retain
    file hand-off, watched     settle ─► publish ─► verify ─► link ─► retain
    (damage while an arena still holds the bytes: verify ─► repair ─► verify)
    said after the publish     amend, beside all of these
    more to retire than a save waits for    rest, beside all of these

Stages know nothing of one another; only this table knows what there is. A stage records its result
and the job's next stage in one transaction, so a crash repeats at most one stage, and each stage
can be repeated. Errors are sorted here, once: passing ones are tried again with growing pauses,
the others end a file's checkpoint with an error that everybody sees. A memory hand-off was acknowledged:
while its bytes are there nothing from outside ends it. Its job is tried again, then parked and tried now
and then; only a memory that is gone makes it FAILED.
"""

from collections.abc import Callable

import anyio
import anyio.abc
import structlog

from ckptd.catalog import checkpoints
from ckptd.catalog.tx import Tx
from ckptd.errors import Bug, CatalogFault, CkptdError, Denied, DiskFault, NoSpace, RootDegraded, TimedOut, Weather
from ckptd.jobs import Job
from ckptd.model import Origin, State
from ckptd.pipeline import amend, link, publish, repair, rest, retain, settle, upkeep, verify
from ckptd.pipeline.tools import Ended, Outcome, Stage, Tools
from ckptd.pipeline.winners import follow_rules

log = structlog.get_logger()
_WARNING, _ERROR = 30, 40

STAGES: dict[str, Stage] = {
    "settle": settle.run,
    "publish": publish.run,
    "verify": verify.run,
    "repair": repair.run,
    "link": link.run,
    "retain": retain.run,
    "rest": rest.run,
    "amend": amend.run,
}
# What is no fault of the checkpoint passes. A catalog in trouble above all: it must not be what ends a hand-off.
PASSING = (Weather, RootDegraded, NoSpace, DiskFault, Denied, CatalogFault)
CLAIM_AGAIN_S = 1.0
PARKED_FIRST_S, PARKED_AGAIN_S = 20.0, 900.0
PARKED_MAX = 1000  # tried at once: those that fail again must not stand before the others for ever
LAST_WORD_S = 2.0
DRAIN_LOOK_S = 0.05
RENEW_SHARE = 3  # a running job's lease is renewed after a third of it


class Pipeline:
    """Claims jobs and runs their stages, up to jobs.running_max side by side."""

    def __init__(self, tools: Tools) -> None:
        """Keep the tools; nothing runs yet."""
        self._tools = tools
        self._slots = anyio.Semaphore(tools.settings().jobs.running_max)

    async def run(self, stop: anyio.Event, undone: Callable[[], bool]) -> None:
        """Work until `stop` is set and nothing acknowledged is `undone`; then finish what runs.

        Cancelled (the drain's deadline, a second signal): running jobs are claimed again by the next
        daemon, and what is still undone is spilled to the spool by whoever composes the daemon.
        """
        async with anyio.create_task_group() as running, anyio.create_task_group() as claiming:
            claiming.start_soon(self._claim, running)
            claiming.start_soon(upkeep.run, self._tools)
            claiming.start_soon(self._try_parked)
            claiming.start_soon(self._follow_rules)
            claiming.start_soon(repair.tend, self._tools)
            await stop.wait()
            while undone():  # noqa: ASYNC110 - several things end it, and it runs once in a daemon's life
                await anyio.sleep(DRAIN_LOOK_S)
            claiming.cancel_scope.cancel()

    async def _claim(self, running: anyio.abc.TaskGroup) -> None:
        limit = self._tools.settings().jobs.running_max
        while True:
            await self._slots.acquire()
            free = 1
            while free < limit:
                try:
                    self._slots.acquire_nowait()
                except anyio.WouldBlock:
                    break
                free += 1
            claimed: list[Job] = []
            try:
                claimed = await self._tools.jobs.claim(free)
            except CkptdError as error:
                # A full disk or a busy catalog: nothing was claimed, and nothing is lost by asking again.
                log.warning("claim.failed", cause=error.code, **error.to_wire())
                await anyio.sleep(CLAIM_AGAIN_S)
            finally:
                for _ in range(free - len(claimed)):
                    self._slots.release()
            for job in claimed:
                running.start_soon(self._carry, job)
            if not claimed:
                await self._wait()

    async def _wait(self) -> None:
        try:
            await self._tools.jobs.wait()
        except CkptdError as error:
            log.warning("claim.failed", cause=error.code, **error.to_wire())
            await anyio.sleep(CLAIM_AGAIN_S)

    async def _carry(self, job: Job) -> None:
        """Take one job through its stages until it ends or has to wait."""
        try:
            while True:
                log.debug("stage.begin", stage=job.stage, checkpoint=job.checkpoint_id, job=job.id)
                begun_s = self._tools.clock.monotonic_s()
                try:
                    outcome = await self._stage(job)
                except CkptdError as error:
                    await self._failed(job, error)
                    return
                except Exception as error:
                    # A bug met by one checkpoint must not stop the others: it is parked and reported.
                    log.exception("stage.bug", stage=job.stage, checkpoint=job.checkpoint_id, job=job.id)
                    await self._failed(job, Bug(f"stage {job.stage}: {error!r}"))
                    return
                log.info(
                    "stage.done",
                    stage=job.stage,
                    checkpoint=job.checkpoint_id,
                    job=job.id,
                    ms=round((self._tools.clock.monotonic_s() - begun_s) * 1000, 1),
                )
                if isinstance(outcome, Ended):
                    return
                job = outcome.job
        except anyio.get_cancelled_exc_class():
            # A drain that ran out of time is no crash: the job is due again at once, and not one try poorer.
            with anyio.move_on_after(LAST_WORD_S, shield=True):
                await self._hand_back(job)
            raise
        finally:
            self._slots.release()

    async def _hand_back(self, job: Job) -> None:
        try:
            await self._tools.catalog.write(lambda tx: self._tools.jobs.postpone(tx, job, 0.0))
        except CkptdError as error:
            log.debug("job.not_handed_back", job=job.id, **error.to_wire())  # the next daemon finds it running

    async def _stage(self, job: Job) -> Outcome:
        """Run one stage while the job's lease is renewed beside it."""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._renew, job)
                outcome = await STAGES[job.stage](job, self._tools)
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        return outcome

    async def _renew(self, job: Job) -> None:
        lease_s = self._tools.settings().jobs.lease_s
        while True:
            await anyio.sleep(lease_s / RENEW_SHARE)
            try:
                await self._tools.jobs.renew(job)
            except TimedOut:
                raise  # somebody else carries it now
            except CkptdError as error:
                log.warning("lease.not_renewed", job=job.id, **error.to_wire())  # two thirds of it are left

    async def _failed(self, job: Job, error: CkptdError) -> None:
        """Try again what may pass; end what can't, and say so on the checkpoint."""
        passing = isinstance(error, PASSING)
        if isinstance(error, NoSpace):
            self._tools.space.ring()
        log.log(
            _WARNING if passing else _ERROR,
            "stage.failed",
            stage=job.stage,
            checkpoint=job.checkpoint_id,
            **error.to_wire(),
        )
        try:
            ended = await self._tools.catalog.write(lambda tx: self._record_failure(tx, job, error, passing=passing))
        except TimedOut:
            log.warning("claim.lost", job=job.id, checkpoint=job.checkpoint_id)  # another claim carries it now
        except CkptdError as trouble:
            # The job stays leased, and is claimed again when the lease ends.
            log.warning("failure.not_recorded", job=job.id, checkpoint=job.checkpoint_id, **trouble.to_wire())
        else:
            if ended:
                await self._tools.sources.drop(job.checkpoint_id)

    async def _record_failure(self, tx: Tx, job: Job, error: CkptdError, *, passing: bool) -> bool:
        """Write down what becomes of the job and its checkpoint; say whether the checkpoint has ended by it.

        Whatever is in the way of a memory hand-off (a directory that somebody removed, a link or a file on the
        way, a defect of ours), its bytes are in the arena or the spool, and are written when it is gone.
        """
        settings = self._tools.settings().jobs
        row = (await checkpoints.get_many(tx.conn, [job.checkpoint_id])).get(job.checkpoint_id)
        if passing and job.attempts >= settings.retries_max:
            await self._tools.jobs.put_off(tx, job, error)
            return False
        pending = row is not None and row.state is State.PENDING
        promised = pending and row is not None and row.origin is Origin.MEMORY
        held = promised and not isinstance(error, publish.MemoryGone)
        if passing or (held and not isinstance(error, Bug)):
            await self._tools.jobs.retry(tx, job, error)
            return False
        if pending and not held:
            await checkpoints.mark_failed(tx, job.checkpoint_id, error.to_wire())
        await self._tools.jobs.park(tx, job, error)
        return pending and not held

    async def _try_parked(self) -> None:
        """A hand-off whose job gave up holds memory: it has one more try after each start, and then now and then."""
        await anyio.sleep(PARKED_FIRST_S)
        while True:
            try:
                woken = await self._tools.jobs.try_parked(PARKED_MAX)
            except CkptdError as error:
                log.warning("parked.not_tried", **error.to_wire())
            else:
                if woken:
                    log.warning("parked.tried_again", jobs=woken)
            await anyio.sleep(PARKED_AGAIN_S)

    async def _follow_rules(self) -> None:
        """The configuration may have changed while no daemon ran."""
        try:
            await follow_rules(self._tools)
        except CkptdError as error:
            log.warning("best.rules_not_followed", **error.to_wire())


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
