"""A checkpoint directory of ours that the catalog does not know, back into the catalog.

The catalog can be lost: manifest.json holds everything its rows need. What comes back this way is
DURABLE (its writer fsynced it before the name existed) and is read back before it is VERIFIED again.
"""

from datetime import UTC, datetime
from typing import Any

import msgspec

from ckptd.catalog import checkpoints, experiments
from ckptd.catalog.checkpoints import Durable, NewCheckpoint
from ckptd.catalog.experiments import NewExperiment
from ckptd.catalog.roots import Root
from ckptd.catalog.tx import Tx
from ckptd.intake.descriptor import Segment
from ckptd.intake.requests import Id, Metrics, Name, Step, Tags
from ckptd.jobs import Jobs, NewJob
from ckptd.model import FileEntry, Identity, Level, Origin
from ckptd.worker.protocol import Candidate, FileRecord
from ckptd_client.wire import from_number


class Manifest(msgspec.Struct, frozen=True):
    """What manifest.json must say to be believed."""

    checkpoint: Id
    project: Name
    experiment: Name
    experiment_id: Id
    files: list[FileRecord]
    step: Step | None = None
    epoch: float | None = None
    revision: Segment = 1
    segment: Segment | None = None
    created_at: datetime | None = None
    metrics: Metrics = {}
    note: str = ""
    meta: dict[str, Any] = {}
    tags: Tags = []
    parent: str | None = None
    config: dict[str, Any] = {}
    experiment_tags: Tags = []
    facts: dict[str, Any] = {}
    format: str = "safetensors"
    update_best: bool = True


async def enter(tx: Tx, jobs: Jobs, root: Root, found: Candidate) -> bool:
    """Make the rows of one manifest; False when its checkpoint is known, or it is not a manifest."""
    try:
        manifest = msgspec.convert(found.manifest, Manifest)
    except msgspec.ValidationError:
        return False
    if await checkpoints.get_many(tx.conn, [manifest.checkpoint]):
        return False
    experiment = await experiments.ensure(
        tx,
        NewExperiment(
            id=manifest.experiment_id,
            uid=root.uid,
            project=manifest.project,
            name=manifest.experiment,
            root=root.path,
            config=manifest.config,
            tags=tuple(manifest.experiment_tags),
            facts=manifest.facts,
        ),
    )
    await checkpoints.stage(
        tx,
        NewCheckpoint(
            id=manifest.checkpoint,
            experiment_id=experiment.id,
            origin=Origin.REBUILD,
            root_id=root.id,
            level=Level.NONE,
            step=manifest.step,
            epoch=manifest.epoch,
            revision=manifest.revision,
            segment=manifest.segment,
            path=found.path,
            format=manifest.format,
            created_at=manifest.created_at or datetime.fromtimestamp(found.identity.mtime_ns / 1e9, UTC),
            metrics={name: from_number(value) for name, value in manifest.metrics.items()},
            note=manifest.note,
            meta=manifest.meta,
            tags=tuple(manifest.tags),
            parent_id=manifest.parent,
            update_best=manifest.update_best,
        ),
    )
    seen = found.identity
    await checkpoints.mark_durable(
        tx,
        manifest.checkpoint,
        Durable(
            path=found.path,
            files=[FileEntry(f.path, f.size_bytes, f.sha256, tuple(f.xxh3)) for f in manifest.files],
            identity=Identity(seen.dev, seen.ino, seen.size_bytes, seen.mtime_ns, seen.ctime_ns),
            size_bytes=sum(f.size_bytes for f in manifest.files),
            format=manifest.format,
        ),
    )
    lane = f"{experiment.id}/rebuild"
    await jobs.enqueue(tx, NewJob(checkpoint_id=manifest.checkpoint, lane=lane, stage="verify"))
    return True
