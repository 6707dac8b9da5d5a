"""Read back what was published, past the page cache, and compare digests: the rung VERIFIED.

In the same transaction the best of each rule is decided again, so that no reader ever sees a
verified checkpoint whose best flag is still open, and nothing can retire a winner in between.
"""

import os

from ckptd import failpoint
from ckptd.best import best
from ckptd.catalog import bests, checkpoints
from ckptd.catalog.tx import Tx
from ckptd.config import Rules
from ckptd.jobs import Job
from ckptd.model import Checkpoint, Damage, Origin, State
from ckptd.pipeline.tools import Ended, Onward, Outcome, Tools
from ckptd.worker.protocol import DamageRecord, FileRecord, Verified, Verify

NEXT = "link"
REPAIR = "repair"
REPAIRS_MAX = 2  # times a damaged publish is written again from its arena


async def run(job: Job, tools: Tools) -> Outcome:
    """Verify one checkpoint. Damage while its arena still holds the bytes: written again to new inodes."""
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, job.checkpoint_id))
    if checkpoint.state not in {State.LIVE, State.CORRUPT}:
        await tools.catalog.write(lambda tx: tools.jobs.finish(tx, job))
        return Ended()
    damage = await compare(tools, checkpoint)
    if damage:
        return await _damaged(job, tools, checkpoint, damage)
    rules = tools.settings().rules_for(checkpoint.project, checkpoint.experiment)

    async def record(tx: Tx) -> Job:
        await checkpoints.mark_verified(tx, checkpoint.id)
        await refresh_best(tx, checkpoint.experiment_id, rules)
        return await tools.jobs.advance(tx, job, NEXT)

    onward = await tools.catalog.write(record)
    failpoint.hit("verify.recorded")
    return Onward(onward)


async def compare(tools: Tools, checkpoint: Checkpoint) -> list[Damage]:
    """Ask the worker to read `checkpoint` back; return what is wrong with it."""
    files = await tools.catalog.read(lambda conn: checkpoints.files(conn, checkpoint.id))
    answer: Verified = await tools.workers.call(
        Verify(
            root=checkpoint.root,
            path=checkpoint.path,
            files=[FileRecord(f.path, f.size_bytes, f.sha256, list(f.xxh3)) for f in files],
        )
    )
    return [_damage(record) for record in answer.damage]


async def refresh_best(tx: Tx, experiment_id: str, rules: Rules) -> bool:
    """Decide the best of every rule again, inside the transaction that changed what it depends on."""
    decided = {}
    for rule in rules.keep_best:
        found = await bests.candidates(tx.conn, experiment_id, rule.metric, rule.mode, rule.k)
        winners = best(found, rule)
        decided[rule.metric, rule.mode] = [(winner.checkpoint.id, winner.value) for winner in winners]
    return await bests.replace(tx, experiment_id, decided)


async def _damaged(job: Job, tools: Tools, checkpoint: Checkpoint, damage: list[Damage]) -> Outcome:
    """Say what is wrong; while an arena still holds the bytes, send the job to be written again."""
    repairs = int(job.payload.get("repairs", 0))
    image = await tools.sources.open(checkpoint.id) if checkpoint.origin is Origin.MEMORY else None
    if image is not None:
        os.close(image)
    repairable = image is not None and repairs < REPAIRS_MAX
    rules = tools.settings().rules_for(checkpoint.project, checkpoint.experiment)
    trash = f"repair-{checkpoint.id}-{repairs + 1}"

    async def record(tx: Tx) -> Job | None:
        if all(d.kind == "missing" for d in damage):
            await checkpoints.mark_missing(tx, checkpoint.id, "its files are gone")
        else:
            await checkpoints.mark_corrupt(tx, checkpoint.id, damage)
        await refresh_best(tx, checkpoint.experiment_id, rules)
        if repairable:
            return await tools.jobs.advance(tx, job, REPAIR, {**job.payload, "repairs": repairs + 1, "trash": trash})
        await tools.jobs.finish(tx, job)
        return None

    onward = await tools.catalog.write(record)
    return Ended() if onward is None else Onward(onward)


def _damage(record: DamageRecord) -> Damage:
    return Damage(record.file, record.kind, record.detail, tuple(record.mib), tuple(record.tensors))  # type: ignore[arg-type]
