"""Take optimizer states out of checkpoints that stay, undo it while the trash holds them, and unlink them after the grace.

Intent first: the rows of the files say `stripped` before the first of them moves, so that no reader and
no verification counts on bytes that may be on the move, and a reader who holds a lease already keeps
the strip from beginning. Then the worker (worker/strip.py says why its order is safe), then the note. A
crash between any two leaves a state that resume() carries on from; each step can be repeated.
"""

from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import structlog

from ckptd import failpoint
from ckptd.catalog import audits, bests, burials, checkpoints, holds, listing, strips
from ckptd.catalog.strips import Heap, Strip, StripState
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError, NotFound
from ckptd.model import Checkpoint, Identity, State
from ckptd.pipeline.tools import Tools
from ckptd.rules import Rules
from ckptd.worker import protocol
from ckptd.worker.protocol import Purge, Stripped

log = structlog.get_logger()

STRIPS_MAX = 16  # carried out before a job goes on to the next save, per call of resume(), and in one commit of purge()


async def begin_all(tools: Tools, rows: Sequence[Checkpoint], rules: Rules) -> tuple[Checkpoint, ...]:
    """Begin to strip these, unless a promise holds one by now; return those that were begun.

    The first STRIPS_MAX are carried out before this returns, the others by resume().
    """
    begun = []
    for row in rows:
        found = await tools.catalog.write(partial(_begin, row=row, rules=rules))
        if found is not None:
            begun.append((row, found))
    if begun:
        failpoint.hit("strip.planned")
    for row, found in begun[:STRIPS_MAX]:
        await _try(tools, row, found)
    return tuple(row for row, _ in begun)


async def _begin(tx: Tx, row: Checkpoint, rules: Rules) -> Strip | None:
    now = await checkpoints.get(tx.conn, row.id)
    newest = await listing.latest(tx.conn, row.experiment_id)
    if not now.is_good or newest is None or newest.id == row.id:
        return None
    if await holds.of_checkpoint(tx.conn, row.id, tx.clock.now()) or await bests.of_checkpoints(tx.conn, [row.id]):
        return None
    found = await strips.begin(tx, row.id, rules.strip_files)
    if found is not None:
        note = f"{', '.join(found.files)}: not among the newest {rules.strip_after}"
        deed = audits.Deed(uid=burials.RETENTION_UID, pid=0, verb="strip", subject=row.id, note=note)
        await audits.record(tx, deed)
    return found


async def resume(tools: Tools) -> int:
    """Carry on what was begun, strips and undoings; return how many were looked at."""
    waiting = await tools.catalog.read(lambda conn: strips.in_state(conn, StripState.STRIPPING, StripState.UNDOING))
    for one in waiting[:STRIPS_MAX]:
        row = await tools.catalog.read(lambda conn, of=one.checkpoint_id: checkpoints.get(conn, of))  # type: ignore[misc]
        if row.state in {State.LIVE, State.CORRUPT}:
            await _try(tools, row, one)
    return min(len(waiting), STRIPS_MAX)


async def _try(tools: Tools, row: Checkpoint, one: Strip) -> None:
    try:
        await carry(tools, row, one)
    except CkptdError as error:
        log.warning("strip.delayed", checkpoint=row.id, path=row.path, **error.to_wire())


async def carry(tools: Tools, row: Checkpoint, one: Strip) -> None:
    """Carry a strip or its undoing out, and write it down."""
    async with tools.emptying[row.root]:
        state = await _state(tools, row.id)
        if state not in {StripState.STRIPPING, StripState.UNDOING}:
            return  # somebody else did
        files, name = dict(one.files), bin_of(row.id)
        request: protocol.Strip | protocol.Unstrip
        if state is StripState.STRIPPING:
            at = one.at.isoformat()
            request = protocol.Strip(root=row.root, path=row.path, checkpoint=row.id, files=files, trash=name, at=at)
        else:
            request = protocol.Unstrip(root=row.root, path=row.path, checkpoint=row.id, files=files, trash=name)
        answer: Stripped = await tools.workers.call(request)
        failpoint.hit("strip.moved")
        seen = answer.identity
        found = Identity(seen.dev, seen.ino, seen.size_bytes, seen.mtime_ns, seen.ctime_ns)

        async def record(tx: Tx) -> None:
            await (strips.finish if state is StripState.STRIPPING else strips.undone)(tx, one, found)

        await tools.catalog.write(record)
    failpoint.hit("strip.recorded")


async def _state(tools: Tools, checkpoint_id: str) -> StripState | None:
    one = await tools.catalog.read(lambda conn: strips.of_checkpoint(conn, checkpoint_id))
    return None if one is None else one.state


async def undo(tools: Tools, row: Checkpoint, uid: int, pid: int, *, pin: bool) -> Strip:
    """Put back what was taken out of a checkpoint, and pin it so that the rules do not take it out again.

    NotFound  nothing was taken out, or the trash has been emptied since
    """

    async def mean(tx: Tx) -> Strip:
        one = await strips.of_checkpoint(tx.conn, row.id)
        if one is None:
            raise NotFound(f"checkpoint {row.id} is {row.state}, and nothing was taken out of it: nothing to restore")
        if one.state is StripState.GONE:
            raise NotFound(f"{', '.join(one.files)} of checkpoint {row.id} are gone: the trash was emptied")
        await strips.undo(tx, one)
        if pin:
            await holds.pin(tx, row.id, uid, "its optimizer state was restored")
        await audits.record(tx, audits.Deed(uid=uid, pid=pid, verb="unstrip", subject=row.id))
        return one

    one = await tools.catalog.write(mean)
    await carry(tools, row, one)
    return one


async def purge(tools: Tools, at_most: int) -> int:
    """Unlink what was taken out and has lain in the trash for its grace; so many at most. Returns how many."""
    purged = 0
    for heap in await tools.catalog.read(strips.heaps):
        if purged < at_most:
            purged += await _purge_of(tools, heap, at_most - purged)
    return purged


async def _purge_of(tools: Tools, heap: Heap, at_most: int) -> int:
    """Unlink what is due of one experiment, intent first. In pages: what can't be unlinked now holds up nothing."""
    grace_s = tools.settings().rules_for(heap.project, heap.experiment).trash_grace_s
    over = (tools.clock.now() - heap.since).total_seconds() >= grace_s
    if not over and not heap.begun:
        return 0
    grace = timedelta(seconds=grace_s) if over else None  # no time before all times: something is as old as that
    purged = after = 0
    while purged < at_most:
        wanted = min(STRIPS_MAX, at_most - purged)
        page = await tools.catalog.write(
            lambda tx, after=after, wanted=wanted: strips.purge(tx, heap, grace, after, wanted)  # type: ignore[misc]
        )
        if page:
            failpoint.hit("strip.purging")
            after = page[-1][0]
        for _, checkpoint_id in page:
            purged += await _unlink(tools, checkpoint_id)
        if len(page) < wanted:  # the last: no commit to learn that there is no other
            break
    return purged


async def _unlink(tools: Tools, checkpoint_id: str) -> bool:
    row = await tools.catalog.read(lambda conn: checkpoints.get(conn, checkpoint_id))
    try:
        await tools.workers.call(Purge(root=row.root, trash=bin_of(checkpoint_id)))
    except CkptdError as error:
        log.warning("purge.delayed", checkpoint=checkpoint_id, **error.to_wire())
        tools.delayed.add(checkpoint_id)
        return False
    await tools.catalog.write(lambda tx: strips.purged(tx, checkpoint_id))
    return True


async def unlink_with(tools: Tools, row: Checkpoint) -> None:
    """Unlink what was taken out of a checkpoint that is being unlinked itself."""
    one = await tools.catalog.read(lambda conn: strips.of_checkpoint(conn, row.id))
    if one is not None and one.state is not StripState.GONE:
        await tools.workers.call(Purge(root=row.root, trash=bin_of(row.id)))


def bin_of(checkpoint_id: str) -> str:
    """Name in the trash of what was taken out of a checkpoint."""
    return f"{checkpoint_id}.stripped"
