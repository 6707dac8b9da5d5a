"""Executions of an experiment, numbered from 1: what a later one saves is newer, whatever its steps.

A catalog that was made again, or put back from an older copy, hears of executions that it has never seen open,
by the manifests they left and by trainers that live on. It counts on from the highest it has heard of: an
execution that opens later under a lower number would be older than all that lies on the disk, and what it saves
would be retired at once.
"""

from typing import Any

from sqlalchemy import Row, insert, select, update

from ckptd.catalog import schema
from ckptd.catalog.tx import Tx

_segment = schema.segment.c
_experiment = schema.experiment.c


async def of_save(tx: Tx, experiment: Row[Any], said: int | None) -> int:
    """Return the segment that a save belongs to, which is known from now on; None: the experiment's present one."""
    if said is None or said == experiment.segment:
        return int(experiment.segment)
    known = select(_segment.number).where(_segment.experiment_no == experiment.no, _segment.number == said)
    if (await tx.conn.execute(known)).first() is None:
        await add(tx, experiment.no, said)
    if said > experiment.segment:
        await tx.conn.execute(update(schema.experiment).where(_experiment.no == experiment.no).values(segment=said))
    return said


async def add(
    tx: Tx, experiment_no: int, number: int, config: dict[str, Any] | None = None, facts: dict[str, Any] | None = None
) -> None:
    """Enter one execution."""
    await tx.conn.execute(
        insert(schema.segment).values(
            experiment_no=experiment_no,
            number=number,
            opened_at=tx.clock.now(),
            config=config or {},
            facts=facts or {},
        )
    )
