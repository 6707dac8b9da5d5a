"""What manifest.json says of a checkpoint, but for its files, which the worker adds."""

from typing import Any

from ckptd.catalog import experiments
from ckptd.model import Checkpoint
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
