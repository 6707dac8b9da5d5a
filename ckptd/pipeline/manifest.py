"""What manifest.json says of a checkpoint, but for its files, which the worker adds; and what comes after it.

A metric that is known only after the manifest was written goes into late.json, as does the veto of a save, by a
job that is made in the very transaction that makes it true. So whatever crashes, the file follows the catalog.
"""

from typing import Any

from ckptd.catalog import experiments
from ckptd.catalog.tx import Tx
from ckptd.jobs import Jobs, NewJob
from ckptd.model import Checkpoint, Origin, State
from ckptd_client.wire import number


def manifest(checkpoint: Checkpoint, experiment: experiments.Experiment, revision: int) -> dict[str, Any]:
    """Everything manifest.json says but its files: enough to make the catalog's rows again."""
    return {
        "v": 1,
        "checkpoint": checkpoint.id,
        "project": experiment.project,
        "experiment": experiment.name,
        "experiment_id": experiment.id,
        "uid": experiment.uid,
        "segment": checkpoint.segment,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "revision": revision,
        "created_at": checkpoint.created_at.isoformat(),
        "metrics": {name: number(value) for name, value in checkpoint.metrics.items()},
        "note": checkpoint.note,
        "meta": checkpoint.meta,
        "tags": list(checkpoint.tags),
        "parent": checkpoint.parent_id,
        "update_best": checkpoint.update_best,
        "origin": str(checkpoint.origin),
        "format": checkpoint.format,
        "config": experiment.config,
        "experiment_tags": list(experiment.tags),
        "facts": experiment.facts,
    }


async def amend(tx: Tx, jobs: Jobs, row: Checkpoint) -> None:
    """Have late.json follow `row`, where there is a manifest: one job waits at most, whatever comes meanwhile."""
    if row.state in {State.LIVE, State.CORRUPT} and row.origin in {Origin.MEMORY, Origin.REBUILD}:
        await jobs.enqueue_aside(tx, NewJob(checkpoint_id=row.id, lane=f"{row.id}/amend", stage="amend"))
