"""A checkpoint directory of ours that the catalog does not know, back into the catalog.

The catalog can be lost: manifest.json holds everything its rows need, and late.json beside it what was
said after it was written. What comes back this way is
DURABLE (its writer fsynced it before the name existed) and is read back before it is VERIFIED again.
"""

from datetime import UTC, datetime
from typing import Any

import msgspec

from ckptd.catalog import checkpoints, experiments, strips
from ckptd.catalog.checkpoints import Durable, NewCheckpoint
from ckptd.catalog.experiments import NewExperiment
from ckptd.catalog.roots import Root
from ckptd.catalog.tx import Tx
from ckptd.intake.descriptor import Segment
from ckptd.intake.fields import Id, Metrics, Name, Step, Tags
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


class Late(msgspec.Struct, frozen=True):
    """What late.json must say to be believed."""

    checkpoint: Id
    metrics: Metrics
    veto: str | None = None


def _late(manifest: Manifest, late: dict[str, Any] | None) -> Late:
    """Return what was said later; nothing where late.json is another checkpoint's, or makes no sense."""
    try:
        found = None if late is None else msgspec.convert(late, Late)
    except msgspec.ValidationError:
        found = None
    return Late(manifest.checkpoint, {}) if found is None or found.checkpoint != manifest.checkpoint else found


def _metrics(manifest: Manifest, late: dict[str, Any] | None) -> dict[str, float]:
    """Return the metrics of both; what was said later wins."""
    said = {**manifest.metrics, **_late(manifest, late).metrics}
    return {name: from_number(value) for name, value in said.items()}


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
            metrics=_metrics(manifest, found.late),
            note=manifest.note,
            meta=manifest.meta,
            tags=tuple(manifest.tags),
            parent_id=manifest.parent,
            update_best=manifest.update_best,
        ),
    )
    await _enter_files(tx, jobs, manifest, found)
    return True


async def take_up(tx: Tx, jobs: Jobs, root: Root, found: Candidate) -> bool:
    """Go on with a FAILED checkpoint whose directory is whole after all; False when it is of another root.

    The power failed after its name was durable and before its row said so: the row met its job first,
    which found the memory gone.
    """
    try:
        manifest = msgspec.convert(found.manifest, Manifest)
    except msgspec.ValidationError:
        return False
    if (await checkpoints.get(tx.conn, manifest.checkpoint)).root != root.path:
        return False
    await checkpoints.mark_pending(tx, manifest.checkpoint)
    await _enter_files(tx, jobs, manifest, found)
    return True


async def _enter_files(tx: Tx, jobs: Jobs, manifest: Manifest, found: Candidate) -> None:
    """Make a pending row durable by what its manifest says, and have it read back."""
    seen = found.identity
    durable = await checkpoints.mark_durable(
        tx,
        manifest.checkpoint,
        Durable(
            path=found.path,
            files=[FileEntry(f.path, f.size_bytes, f.sha256, tuple(f.xxh3)) for f in manifest.files],
            identity=Identity(seen.dev, seen.ino, seen.size_bytes, seen.mtime_ns, seen.ctime_ns),
            size_bytes=sum(f.size_bytes for f in manifest.files),
            format=manifest.format,
            veto=_late(manifest, found.late).veto,
        ),
    )
    if found.stripped:
        await strips.found(tx, manifest.checkpoint, found.stripped)
    lane = f"{durable.experiment_id}/rebuild"
    await jobs.enqueue(tx, NewJob(checkpoint_id=manifest.checkpoint, lane=lane, stage="verify", can_wait=True))
