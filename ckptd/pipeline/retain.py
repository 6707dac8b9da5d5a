"""Retire what no rule, hold or promise keeps: tombstone, trash by rename, and unlink after a grace.

The order: the plan is made and its tombstones are written in ONE transaction, so that a pin, a
lease or a late metric either comes before the plan and counts, or after it and finds the checkpoint
in the trash, from where it can be restored. Then the rename, then nothing until the grace has
passed; then the note that the unlink begins, the unlink, and the last note. A crash between any two
leaves a row that `resume()` carries on from: a tombstone whose files still stand under their name,
or a purge to be repeated.

DROPPED is only what was in the trash: files that are neither there nor, unchanged, under their name
were not retired by us, and their row says MISSING. The note before the unlink tells the two apart
for whoever comes after a crash: it is written while the files are known to lie in the trash.
"""

from collections import defaultdict
from collections.abc import Sequence

import structlog

from ckptd import failpoint, retention
from ckptd.catalog import audits, bests, checkpoints, holds, listing, roots
from ckptd.catalog.tombstones import Tombstone, give_up_inodes, tombstones_before
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
        if decided.drop:
            failpoint.hit("retain.planned")
        for dropped in decided.drop:
            await checkpoints.mark_trashed(tx, dropped.checkpoint.id, dropped.checkpoint.id, dropped.why)
            await audits.record(
                tx, audits.Deed(uid=-1, pid=0, verb="retention", subject=dropped.checkpoint.id, note=dropped.why)
            )
        return decided

    await tools.catalog.follow_clock()
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
    """Carry a tombstone out; safe to repeat. What is not the recorded bytes stays untouched, and the row is MISSING."""
    found = await tools.catalog.read(lambda conn: checkpoints.identity(conn, checkpoint.id))
    if found is None:  # its unlinking has begun
        tools.moved.add(checkpoint.id)
        return
    try:
        await tools.workers.call(
            Trash(
                root=checkpoint.root,
                path=checkpoint.path,
                identity=IdentityRecord(found.dev, found.ino, found.size_bytes, found.mtime_ns, found.ctime_ns),
                trash=checkpoint.id,
                checkpoint=checkpoint.id,
            )
        )
    except CkptdError as error:
        if error.code not in {"missing", "not_found", "source_changed", "bad_path"}:
            raise
        await _not_ours(tools, checkpoint, error)
    else:
        tools.moved.add(checkpoint.id)
    failpoint.hit("retain.moved")
    await tools.sources.drop(checkpoint.id)


async def _not_ours(tools: Tools, checkpoint: Checkpoint, error: CkptdError) -> None:
    """Nothing of ours is there any more: there is nothing to move, nothing may be touched, and that is what is said."""
    log.warning("trash.not_ours", checkpoint=checkpoint.id, path=checkpoint.path, error=error.message)

    async def gone(tx: Tx) -> None:
        if await checkpoints.state_of(tx.conn, checkpoint.id) is State.TRASHED:
            why = f"when it was to be retired, its files were not there any more: {error.message}"
            await checkpoints.mark_missing(tx, checkpoint.id, why)

    await tools.catalog.write(gone)


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
    await tools.catalog.follow_clock()
    now = tools.clock.now()
    due = []
    for one in await tools.catalog.read(lambda conn: tombstones_before(conn, now)):
        rules = tools.settings().rules_for(one.project, one.experiment)
        if (now - one.trashed_at).total_seconds() >= rules.trash_grace_s:
            due.append(one)
    purged = 0
    tools.delayed.clear()
    for start in range(0, len(due), PURGES_MAX):
        for one in await _begun(tools, due[start : start + PURGES_MAX]):
            try:
                await _purge(tools, one)
            except CkptdError as error:
                log.warning("purge.delayed", checkpoint=one.id, **error.to_wire())
                tools.delayed.add(one.id)
                continue
            purged += 1
            if purged >= PURGES_MAX:
                return purged
    return purged


async def _begun(tools: Tools, due: list[Tombstone]) -> list[Tombstone]:
    """Return those that lie in the trash, once it is noted that their unlinking has begun."""
    for one in due:
        if one.id not in tools.moved:  # never carried out, or by an earlier daemon
            await _try_to_move(tools, await tools.catalog.read(lambda conn, of=one.id: checkpoints.get(conn, of)))  # type: ignore[misc]
    there = [one for one in due if one.id in tools.moved]
    tools.delayed.update(one.id for one in due if one.id not in tools.moved)
    if not there:
        return []
    begun = await tools.catalog.write(lambda tx: give_up_inodes(tx, [one.id for one in there]))
    failpoint.hit("retain.purging")
    return [one for one in there if one.id in begun]


async def _purge(tools: Tools, one: Tombstone) -> None:
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, one.id))
    await tools.workers.call(Purge(root=checkpoint.root, trash=one.trash))
    failpoint.hit("retain.purged")

    async def drop(tx: Tx) -> None:
        if await checkpoints.state_of(tx.conn, one.id) is State.TRASHED:
            await checkpoints.mark_dropped(tx, one.id)

    await tools.catalog.write(drop)
    failpoint.hit("retain.recorded")
    tools.moved.discard(one.id)
