"""Write a damaged publish again, from the arena that still holds its bytes, to new inodes.

The damaged directory is moved aside first (its name must be free), kept as evidence until the
trash is emptied. Every step can be repeated: a crash in between finds the name free, or the new
directory already there under the same checkpoint id, which the worker adopts.
"""

import os

from ckptd.catalog import checkpoints, experiments
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError
from ckptd.jobs import Job
from ckptd.model import Checkpoint, Identity, State
from ckptd.pipeline.manifest import amend, manifest
from ckptd.pipeline.tools import Ended, Onward, Outcome, Tools
from ckptd.worker.protocol import FileImage, IdentityRecord, Publish, Published, Trash

NEXT = "verify"


async def run(job: Job, tools: Tools) -> Outcome:
    """Replace the damaged directory; the checkpoint stays as it is until the next verify says otherwise."""
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, job.checkpoint_id))
    fd = await tools.sources.open(checkpoint.id)
    if fd is None:
        await tools.catalog.write(lambda tx: tools.jobs.finish(tx, job))
        return Ended()
    try:
        damaged = await tools.catalog.read(lambda conn: checkpoints.identity(conn, checkpoint.id))
        if damaged is not None and checkpoint.state is not State.MISSING:
            await _aside(tools, checkpoint, damaged, job.payload["trash"])
        experiment = await tools.catalog.read(lambda conn: experiments.get(conn, checkpoint.experiment_id))
        written: Published = await tools.workers.call(
            Publish(
                root=checkpoint.root,
                target=checkpoint.path,
                files=[FileImage(f["path"], f["offset"], f["size_bytes"]) for f in job.payload["descriptor"]["files"]],
                manifest=manifest(checkpoint, experiment, checkpoint.revision),
            ),
            arena_fd=fd,
        )
    finally:
        os.close(fd)
    new = written.identity

    async def record(tx: Tx) -> Job:
        found = Identity(new.dev, new.ino, new.size_bytes, new.mtime_ns, new.ctime_ns)
        await checkpoints.set_identity(tx, checkpoint.id, found, written.manifest_sha256)
        row = await checkpoints.get(tx.conn, checkpoint.id)
        if (written.adopted and row.metrics) or row.metrics != checkpoint.metrics:
            await amend(tx, tools.jobs, row)
        return await tools.jobs.advance(tx, job, NEXT)

    return Onward(await tools.catalog.write(record))


async def _aside(tools: Tools, of: Checkpoint, damaged: Identity, trash: str) -> None:
    identity = IdentityRecord(damaged.dev, damaged.ino, damaged.size_bytes, damaged.mtime_ns, damaged.ctime_ns)
    try:
        await tools.workers.call(Trash(root=of.root, path=of.path, identity=identity, trash=trash, checkpoint=of.id))
    except CkptdError as error:
        # Gone, or no longer the damaged inode: an earlier try of this stage came this far.
        if error.code not in {"missing", "not_found", "source_changed"}:
            raise
