"""Write a damaged publish again, from the arena that still holds its bytes, to new inodes.

The damaged directory is moved aside first (its name must be free), and kept as evidence until what was
written in its place is verified. Every step can be repeated: a crash in between finds the name free, or
the new directory already there under the same checkpoint id, which the worker adopts.

Whoever found the damage has marked the copy (`Sources.keep`), so that no trainer is lent its memory while
the repair waits for its turn. The worker compares what it wrote with the digests of the catalog before it
gives a name to it: where the two disagree the memory is not the checkpoint's, and the repair ends.

A repair that can't go on leaves things as they were: the damaged directory under its name, nothing of its own.
"""

import os

import anyio
import structlog

from ckptd import failpoint
from ckptd.catalog import checkpoints, experiments, queue
from ckptd.catalog.checkpoint_rows import identity_and_state
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError, SourceChanged
from ckptd.jobs import Job
from ckptd.model import Checkpoint, Identity, JobState, State
from ckptd.pipeline import owner
from ckptd.pipeline.manifest import amend, manifest
from ckptd.pipeline.tools import Onward, Outcome, Tools
from ckptd.worker.protocol import (
    FileImage,
    IdentityRecord,
    Publish,
    Published,
    Purge,
    Restore,
    Settle,
    Settlement,
    Trash,
)

log = structlog.get_logger()

NEXT = "verify"
GIVEN_UP = "link"  # the links must not lead here any more
DAMAGED = frozenset({State.CORRUPT, State.MISSING})
KEPT_LOOK_S = 60.0  # between two looks at copies that are kept for a repair which may have ended
_GONE = frozenset({"missing", "not_found"})


async def run(job: Job, tools: Tools) -> Outcome:
    """Replace the damaged directory; the checkpoint stays as it is until the next verify says otherwise."""
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, job.checkpoint_id))
    if checkpoint.state is State.LIVE:  # read back by somebody else meanwhile, and good
        return Onward(await tools.catalog.write(lambda tx: tools.jobs.advance(tx, job, NEXT)))
    fd = await tools.sources.open(checkpoint.id) if checkpoint.state in DAMAGED else None
    if fd is None:
        return await _given_up(job, tools, checkpoint)
    try:
        if not await _aside(tools, checkpoint, job.payload["trash"]):
            return await _given_up(job, tools, checkpoint)
        failpoint.hit("repair.aside")
        written = await _write(job, tools, checkpoint, fd)
    except SourceChanged as error:
        log.error("repair.other_bytes", checkpoint=checkpoint.id, **error.to_wire())  # noqa: TRY400 - the text says it all
        await tools.sources.drop(checkpoint.id)
        return await _given_up(job, tools, checkpoint)
    finally:
        os.close(fd)
    failpoint.hit("repair.written")
    onward = await tools.catalog.write(lambda tx: _record(tx, job, tools, (checkpoint, written)))
    return await _given_up(job, tools, checkpoint) if onward is None else Onward(onward)


async def _write(job: Job, tools: Tools, checkpoint: Checkpoint, fd: int) -> Published:
    """Have the worker write it again. SourceChanged: the memory does not hold what the catalog has recorded."""
    experiment = await tools.catalog.read(lambda conn: experiments.get(conn, checkpoint.experiment_id))
    recorded = await tools.catalog.read(lambda conn: checkpoints.files(conn, checkpoint.id))
    written: Published = await tools.workers.call(
        Publish(
            root=checkpoint.root,
            target=checkpoint.path,
            files=[FileImage(f["path"], f["offset"], f["size_bytes"]) for f in job.payload["descriptor"]["files"]],
            manifest=manifest(checkpoint, experiment, checkpoint.revision),
            sha256={file.path: file.sha256 for file in recorded},
            owner=owner.of_user(tools, experiment.uid),
        ),
        arena_fd=fd,
    )
    return written


async def _record(tx: Tx, job: Job, tools: Tools, made: tuple[Checkpoint, Published]) -> Job | None:
    """Note the new inode; None when the checkpoint was retired while it was written."""
    before, written = made
    row = await checkpoints.get(tx.conn, before.id)
    if row.state not in DAMAGED | {State.LIVE}:
        return None
    new = written.identity
    found = Identity(new.dev, new.ino, new.size_bytes, new.mtime_ns, new.ctime_ns)
    await checkpoints.set_identity(tx, row.id, found, written.manifest_sha256)
    if (written.adopted and row.metrics) or row.metrics != before.metrics:
        await amend(tx, tools.jobs, row)
    return await tools.jobs.advance(tx, job, NEXT)


async def _aside(tools: Tools, of: Checkpoint, trash: str) -> bool:
    """Make its name free; False when it was retired meanwhile."""
    async with tools.emptying[of.root]:
        damaged, state = await tools.catalog.read(lambda conn: identity_and_state(conn, of.id))
        if damaged is None or state is not State.CORRUPT:
            return state in DAMAGED
        wanted = Trash(root=of.root, path=of.path, identity=_plain(damaged), trash=trash, checkpoint=of.id)
        failed = await _tried(tools, wanted)
        if failed is not None and failed.code == "exists":
            # What an earlier repair of it moved aside, which came to nothing.
            await tools.workers.call(Purge(root=of.root, trash=trash))
            failed = await _tried(tools, wanted)
        # Gone, or no longer the damaged inode: an earlier try of this stage came this far.
        if failed is not None and failed.code not in _GONE | {"source_changed"}:
            raise failed
    return True


async def _tried(tools: Tools, wanted: Trash) -> CkptdError | None:
    try:
        await tools.workers.call(wanted)
    except CkptdError as error:
        return error
    return None


async def _given_up(job: Job, tools: Tools, checkpoint: Checkpoint) -> Outcome:
    """There is nothing to repair any more, or nothing to repair it from."""
    await _undo(tools, checkpoint, job.payload["trash"])
    tools.sources.let_go(checkpoint.id)
    return Onward(await tools.catalog.write(lambda tx: tools.jobs.advance(tx, job, GIVEN_UP)))


async def _undo(tools: Tools, of: Checkpoint, trash: str) -> None:
    """Take away what this repair has written, and put back what it moved aside. Safe to repeat.

    Which is which, the catalog's inode tells: it is the damaged one until a repair has been recorded. What is
    neither, and does not name this checkpoint, is somebody else's and stays.
    """
    undone = f"{trash}-undone"
    async with tools.emptying[of.root]:
        recorded, state = await tools.catalog.read(lambda conn: identity_and_state(conn, of.id))
        answer: Settlement = await tools.workers.call(Settle(root=of.root, path=of.path, quiet_s=0.0, told=True))
        seen = answer.identity
        if seen is not None and (recorded is None or not recorded.means(_found(seen))):
            ours = Trash(root=of.root, path=of.path, identity=seen, trash=undone, checkpoint=of.id, named=True)
            try:
                await tools.workers.call(ours)
            except CkptdError as error:
                if error.code not in _GONE | {"source_changed"}:
                    raise
        await tools.workers.call(Purge(root=of.root, trash=undone))
        if recorded is None or state not in DAMAGED | {State.TRASHED}:
            await tools.workers.call(Purge(root=of.root, trash=trash))
            return
        try:
            await tools.workers.call(
                Restore(
                    root=of.root,
                    path=of.path,
                    identity=_plain(recorded),
                    trash=trash,
                    checkpoint=of.id,
                    owner=await owner.of_checkpoint(tools, of.id),
                )
            )
        except CkptdError as error:
            if error.code not in _GONE | {"exists", "source_changed"}:  # it never moved, or its name is another's now
                raise


async def tend(tools: Tools) -> None:
    """Let go of copies that were kept for a repair whose job is no more. Until cancelled.

    Two looks in a row: who finds damage marks the copy first and makes the job after it.
    """
    idle: set[str] = set()
    while True:
        await anyio.sleep(KEPT_LOOK_S)
        try:
            idle = await let_go_of_ended(tools, idle)
        except CkptdError as error:
            log.warning("kept.not_looked", **error.to_wire())


async def let_go_of_ended(tools: Tools, idle: set[str]) -> set[str]:
    """Let go of those that had no job at the last look (`idle`) and have none now; return those that have none now."""
    jobless = set()
    for one in tools.sources.kept():
        job = await tools.catalog.read(lambda conn, of=one: queue.of_checkpoint(conn, of))  # type: ignore[misc]
        if job is not None and job.state is not JobState.PARKED:
            continue
        if one in idle:
            tools.sources.let_go(one)
        else:
            jobless.add(one)
    return jobless


def _plain(of: Identity) -> IdentityRecord:
    return IdentityRecord(of.dev, of.ino, of.size_bytes, of.mtime_ns, of.ctime_ns)


def _found(of: IdentityRecord) -> Identity:
    return Identity(of.dev, of.ino, of.size_bytes, of.mtime_ns, of.ctime_ns)
