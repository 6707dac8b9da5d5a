"""What a writer says of a checkpoint that was found before he said it: its words replace what was guessed."""

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select, update

from ckptd.catalog import schema
from ckptd.catalog.checkpoint_rows import one
from ckptd.catalog.checkpoints import add_metrics
from ckptd.catalog.experiments import Experiment
from ckptd.catalog.tx import Tx
from ckptd.model import Checkpoint

_row = schema.checkpoint.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the writer said; None, "" and {} say nothing, and leave what is recorded."""

    experiment: Experiment | None = None
    step: int | None = None
    epoch: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    update_best: bool = True


async def relabel(tx: Tx, checkpoint_id: str, said: Said) -> Checkpoint:
    """Write what was said into the row; saying it again changes nothing. NotFound. Emits checkpoint.described.

    A checkpoint that changes its experiment or its step gets the next free revision there. Its state,
    level, path and id stay.
    """
    row = await one(tx.conn, checkpoint_id)
    values: dict[str, Any] = {"update_best": said.update_best}
    experiment_no, step = row.experiment_no, row.step if said.step is None else said.step
    if said.experiment is not None and said.experiment.sequence != row.experiment_no:
        experiment_no = said.experiment.sequence
        project = select(schema.experiment.c.project_no).where(schema.experiment.c.no == experiment_no)
        values |= {
            "experiment_no": experiment_no,
            "project_no": (await tx.conn.execute(project)).scalar_one(),
            "segment": said.experiment.segment,
        }
    if (experiment_no, step) != (row.experiment_no, row.step):
        taken = select(func.max(_row.revision)).where(_row.experiment_no == experiment_no, _row.step == step)
        values |= {
            "step": step,
            "revision": ((await tx.conn.execute(taken)).scalar() or 0) + 1 if step is not None else 1,
        }
    if said.epoch is not None:
        values["epoch"] = said.epoch
    if said.note:
        values["note"] = said.note
    if said.meta:
        values["meta"] = {**row.meta, **said.meta}
    await tx.conn.execute(update(schema.checkpoint).where(_row.id == checkpoint_id).values(values))
    if experiment_no != row.experiment_no:
        metric = schema.checkpoint_metric.c
        await tx.conn.execute(
            update(schema.checkpoint_metric)
            .where(metric.checkpoint_no == row.sequence)
            .values(experiment_no=experiment_no)
        )
    after = await add_metrics(tx, checkpoint_id, said.metrics)
    data = {
        "project": after.project,
        "name": after.experiment,
        "step": after.step,
        "path": after.path,
        "size_bytes": after.size_bytes,
    }
    tx.tell("checkpoint.described", data, experiment=after.experiment_id, checkpoint=after.id)
    return after
