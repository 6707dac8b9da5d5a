"""Carry on with a large plan of which a save's own job has retired the oldest.

A job beside the saves, in a lane of its own for each experiment: it is a row, so a daemon that dies goes on
with it when it is back. Each run does some of the plan and gives its slot back; one experiment at a time,
because what a save waits for is the writer, which they would only share.
"""

from ckptd.catalog import checkpoints
from ckptd.catalog.tx import Tx
from ckptd.jobs import Job
from ckptd.pipeline import link, retain
from ckptd.pipeline.retain import Carried, Wanted
from ckptd.pipeline.tools import Ended, Outcome, Tools

AT_ONCE = 200  # retired in one run: a plan is made for each, and a daemon that stops waits for the end of one
LOOK_S = 5.0  # another experiment's is being carried out: come back


async def run(job: Job, tools: Tools) -> Outcome:
    """Retire the oldest AT_ONCE that hooks were not asked about, and come again while there is more."""
    if tools.resting.locked():
        await tools.catalog.write(lambda tx: tools.jobs.postpone(tx, job, LOOK_S))
        return Ended()
    past = int(job.payload.get("past", 0))
    async with tools.resting:
        carried = await _carry_on(tools, job.checkpoint_id, past)

    async def end(tx: Tx) -> None:
        if carried is not None and carried.leaves:
            await tools.jobs.postpone(tx, job, 0.0, {"past": past + carried.objected})
        else:
            await tools.jobs.finish(tx, job)

    await tools.catalog.write(end)
    return Ended()


async def _carry_on(tools: Tools, checkpoint_id: str, past: int) -> Carried | None:
    """Do some more of the plan. None: the rules have changed, and delete nothing now."""
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, checkpoint_id))
    rules = tools.settings().rules_for(checkpoint.project, checkpoint.experiment)
    if not rules.deletes:
        return None
    linked = await link.place(tools, checkpoint)  # first: a metric may have come since they were placed
    wanted = Wanted(linked=linked, by_itself=True, at_once=AT_ONCE, past=past)
    return await retain.carry_out(tools, checkpoint.experiment_id, rules, wanted)
