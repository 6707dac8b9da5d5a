"""What the catalog keeps of each hook: its place in the event log, its switch, recent runs and counts, its findings.

A hook's cursor, its runs and its findings are written in one transaction, so that a fact is delivered
again after a crash exactly when nothing of its delivery was kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.hooktables import finding, hook, hook_run
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd.errors import NotFound

RUNS_KEPT_MAX = 200  # of each hook, of each outcome: skips never push the failures out
FINDINGS_KEPT_MAX = 50_000  # of all hooks; about 20 MB
FINDINGS_SHOWN_MAX = 100  # of one checkpoint
SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Kept:
    """One hook's row.

    enabled  what a person said last; None: nobody did, and the configuration counts
    cursor   number of the last event that needs no delivery any more; None: it begins with the next one
    counts   runs by outcome, and "missed": events that were trimmed before they could be delivered
    """

    no: int
    name: str
    enabled: bool | None
    cursor: int | None
    counts: dict[str, int]
    last_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One run as it is kept."""

    at: datetime
    event: str
    key: str
    outcome: str
    ms: float
    experiment_id: str = ""
    checkpoint_id: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One finding as it is kept. `silent`: it is not told as an event."""

    at: datetime
    level: str
    text: str
    facts: Mapping[str, Any]
    experiment_id: str = ""
    checkpoint_id: str = ""
    silent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What became of one hook since it was last written down. `cursor` None: it stays where it is."""

    no: int
    name: str
    cursor: int | None
    counts: Mapping[str, int]
    runs: Sequence[Ran] = ()
    opened: Sequence[str] = ()  # errors after which it was given a rest
    findings: Sequence[Found] = ()


@dataclass(frozen=True, slots=True)
class Logged:
    """A kept run with its number, which rises with time, and its hook's name."""

    no: int
    hook: str
    run: Ran


@dataclass(frozen=True, slots=True)
class Noted:
    """A kept finding with its hook's name."""

    no: int
    hook: str
    found: Found = field(repr=False)


_hook, _run, _finding = hook.c, hook_run.c, finding.c


async def enter(tx: Tx, names: Iterable[str]) -> dict[str, Kept]:
    """Make sure of a row for each hook and return them. A new one, and one that was away, begins with the next event."""
    wanted = set(names)
    newest = (await tx.conn.execute(select(func.max(schema.event_log.c.sequence)))).scalar() or 0
    known = {row.name: row for row in await tx.conn.execute(select(hook))}
    for name in sorted(wanted - known.keys()):
        await tx.add(hook, name=name, cursor=newest, counts={}, added_at=tx.clock.now())
    back = [row.no for name, row in known.items() if name in wanted and row.cursor is None]
    heads = tuple(f"{name}." for name in wanted)  # a module that offers several hooks is asked for their names later
    gone = [row for name, row in known.items() if name not in wanted and not name.startswith(heads)]
    away = [row.no for row in gone if row.cursor is not None]
    if back:
        await tx.conn.execute(update(hook).where(one_of(_hook.no, back)).values(cursor=newest))
    if away:
        await tx.conn.execute(update(hook).where(one_of(_hook.no, away)).values(cursor=None))
    return {one.name: one for one in await every(tx.conn) if one.name in wanted}


async def every(conn: AsyncConnection) -> list[Kept]:
    """Return the row of every hook there ever was, by name."""
    return [_kept(row) for row in await conn.execute(select(hook).order_by(_hook.name))]


async def record(tx: Tx, progress: Sequence[Progress]) -> None:
    """Write down what became of some hooks. Emits hook.finding for each finding that is not silent, and hook.opened."""
    for one in progress:
        values: dict[str, Any] = {"counts": dict(one.counts)}
        if one.cursor is not None:
            values["cursor"] = one.cursor
        if one.runs:
            values["last_at"] = max(run.at for run in one.runs)
            await tx.conn.execute(insert(hook_run), [{**_columns(run), "hook_no": one.no} for run in one.runs])
            for outcome in {run.outcome for run in one.runs}:
                await _trim_runs(tx, one.no, outcome)
        await tx.conn.execute(update(hook).where(_hook.no == one.no).values(values))
        for error in one.opened:
            tx.tell("hook.opened", {"hook": one.name, "error": error})
        for found in one.findings:
            await _add_finding(tx, one.name, found)
    if any(one.findings for one in progress):
        last = (await tx.conn.execute(select(func.max(_finding.no)))).scalar() or 0
        await tx.conn.execute(delete(finding).where(_finding.no <= last - FINDINGS_KEPT_MAX))


async def set_enabled(tx: Tx, name: str, *, enabled: bool) -> bool:
    """Note what a person said; return whether it changes what was said before. NotFound."""
    known = (await tx.conn.execute(select(hook).where(_hook.name == name))).one_or_none()
    if known is None:
        raise NotFound(f"there is no hook {name!r}", hint="`ckpt hooks list` names them all")
    await tx.conn.execute(update(hook).where(_hook.no == known.no).values(enabled=enabled))
    return known.enabled is None or known.enabled is not enabled


async def runs(
    conn: AsyncConnection,
    *,
    name: str | None = None,
    outcome: str | None = None,
    limit: int = 100,
    after: int | None = None,
) -> tuple[list[Logged], int | None]:
    """Newest first: runs with a number below `after`, of one hook or one outcome where named; and the next cursor."""
    wanted = select(hook_run, _hook.name.label("hook")).join(hook).order_by(_run.no.desc()).limit(limit + 1)
    if name is not None:
        wanted = wanted.where(_hook.name == name)
    if outcome is not None:
        wanted = wanted.where(_run.outcome == outcome)
    if after is not None:
        wanted = wanted.where(_run.no < after)
    found = [Logged(row.no, row.hook, _ran(row)) for row in await conn.execute(wanted)]
    return found[:limit], found[limit - 1].no if len(found) > limit else None


async def durations_ms(conn: AsyncConnection) -> dict[str, list[float]]:
    """Return how long the kept runs of each hook took, shortest first; skipped ones took nothing and are left out."""
    wanted = (
        select(_hook.name, _run.ms)
        .join_from(hook_run, hook)
        .where(_run.outcome != SKIPPED)
        .order_by(_hook.name, _run.ms)
    )
    found: dict[str, list[float]] = {}
    for row in await conn.execute(wanted):
        found.setdefault(row.name, []).append(row.ms)
    return found


async def last_errors(conn: AsyncConnection) -> dict[str, Ran]:
    """Return the newest kept run of each hook that failed or timed out."""
    newest = select(func.max(_run.no)).where(_run.outcome.in_(("failed", "timeout"))).group_by(_run.hook_no)
    wanted = select(hook_run, _hook.name.label("hook")).join(hook).where(_run.no.in_(newest))
    return {row.hook: _ran(row) for row in await conn.execute(wanted)}


async def findings(conn: AsyncConnection, checkpoint_id: str, limit: int = FINDINGS_SHOWN_MAX) -> list[Noted]:
    """Return the newest findings about one checkpoint, oldest of them first."""
    wanted = select(finding).where(_finding.checkpoint_id == checkpoint_id).order_by(_finding.no.desc()).limit(limit)
    return [Noted(row.no, row.hook, _found(row)) for row in reversed((await conn.execute(wanted)).all())]


async def _trim_runs(tx: Tx, hook_no: int, outcome: str) -> None:
    mine = (_run.hook_no == hook_no) & (_run.outcome == outcome)
    newest = select(_run.no).where(mine).order_by(_run.no.desc()).offset(RUNS_KEPT_MAX).limit(1)
    last = (await tx.conn.execute(newest)).scalar()
    if last is not None:
        await tx.conn.execute(delete(hook_run).where(mine, _run.no <= last))


async def _add_finding(tx: Tx, name: str, found: Found) -> None:
    values = asdict(found)
    silent = values.pop("silent")
    await tx.conn.execute(insert(finding).values(hook=name, **_named(values)))
    if silent:
        return
    data = {"hook": name, "level": found.level, "text": found.text, "facts": dict(found.facts)}
    data |= await _about(tx, found)
    tx.tell("hook.finding", data, experiment=found.experiment_id, checkpoint=found.checkpoint_id)


async def _about(tx: Tx, found: Found) -> dict[str, Any]:
    """Return what people call that which a finding is about; nothing for one about the daemon, or about what is gone."""
    project, experiment, row = schema.project.c, schema.experiment.c, schema.checkpoint.c
    wanted = select(project.name.label("project"), experiment.name).join_from(schema.experiment, schema.project)
    if found.checkpoint_id:
        mine = row.experiment_no == experiment.no
        wanted = wanted.add_columns(row.step).join(schema.checkpoint, mine).where(row.id == found.checkpoint_id)
    else:
        wanted = wanted.where(experiment.id == found.experiment_id)
    named = (await tx.conn.execute(wanted)).one_or_none()
    return {} if named is None else named._asdict()


def _columns(run: Ran) -> dict[str, Any]:
    return _named(asdict(run))


def _named(values: dict[str, Any]) -> dict[str, Any]:
    return {
        **values,
        "experiment_id": values["experiment_id"] or None,
        "checkpoint_id": values["checkpoint_id"] or None,
    }


def _kept(row: Row[Any]) -> Kept:
    return Kept(row.no, row.name, row.enabled, row.cursor, dict(row.counts), row.last_at)


def _ran(row: Row[Any]) -> Ran:
    return Ran(
        at=row.at,
        event=row.event,
        key=row.key,
        outcome=row.outcome,
        ms=row.ms,
        experiment_id=row.experiment_id or "",
        checkpoint_id=row.checkpoint_id or "",
        detail=row.detail,
    )


def _found(row: Row[Any]) -> Found:
    return Found(
        at=row.at,
        level=row.level,
        text=row.text,
        facts=row.facts,
        experiment_id=row.experiment_id or "",
        checkpoint_id=row.checkpoint_id or "",
    )
