"""The bytes get a durable home: an arena is written under its final name, a settled file stays where it is.

    arena or spool file ──Publish──► <root>/<project>/<experiment>/step_N   (whole or absent)
    file somebody wrote ──Digest───► fsynced in place, digests recorded

The catalog says DURABLE only after the worker said that every byte, the manifest and the parents
are fsynced; a crash between the two repeats the publish, which finds its own work and adopts it.
"""

import os
from dataclasses import replace
from typing import Any

from ckptd import failpoint
from ckptd.catalog import checkpoints, experiments
from ckptd.catalog.checkpoints import Durable
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError, Exists, Missing
from ckptd.hooks.points import HookEvent
from ckptd.jobs import Job
from ckptd.model import Checkpoint, FileEntry, Identity, JobState, Level, Origin, State, step_name
from ckptd.pipeline import asking, owner
from ckptd.pipeline.manifest import amend, manifest
from ckptd.pipeline.tools import Ended, Fresh, Onward, Outcome, Tools
from ckptd.worker.protocol import (
    Digest,
    Digested,
    FileImage,
    FileRecord,
    IdentityRecord,
    Publish,
    Published,
)

NEXT = "verify"
BACK = "settle"
TOGETHER_BYTES_MAX = 64 << 20  # so large a file is digested again when the daemon dies before it was read back
COLLISIONS_MAX = 100  # directories of an older catalog that may be in the way of one step


class MemoryGone(Missing):
    """Neither an arena nor the spool has the bytes any more: the only error that ends a memory hand-off."""


async def run(job: Job, tools: Tools) -> Outcome:
    """Make one checkpoint durable, by whichever way it came."""
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, job.checkpoint_id))
    if checkpoint.state is not State.PENDING:
        return await _already(job, tools, checkpoint)
    facts = {"revision": checkpoint.revision, "origin": str(checkpoint.origin)}
    veto = await asking.about(tools, HookEvent.BEFORE_CHECKPOINT_SAVE, checkpoint, act="save", **facts)
    if checkpoint.origin is Origin.MEMORY:
        durable = replace(await _from_image(job, tools, checkpoint), veto=veto or None)
    else:
        found = await _in_place(job, tools)
        if found is None:
            known = {key: value for key, value in job.payload.items() if key not in {"settled", "last", "since_s"}}
            return Onward(replace(job, stage=BACK, payload=known))
        durable = replace(found, veto=veto or None)
        if durable.size_bytes <= TOGETHER_BYTES_MAX:
            # Read back before anything is written down: one transaction then makes it durable and verified.
            fresh = Fresh(checkpoint, durable, job.payload["settled"]["metrics"])
            return Onward(replace(job, stage=NEXT, fresh=fresh))
    failpoint.hit("catalog.durable")

    async def record(tx: Tx) -> Job:
        if checkpoint.origin is Origin.MEMORY:
            row = await checkpoints.mark_durable(tx, checkpoint.id, durable)
            if row.veto or (durable.adopted and row.metrics) or row.metrics != checkpoint.metrics:
                await amend(tx, tools.jobs, row)  # said after the manifest on the disk was made, or not in it
            # The experiment's next save is written while this one is read back; what follows keeps
            # its own order in a lane of its own.
            return await tools.jobs.move(tx, job, NEXT, f"{checkpoint.experiment_id}/after")
        await Fresh(checkpoint, durable, job.payload["settled"]["metrics"]).record(tx)
        return await tools.jobs.advance(tx, job, NEXT)

    onward = await tools.catalog.write(record)
    failpoint.hit("ack.durable")
    await tools.sources.published(checkpoint.id)
    failpoint.hit("arena.released")
    return Ended() if onward.state is JobState.QUEUED else Onward(onward)


async def _already(job: Job, tools: Tools, checkpoint: Checkpoint) -> Outcome:
    """A crash hit between the catalog's commit and ours, or the save was replaced meanwhile."""
    known = {State.LIVE, State.CORRUPT, State.MISSING}  # of damage the next stage knows what to do with the copy
    if checkpoint.state in known and checkpoint.level.rank >= Level.DURABLE.rank:
        await tools.sources.published(checkpoint.id)

        async def onward(tx: Tx) -> Job:
            return await tools.jobs.advance(tx, job, NEXT)

        return Onward(await tools.catalog.write(onward))
    await tools.sources.drop(checkpoint.id)
    await tools.catalog.write(lambda tx: tools.jobs.finish(tx, job))
    return Ended()


async def _from_image(job: Job, tools: Tools, checkpoint: Checkpoint) -> Durable:
    fd = await tools.sources.open(checkpoint.id)
    if fd is None:
        raise MemoryGone(
            f"the memory that held checkpoint {checkpoint.id} is gone: the machine restarted before it was durable",
            hint="load an older checkpoint; STAGED survives the death of processes, not of the machine",
        )
    try:
        descriptor: dict[str, Any] = job.payload["descriptor"]
        experiment = await tools.catalog.read(lambda conn: experiments.get(conn, checkpoint.experiment_id))
        images = [FileImage(f["path"], f["offset"], f["size_bytes"]) for f in descriptor["files"]]
        for revision in range(checkpoint.revision, checkpoint.revision + COLLISIONS_MAX):
            name = step_name(checkpoint.step, revision, checkpoint.id)
            target = os.path.join(experiment.root, experiment.project, experiment.name, name)
            request = Publish(
                root=experiment.root,
                target=target,
                files=images,
                manifest=manifest(checkpoint, experiment, revision),
                owner=owner.of_user(tools, experiment.uid),
            )
            try:
                published: Published = await tools.workers.call(request, arena_fd=fd)
            except CkptdError as error:
                if error.code == "exists":  # a directory that this catalog does not know is never touched
                    continue
                raise
            made = _durable(published.path, published.files, published.identity, published.manifest_sha256)
            took_ms = {"write_ms": round(published.write_ms, 1), "hash_ms": round(published.hash_ms, 1)}
            return replace(made, adopted=published.adopted, took_ms={} if published.adopted else took_ms)
    finally:
        os.close(fd)
    raise Exists(
        f"{COLLISIONS_MAX} unknown directories stand where step {checkpoint.step} belongs",
        hint="move them away; the save is kept in memory, and written when there is a place for it",
    )


async def _in_place(job: Job, tools: Tools) -> Durable | None:
    """Digest files where they lie; None when they are not the ones any more that were found settled.

    A writer may come back between the two looks, write half of something and pause: its bytes would
    hold still while they are digested. So what was digested must be the identity that was settled.
    """
    root, path, settled = job.payload["root"], job.payload["path"], job.payload.get("settled")
    if not isinstance(settled, dict) or settled["identity"] is None:
        return None
    try:
        digested: Digested = await tools.workers.call(Digest(root=root, path=path))
    except CkptdError as error:
        if error.code in {"source_changed", "missing"}:
            return None
        raise
    if digested.identity != IdentityRecord(**settled["identity"]):
        return None
    durable = _durable(path, digested.files, digested.identity, "", settled["format"])
    return replace(durable, step=settled["step"], epoch=settled["epoch"])


def _durable(
    path: str, files: list[FileRecord], identity: IdentityRecord, manifest_sha256: str, fmt: str | None = None
) -> Durable:
    return Durable(
        path=path,
        files=tuple(FileEntry(f.path, f.size_bytes, f.sha256, tuple(f.xxh3)) for f in files),
        identity=Identity(identity.dev, identity.ino, identity.size_bytes, identity.mtime_ns, identity.ctime_ns),
        size_bytes=sum(f.size_bytes for f in files),
        format=fmt,
        manifest_sha256=manifest_sha256,
    )
