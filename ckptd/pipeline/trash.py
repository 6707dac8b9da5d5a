"""What is retired: into the trash by rename, back out of it, or unlinked when its grace has passed.

DROPPED is only what was in the trash: files that are neither there nor, unchanged, under their name
were not retired by us, and their row says MISSING. The note before the unlink tells the two apart
for whoever comes after a crash: it is written while the files are known to lie in the trash.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta

import anyio
import structlog

from ckptd import failpoint
from ckptd.catalog import audits, checkpoints, holds
from ckptd.catalog.checkpoint_rows import identity_and_state
from ckptd.catalog.tombstones import Graveyard, Tombstone, give_up_inodes, graveyards, retired_after, retired_before
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError, Missing, NotFound
from ckptd.jobs import NewJob
from ckptd.model import Checkpoint, Identity, Level, State
from ckptd.pipeline import owner, strip
from ckptd.pipeline.deed import to_its_end
from ckptd.pipeline.tools import Tools
from ckptd.pipeline.winners import refresh_best
from ckptd.worker.protocol import IdentityRecord, Purge, Restore, Settle, Settlement, Trash

log = structlog.get_logger()

Record = Callable[[Tx, Identity], Awaitable[Checkpoint]]

MOVES_MAX = 5  # renames in a row; then saves go first
REST_S = 0.05  # after these
LOOKED_MAX = 2_000  # tombstones of one look: the event loop takes them in one piece
PURGES_MAX = 100  # unlinked per round, so that deleting never delays saving
NOTED_MAX = 20  # unlinked before that is written down, all of them in one transaction


async def move(tools: Tools, checkpoint: Checkpoint) -> None:
    """Carry a tombstone out; safe to repeat. What is not the recorded bytes stays untouched, and the row is MISSING."""
    async with tools.emptying[checkpoint.root]:
        is_done = await to_its_end(lambda: _carry_out(tools, checkpoint))
    if is_done:
        failpoint.hit("retain.moved")
        await tools.sources.drop(checkpoint.id)


async def _carry_out(tools: Tools, checkpoint: Checkpoint) -> bool:
    """Move it, if it is to be moved; return whether it was. The caller holds the root's `emptying`."""
    found, state = await tools.catalog.read(lambda conn: identity_and_state(conn, checkpoint.id))
    if state is not State.TRASHED:  # restored meanwhile
        return False
    if found is None:  # its unlinking has begun
        tools.moved.add(checkpoint.id)
        return False
    try:
        await tools.workers.call(
            Trash(
                root=checkpoint.root,
                path=checkpoint.path,
                identity=_recorded(found),
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
    return True


def _recorded(found: Identity) -> IdentityRecord:
    return IdentityRecord(found.dev, found.ino, found.size_bytes, found.mtime_ns, found.ctime_ns)


async def _not_ours(tools: Tools, checkpoint: Checkpoint, error: CkptdError) -> None:
    """Nothing of ours is there any more: there is nothing to move, nothing may be touched, and that is what is said."""
    log.warning("trash.not_ours", checkpoint=checkpoint.id, path=checkpoint.path, error=error.message)

    async def gone(tx: Tx) -> None:
        if await checkpoints.state_of(tx.conn, checkpoint.id) is State.TRASHED:
            why = f"when it was to be retired, its files were not there any more: {error.message}"
            await checkpoints.mark_missing(tx, checkpoint.id, why)

    await tools.catalog.write(gone)


async def try_to_move(tools: Tools, checkpoint: Checkpoint) -> None:
    """Move, or say in the log that it has to wait."""
    try:
        await move(tools, checkpoint)
    except CkptdError as error:
        log.warning("trash.delayed", checkpoint=checkpoint.id, path=checkpoint.path, **error.to_wire())


async def resume(tools: Tools) -> int:
    """Carry out tombstones whose files may still stand under their final name; return how many were looked at.

    After a start that is all of them; later what a large plan left over, and those that failed.
    """
    waiting = await _unmoved(tools)
    for number, one in enumerate(waiting, 1):
        if number % MOVES_MAX == 0:
            await anyio.sleep(REST_S)
        await try_to_move(tools, await tools.catalog.read(lambda conn, of=one: checkpoints.get(conn, of)))  # type: ignore[misc]
    return len(waiting)


async def _unmoved(tools: Tools) -> list[str]:
    """Name what is retired and not known to lie in the trash; of what is not retired any more forget that it does."""
    gone, waiting, after = set(tools.moved), [], 0
    while True:
        page = await tools.catalog.read(lambda conn, after=after: retired_after(conn, after, LOOKED_MAX))  # type: ignore[misc]
        waiting += [one for _, one in page if one not in tools.moved]
        gone.difference_update(one for _, one in page)
        if len(page) < LOOKED_MAX:
            tools.moved.difference_update(gone)
            return waiting
        after = page[-1][0]


async def restore(tools: Tools, checkpoint: Checkpoint, uid: int, pid: int, *, pin: bool) -> Checkpoint:
    """Move a retired checkpoint back to its place, and pin it so that the rules do not retire it again.

    Below VERIFIED it is read back by a job, entered in the same transaction.

    NotFound  it is not in the trash, or its unlinking has begun
    Exists    something else has its place; both stay as they are
    Missing   the trash does not hold it any more, and what lies in its place is not it: nothing was touched
    """

    async def record(tx: Tx, seen: Identity) -> Checkpoint:
        after = await checkpoints.mark_restored(tx, checkpoint.id, checkpoint.path, seen)
        await refresh_best(tx, after, tools.settings().rules_for(after.project, after.experiment))
        if pin:
            await holds.pin(tx, checkpoint.id, uid, "restored from the trash")
        await audits.record(tx, audits.Deed(uid=uid, pid=pid, verb="restore", subject=checkpoint.id))
        if after.state is State.LIVE and after.level.rank < Level.VERIFIED.rank:
            lane = f"{checkpoint.id}/recheck"
            job = NewJob(checkpoint_id=checkpoint.id, lane=lane, stage="verify", can_wait=True)
            await tools.jobs.enqueue_behind(tx, job)
        return after

    async with tools.emptying[checkpoint.root]:
        return await to_its_end(lambda: _bring_back(tools, checkpoint, record))


async def _bring_back(tools: Tools, checkpoint: Checkpoint, record: Record) -> Checkpoint:
    """Ask the worker, then write it down. The caller holds the root's `emptying`.

    From the question until the catalog has the answer nobody knows where the files are: the worker may have
    moved them before it died, was given up, or the write failed. `moved` must not say that they are in the trash
    then: a purge would unlink nothing and write DROPPED, and the files would be forgotten where they lie. Without
    it, whoever comes next (resume(), or the purge itself) asks the worker for the move into the trash once more,
    which is right in both cases.
    """
    found, state = await tools.catalog.read(lambda conn: identity_and_state(conn, checkpoint.id))
    if state is not State.TRASHED or found is None:
        why = "its unlinking has begun" if state is State.TRASHED else f"it is {state}"
        raise NotFound(f"checkpoint {checkpoint.id} is not in the trash any more: {why}")
    tools.moved.discard(checkpoint.id)
    try:
        await tools.workers.call(
            Restore(
                root=checkpoint.root,
                path=checkpoint.path,
                identity=_recorded(found),
                trash=checkpoint.id,
                checkpoint=checkpoint.id,
                owner=await owner.of_checkpoint(tools, checkpoint.id),
            )
        )
        failpoint.hit("restore.moved")
        seen = await _look(tools, checkpoint)
        return await tools.catalog.write(lambda tx: record(tx, seen))
    except BaseException:
        tools.trashed.ring()  # nothing was written, so upkeep would not look by itself
        raise


async def _look(tools: Tools, checkpoint: Checkpoint) -> Identity:
    answer: Settlement = await tools.workers.call(
        Settle(root=checkpoint.root, path=checkpoint.path, quiet_s=0.0, told=True)
    )
    seen = answer.identity
    if seen is None:
        raise Missing(f"{checkpoint.path} is not there", path=checkpoint.path)
    return Identity(seen.dev, seen.ino, seen.size_bytes, seen.mtime_ns, seen.ctime_ns)


async def purge(tools: Tools) -> int:
    """Unlink what has lain in the trash for its grace; at most PURGES_MAX per call. Returns how many.

    One that can't be unlinked now is left for the next round and holds up no other.
    """
    await tools.catalog.follow_clock()
    tools.delayed.clear()
    purged = 0
    for graveyard in await tools.catalog.read(graveyards):
        if purged < PURGES_MAX:
            purged += await _purge_of(tools, graveyard, PURGES_MAX - purged)
    await tools.catalog.follow_clock()  # unlinking takes its time
    return purged + await strip.purge(tools, PURGES_MAX - purged)


async def _purge_of(tools: Tools, graveyard: Graveyard, at_most: int) -> int:
    """Unlink what is due of one experiment. In pages: what can't be unlinked now does not stand before what can."""
    grace_s = tools.settings().rules_for(graveyard.project, graveyard.experiment).trash_grace_s
    now = tools.clock.now()
    if (now - graveyard.since).total_seconds() < grace_s:
        return 0
    grace = timedelta(seconds=grace_s)  # no time before all times: something is as old as that
    purged = after = 0
    while purged < at_most:
        # Decided in a transaction, whose clock and rows are of one mind, whatever was set since `now`.
        page = await tools.catalog.write(
            lambda tx, after=after: retired_before(tx.conn, graveyard, tx.clock.now() - grace, after)  # type: ignore[misc]
        )
        due = page[: at_most - purged]
        if not due:
            break
        purged += await unlink(tools, due, len(due))
        after = due[-1].sequence
    return purged


async def unlink(tools: Tools, due: Sequence[Tombstone], at_most: int) -> int:
    """Unlink these for good, whatever their grace; return how many. What a pin or a lease holds stays."""
    purged = 0
    begun = (await _begun(tools, due))[:at_most]
    for start in range(0, len(begun), NOTED_MAX):
        gone = []
        for one in begun[start : start + NOTED_MAX]:
            try:
                if await _unlink_one(tools, one):
                    gone.append(one)
            except CkptdError as error:
                log.warning("purge.delayed", checkpoint=one.id, **error.to_wire())
                tools.delayed.add(one.id)
        purged += await _note(tools, gone)
    return purged


async def _begun(tools: Tools, due: Sequence[Tombstone]) -> list[Tombstone]:
    """Return those that lie in the trash, once it is noted that their unlinking has begun."""
    for one in due:
        if one.id not in tools.moved:  # never carried out, or by an earlier daemon
            await try_to_move(tools, await tools.catalog.read(lambda conn, of=one.id: checkpoints.get(conn, of)))  # type: ignore[misc]
    rows = await tools.catalog.read(lambda conn: checkpoints.get_many(conn, [one.id for one in due]))
    by_root: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows.values():
        by_root[row.root].append(row.id)
    begun: set[str] = set()
    for root, ids in by_root.items():
        # Under the lock, so that none of them is on its way back while its inode is given up: what a restore
        # has begun with is not in `moved`, and what is given up no restore begins with.
        async with tools.emptying[root]:
            there = [one for one in ids if one in tools.moved]
            if there:
                begun.update(await tools.catalog.write(lambda tx, of=there: give_up_inodes(tx, of)))  # type: ignore[misc]
                failpoint.hit("retain.purging")
    tools.delayed.update(one.id for one in due if one.id not in tools.moved)
    return [one for one in due if one.id in begun]


async def _unlink_one(tools: Tools, one: Tombstone) -> bool:
    """Unlink it; False when it is not TRASHED any more, and nothing was touched."""
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, one.id))
    async with tools.emptying[checkpoint.root]:
        if await tools.catalog.read(lambda conn: checkpoints.state_of(conn, one.id)) is not State.TRASHED:
            return False
        # What was taken out of it before goes first: nobody would look for it once its checkpoint is gone.
        await strip.unlink_with(tools, checkpoint)
        await tools.workers.call(Purge(root=checkpoint.root, trash=one.trash))
    failpoint.hit("retain.purged")
    return True


async def _note(tools: Tools, gone: Sequence[Tombstone]) -> int:
    """Write down that these are unlinked. A crash before it repeats an unlink that finds nothing."""

    async def drop(tx: Tx) -> None:
        for one in gone:
            if await checkpoints.state_of(tx.conn, one.id) is State.TRASHED:
                await checkpoints.mark_dropped(tx, one.id)

    if not gone:
        return 0
    try:
        await tools.catalog.write(drop)
    except CkptdError as error:
        log.warning("purge.not_noted", checkpoints=len(gone), **error.to_wire())
        tools.delayed.update(one.id for one in gone)
        return 0
    failpoint.hit("retain.recorded")
    tools.moved.difference_update(one.id for one in gone)
    return len(gone)
