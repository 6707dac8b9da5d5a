"""Retire what no rule, hold or promise keeps: tombstone, trash by rename, and unlink after a grace.

The order: the plan is made and its tombstones are written in ONE transaction, so that a pin, a
lease or a late metric either comes before the plan and counts, or after it and finds the checkpoint
in the trash, from where it can be restored. Then the rename, then nothing until the grace has
passed; then the unlink, then the last note. A crash between any two leaves a row that `resume()`
carries on from: a tombstone whose files still stand under their name, or a purge to be repeated.
"""

from collections import defaultdict
from collections.abc import Sequence

import structlog

from ckptd import failpoint, retention
from ckptd.catalog import audits, bests, checkpoints, holds, listing, roots
from ckptd.catalog.tombstones import tombstones_before
from ckptd.catalog.tx import Tx
from ckptd.config import Rules
from ckptd.errors import CkptdError, Held, NotFound
from ckptd.jobs import Job
from ckptd.model import Checkpoint, State
from ckptd.pipeline.tools import Ended, Outcome, Tools
from ckptd.worker.protocol import IdentityRecord, Purge, Trash

log = structlog.get_logger()

MOVES_MAX = 100  # renames per call of resume()
PURGES_MAX = 100  # unlinked per round, so that deleting never delays saving


async def run(job: Job, tools: Tools) -> Outcome:
    """Apply the rules of the job's experiment; the last stage of every job."""
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, job.checkpoint_id))
    rules = tools.settings().rules_for(checkpoint.project, checkpoint.experiment)
    if rules.deletes:
        await apply(tools, checkpoint.experiment_id, rules, linked=job.payload.get("linked", ()))
    await tools.catalog.write(lambda tx: tools.jobs.finish(tx, job))
    return Ended()


async def plan(tx_or_conn: Tx, experiment_id: str, rules: Rules) -> retention.Plan:
    """Plan for one experiment from what the catalog says inside this transaction."""
    conn = tx_or_conn.conn
    now = tx_or_conn.clock.now()
    found = await listing.of_experiment(conn, experiment_id)
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for hold in await holds.of_experiment(conn, experiment_id, now):
        reasons[hold.checkpoint_id].append(f"{hold.kind} of {hold.by}" + (f": {hold.note}" if hold.note else ""))
    for winner in await bests.current(conn, experiment_id):
        reasons[winner.checkpoint_id].append(f"best:{winner.metric}")
    known = {root.path: root for root in await roots.all_roots(conn)}
    for checkpoint in found:
        root = known.get(checkpoint.root)
        if root is None or not root.may_remove(checkpoint.origin):
            reasons[checkpoint.id].append("root does not allow deletion")
    return retention.plan(found, rules, now, reasons)


async def apply(
    tools: Tools, experiment_id: str, rules: Rules, *, only: list[str] | None = None, linked: Sequence[str] = ()
) -> retention.Plan:
    """Plan, write the tombstones, then move the files. Returns the plan that was executed.

    What can't be moved now (a hung disk) is moved by `resume()`, and holds up nothing else.

    only    the drops that a person saw and agreed to: what the new plan drops beside them stays
    linked  where links lead: a metric that came since they were placed must not leave one dangling, so
            these stay until the links have followed
    """

    async def tombstones(tx: Tx) -> retention.Plan:
        decided = await plan(tx, experiment_id, rules)
        drop = (d for d in decided.drop if d.checkpoint.id not in linked)
        decided = retention.Plan(decided.keep, tuple(d for d in drop if only is None or d.checkpoint.id in only))
        for dropped in decided.drop:
            await checkpoints.mark_trashed(tx, dropped.checkpoint.id, dropped.checkpoint.id, dropped.why)
            await audits.record(
                tx, audits.Deed(uid=-1, pid=0, verb="retention", subject=dropped.checkpoint.id, note=dropped.why)
            )
        return decided

    decided = await tools.catalog.write(tombstones)
    failpoint.hit("retain.tombstone")
    for dropped in decided.drop:
        await _try_to_move(tools, dropped.checkpoint)
    return decided


async def remove(tools: Tools, checkpoint: Checkpoint, uid: int, pid: int) -> None:
    """Move one checkpoint to the trash because a person said so. Held names what forbids it."""

    async def tombstone(tx: Tx) -> None:
        why = await kept_by(tx, checkpoint)
        if why:
            raise Held(f"checkpoint {checkpoint.id} is kept: {', '.join(why)}", holds=why)
        await checkpoints.mark_trashed(tx, checkpoint.id, checkpoint.id, f"removed by uid {uid}")
        await audits.record(tx, audits.Deed(uid=uid, pid=pid, verb="remove", subject=checkpoint.id))

    await tools.catalog.write(tombstone)
    await _try_to_move(tools, checkpoint)


async def kept_by(tx: Tx, checkpoint: Checkpoint) -> list[str]:
    """Promises that hold a checkpoint whatever the rules say (design 2.3), as reasons.

    NotFound  nothing of it is on disk: it is on its way, gone, or retired already
    """
    state = (await checkpoints.get(tx.conn, checkpoint.id)).state
    if state not in {State.LIVE, State.CORRUPT}:
        raise NotFound(f"checkpoint {checkpoint.id} is {state}: there is nothing to remove")
    why = [f"{hold.kind} of {hold.by}" for hold in await holds.of_checkpoint(tx.conn, checkpoint.id, tx.clock.now())]
    why += [
        f"best:{w.metric}"
        for w in await bests.current(tx.conn, checkpoint.experiment_id)
        if w.checkpoint_id == checkpoint.id
    ]
    newest = await listing.latest(tx.conn, checkpoint.experiment_id)
    if newest is not None and newest.id == checkpoint.id:
        why.append("newest verified of its experiment")
    return why


async def move(tools: Tools, checkpoint: Checkpoint) -> None:
    """Carry a tombstone out; safe to repeat. What is gone or is not the recorded bytes stays untouched."""
    found = await tools.catalog.read(lambda conn: checkpoints.identity(conn, checkpoint.id))
    if found is None:
        tools.moved.add(checkpoint.id)
        return
    try:
        await tools.workers.call(
            Trash(
                root=checkpoint.root,
                path=checkpoint.path,
                identity=IdentityRecord(found.dev, found.ino, found.size_bytes, found.mtime_ns, found.ctime_ns),
                trash=checkpoint.id,
            )
        )
    except CkptdError as error:
        if error.code not in {"missing", "not_found", "source_changed", "bad_path"}:
            raise
        # Nothing of ours is there any more: there is nothing to move and nothing may be touched.
        log.warning("trash.not_ours", checkpoint=checkpoint.id, path=checkpoint.path, error=error.message)
    failpoint.hit("retain.moved")
    tools.moved.add(checkpoint.id)
    await tools.sources.drop(checkpoint.id)


async def _try_to_move(tools: Tools, checkpoint: Checkpoint) -> None:
    try:
        await move(tools, checkpoint)
    except CkptdError as error:
        log.warning("trash.delayed", checkpoint=checkpoint.id, path=checkpoint.path, **error.to_wire())


async def resume(tools: Tools) -> int:
    """Carry out tombstones whose files may still stand under their final name; return how many were looked at.

    After a start that is all of them, MOVES_MAX per call; later only those that failed.
    """
    horizon = tools.clock.now()
    wanted = await tools.catalog.read(lambda conn: tombstones_before(conn, horizon))
    here = {one.id for one in wanted}
    tools.moved.intersection_update(here)
    waiting = [one for one in wanted if one.id not in tools.moved][:MOVES_MAX]
    for one in waiting:
        await _try_to_move(tools, await tools.catalog.read(lambda conn, of=one.id: checkpoints.get(conn, of)))  # type: ignore[misc]
    return len(waiting)


async def purge(tools: Tools) -> int:
    """Unlink what has lain in the trash for its grace; at most PURGES_MAX per call. Returns how many.

    One that can't be unlinked now is left for the next round and holds up no other.
    """
    now = tools.clock.now()
    purged = 0
    for one in await tools.catalog.read(lambda conn: tombstones_before(conn, now)):
        rules = tools.settings().rules_for(one.project, one.experiment)
        if (now - one.trashed_at).total_seconds() < rules.trash_grace_s:
            continue
        try:
            await _purge(tools, one.id, one.trash)
        except CkptdError as error:
            log.warning("purge.delayed", checkpoint=one.id, **error.to_wire())
            continue
        purged += 1
        if purged >= PURGES_MAX:
            break
    return purged


async def _purge(tools: Tools, checkpoint_id: str, trash: str) -> None:
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, checkpoint_id))
    if checkpoint_id not in tools.moved:
        await move(tools, checkpoint)  # in case the tombstone was never carried out
    await tools.workers.call(Purge(root=checkpoint.root, trash=trash))
    failpoint.hit("retain.purged")

    async def drop(tx: Tx) -> None:
        if (await checkpoints.get(tx.conn, checkpoint_id)).state is State.TRASHED:
            await checkpoints.mark_dropped(tx, checkpoint_id)

    await tools.catalog.write(drop)
    tools.moved.discard(checkpoint_id)
