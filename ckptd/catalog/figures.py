"""Counts and sums for status and lists."""

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.keys import one_of
from ckptd.model import ExperimentStatus, Level, State

_row = schema.checkpoint.c
_ON_DISK = (State.LIVE, State.CORRUPT)
IDS_MAX = 500  # in one statement


async def levels(conn: AsyncConnection, experiment_id: str) -> dict[Level, int]:
    """Count the checkpoints of one experiment that are on their way or on disk, by level."""
    wanted = (
        select(_row.level, func.count())
        .join(schema.experiment, schema.experiment.c.no == _row.experiment_no)
        .where(schema.experiment.c.id == experiment_id, _row.state.in_((State.PENDING, *_ON_DISK)))
        .group_by(_row.level)
    )
    return {Level(level): count for level, count in await conn.execute(wanted)}


async def on_disk(
    conn: AsyncConnection, *, experiment_id: str | None = None, root_id: int | None = None
) -> tuple[int, int]:
    """Count what is on disk, and its bytes, of one experiment or under one root."""
    wanted = select(func.count(), func.coalesce(func.sum(_row.size_bytes), 0)).where(_row.state.in_(_ON_DISK))
    if experiment_id is not None:
        wanted = wanted.join(schema.experiment, schema.experiment.c.no == _row.experiment_no).where(
            schema.experiment.c.id == experiment_id
        )
    if root_id is not None:
        wanted = wanted.where(_row.root_no == root_id)
    count, size_bytes = (await conn.execute(wanted)).one()
    return int(count), int(size_bytes)


async def states(conn: AsyncConnection, uid: int | None = None) -> dict[State, int]:
    """Count what is wrong: corrupt, missing and failed checkpoints, of everybody or of one user."""
    wanted = select(_row.state, func.count()).where(_row.state.in_((State.CORRUPT, State.MISSING, State.FAILED)))
    if uid is not None:
        wanted = wanted.where(_row.uid == uid)
    return {State(state): count for state, count in await conn.execute(wanted.group_by(_row.state))}


async def on_disk_each(conn: AsyncConnection, numbers: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return what `on_disk` does for each of these experiments (those of a page), by their numbers; none is left out.

    By number, so that one index has the experiment and the state both; a join by id would read every live row.
    """
    wanted = (
        select(_row.experiment_no, func.count(), func.coalesce(func.sum(_row.size_bytes), 0))
        .where(one_of(_row.experiment_no, numbers), _row.state.in_(_ON_DISK))
        .group_by(_row.experiment_no)
    )
    found = {no: (int(count), int(size_bytes)) for no, count, size_bytes in await conn.execute(wanted)}
    return {no: found.get(no, (0, 0)) for no in numbers}


async def experiments(conn: AsyncConnection, uid: int | None = None) -> int:
    """Count all experiments, or one user's."""
    wanted = select(func.count()).select_from(schema.experiment)
    if uid is not None:
        wanted = wanted.where(schema.experiment.c.uid == uid)
    return int((await conn.execute(wanted)).scalar_one())


async def matching(
    conn: AsyncConnection, project: str | None, name: str | None, uid: int | None = None
) -> list[tuple[str, str, str]]:
    """Return (id, project, name) of experiments by exact names; None matches every name."""
    wanted = (
        select(schema.experiment.c.id, schema.project.c.name, schema.experiment.c.name)
        .join(schema.project, schema.project.c.no == schema.experiment.c.project_no)
        .order_by(schema.experiment.c.no)
    )
    if project is not None:
        wanted = wanted.where(schema.project.c.name == project)
    if name is not None:
        wanted = wanted.where(schema.experiment.c.name == name)
    if uid is not None:
        wanted = wanted.where(schema.experiment.c.uid == uid)
    return [(row[0], row[1], row[2]) for row in await conn.execute(wanted)]


async def under(conn: AsyncConnection, root_id: int) -> list[tuple[str, str, str]]:
    """Return (id, project, name) of the experiments that have something on disk under a root."""
    here = select(_row.experiment_no).distinct().where(_row.root_no == root_id, _row.state.in_(_ON_DISK))
    wanted = (
        select(schema.experiment.c.id, schema.project.c.name, schema.experiment.c.name)
        .join(schema.project, schema.project.c.no == schema.experiment.c.project_no)
        .where(schema.experiment.c.no.in_(here))
        .order_by(schema.experiment.c.no)
    )
    return [(row[0], row[1], row[2]) for row in await conn.execute(wanted)]


async def by_project(conn: AsyncConnection) -> list[tuple[str, list[tuple[str, str]], int]]:
    """Return of each project its name, its experiments (id, name), and the bytes that they have on disk."""
    sizes = select(_row.project_no, func.sum(_row.size_bytes)).where(_row.state.in_(_ON_DISK)).group_by(_row.project_no)
    on_disk = {no: int(size_bytes) for no, size_bytes in await conn.execute(sizes)}
    names = {row.no: row.name for row in await conn.execute(select(schema.project.c.no, schema.project.c.name))}
    experiment = schema.experiment.c
    members: dict[int, list[tuple[str, str]]] = {}
    for no, experiment_id, name in await conn.execute(select(experiment.project_no, experiment.id, experiment.name)):
        members.setdefault(no, []).append((experiment_id, name))
    return [(names[no], members.get(no, []), size_bytes) for no, size_bytes in on_disk.items()]


async def in_status(conn: AsyncConnection, experiment_ids: Sequence[str], status: ExperimentStatus) -> set[str]:
    """Return those of the experiments that are in a status."""
    experiment = schema.experiment.c
    found: set[str] = set()
    for start in range(0, len(experiment_ids), IDS_MAX):
        part = list(experiment_ids[start : start + IDS_MAX])
        wanted = select(experiment.id).where(one_of(experiment.id, part), experiment.status == status)
        found.update((await conn.execute(wanted)).scalars())
    return found
