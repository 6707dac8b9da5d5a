"""How the experiments of one sweep are doing: progress, time left, signs of life. Behind `ckpt grid`.

`row_of` and `summary` are pure: facts in, JSON out. `grid` asks the catalog for the facts, in a few statements
however many experiments there are.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import and_, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import experiments, schema
from ckptd.catalog.columns import join_float
from ckptd.catalog.experiments import Experiment, Which
from ckptd.catalog.keys import one_of
from ckptd.errors import NotFound
from ckptd.model import ExperimentStatus, is_id
from ckptd_client.wire import number

EXPERIMENTS_MAX = 500
NAMED_MAX = 8  # projects, and tags, that an error names
CONFIG_NODES_MAX = 1000
# What trainers call the number of steps they will make; the first that is found holds.
TOTALS = ("total_steps", "max_steps", "num_steps", "steps", "train_steps", "num_train_steps", "max_iters", "iterations")
EPOCHS = ("epochs", "max_epochs", "num_epochs", "total_epochs", "num_train_epochs")
CONDITIONS = ("running", "stalled", "silent", "lost", "failed", "completed")
STALLED = "experiment.stalled"

_experiment = schema.experiment.c
_event = schema.event_log.c
_segment = schema.segment.c
_series = schema.metric_summary.c

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Which experiments: all given ones must fit.

    parent   id of the experiment or checkpoint they grew from, or PROJECT/NAME
    metric   whose last, lowest and highest value is shown
    silent_s a running experiment without a sign of life for so long is silent
    """

    uid: int | None = None
    project: str | None = None
    tag: str | None = None
    parent: str | None = None
    metric: str | None = None
    silent_s: float = 60.0
    limit: int = EXPERIMENTS_MAX


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one experiment.

    began        when its current segment was opened      start_step  and at which step; None: not known
    epoch        of its newest checkpoint                 stalled     (when, at which step) it was last told to be stalled
    metric       last, min and max of the metric asked for
    """

    experiment: Experiment
    began: datetime | None = None
    start_step: int | None = None
    epoch: float | None = None
    stalled: tuple[datetime, int | None] | None = None
    metric: Mapping[str, Any] = field(default_factory=dict)


def row_of(facts: Facts, now: datetime, silent_s: float) -> Row:
    """Return the JSON object of one experiment. Times are differences of wall times: a set clock bends them."""
    one = facts.experiment
    seen_s = max(0.0, (now - one.heartbeat_at).total_seconds())
    condition = condition_of(facts, seen_s, silent_s)
    total, unit = total_of(one.config)
    done = one.last_step if unit == "steps" else facts.epoch
    share = None if total is None or done is None else min(1.0, max(0.0, done / total))
    rate = rate_of(facts, now) if condition == "running" else None
    left = None if share is None or not rate or one.last_step is None or done is None else _left(facts, total, unit)
    return {
        "experiment": one.id,
        "project": one.project,
        "name": one.name,
        "status": str(one.status),
        "condition": condition,
        "step": one.last_step,
        "epoch": facts.epoch,
        "total": total,
        "unit": unit,
        "progress": 1.0 if condition == "completed" and share is None else share,
        "steps_per_s": rate,
        "eta_s": None if left is None or not rate else left / rate,
        "seen_at": one.heartbeat_at.isoformat(),
        "silent_s": seen_s if condition in {"running", "stalled", "silent"} else None,
        "began_at": None if facts.began is None else facts.began.isoformat(),
        "tags": list(one.tags),
        "parent": one.parent_id,
        "metric": dict(facts.metric) or None,
    }


def condition_of(facts: Facts, seen_s: float, silent_s: float) -> str:
    """Return one of CONDITIONS: the status, but a running one may be silent, or alive and stalled."""
    one = facts.experiment
    if one.status is not ExperimentStatus.RUNNING:
        return str(one.status)
    if seen_s > silent_s:
        return "silent"
    if facts.stalled is not None:
        at, step = facts.stalled
        if step == one.last_step and (facts.began is None or at >= facts.began):
            return "stalled"
    return "running"


def rate_of(facts: Facts, now: datetime) -> float | None:
    """Return steps per second of the current segment; None until one was made, or when its first step is not known."""
    one = facts.experiment
    start = facts.start_step if facts.start_step is not None else 0 if one.segment == 1 else None
    if start is None or facts.began is None or one.last_step is None or one.last_step <= start:
        return None
    took_s = (min(now, one.heartbeat_at) - facts.began).total_seconds()
    return (one.last_step - start) / took_s if took_s > 0 else None


def _left(facts: Facts, total: float | None, unit: str) -> float | None:
    """Return how many steps are left; epochs are taken to have as many steps as those before."""
    last = facts.experiment.last_step
    if total is None or last is None:
        return None
    if unit == "steps":
        return max(0.0, total - last)
    return max(0.0, (total - facts.epoch) * last / facts.epoch) if facts.epoch else None


def total_of(config: Mapping[str, Any]) -> tuple[float | None, str]:
    """Return how far training is meant to go by its config, and in which unit; steps before epochs, shallow before deep.

    >>> total_of({"trainer": {"max_steps": 1000}, "epochs": 3}), total_of({"lr": 0.1})
    ((1000.0, 'steps'), (None, 'steps'))
    """
    known: dict[str, float] = {}
    for name, value in _leaves(config):
        known.setdefault(name, value)
    for names, unit in ((TOTALS, "steps"), (EPOCHS, "epochs")):
        for name in names:
            if name in known:
                return known[name], unit
    return None, "steps"


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield every number above 0 with the last part of its name, level by level."""
    level: list[Mapping[str, Any]] = [config]
    nodes = 0
    while level:
        deeper: list[Mapping[str, Any]] = []
        for table in level:
            for key, value in table.items():
                nodes += 1
                if nodes > CONFIG_NODES_MAX:
                    return
                if isinstance(value, Mapping):
                    deeper.append(value)
                elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
                    yield str(key).rpartition(".")[2].lower().replace("-", "_"), float(value)
        level = deeper


def summary(rows: Iterable[Row]) -> Row:
    """Return the sweep as a whole: counts by condition, mean progress, the longest time left."""
    listed = list(rows)
    progress = [row["progress"] for row in listed if row["progress"] is not None]
    left = [row["eta_s"] for row in listed if row["eta_s"] is not None]
    return {
        "experiments": len(listed),
        "by_condition": {word: count for word in CONDITIONS if (count := sum(r["condition"] == word for r in listed))},
        "progress": sum(progress) / len(progress) if progress else None,
        "eta_s": max(left, default=None),
    }


async def grid(conn: AsyncConnection, asked: Asked, now: datetime) -> Row:
    """Return the reply of `grid` (docs/reference/wire-control.md).

    NotFound  the parent named is not there, or no experiment fits what was named; the hint says what there is
    """
    parents = None if asked.parent is None else await _parents(conn, asked)
    which = Which(uid=asked.uid, project=asked.project, tag=asked.tag, parents=parents)
    shown, more = await experiments.page(conn, which, limit=asked.limit)
    if not shown and (asked.project or asked.tag or asked.parent):
        raise await _nothing(conn, asked)
    facts = await _facts(conn, shown, asked.metric)
    rows = [row_of(one, now, asked.silent_s) for one in facts]
    rows.sort(key=lambda row: (row["project"], row["name"]))
    return {"rows": rows, "summary": summary(rows), "more": more is not None, "metric": asked.metric}


async def _nothing(conn: AsyncConnection, asked: Asked) -> NotFound:
    """Say what was asked for, and which projects and tags the newest experiments have."""
    words = {"of project": asked.project, "with tag": asked.tag, "grown from": asked.parent}
    wanted = " ".join(f"{word} {value!r}" for word, value in words.items() if value)
    there, _ = await experiments.page(conn, Which(uid=asked.uid), limit=EXPERIMENTS_MAX)
    known = {"projects": [one.project for one in there], "tags": [tag for one in there for tag in one.tags]}
    named = [f"{what}: {_some(values)}" for what, values in known.items() if values]
    hint = f"there are {'; '.join(named)}" if named else "there is no experiment yet"
    return NotFound(f"there is no experiment {wanted}", hint=f"{hint}. `ckpt experiments` lists them")


def _some(values: Iterable[str]) -> str:
    """Name the first few of them, each once.

    >>> _some(["b", "a", "b"]), _some(map(str, range(10)))
    ('b, a', '0, 1, 2, 3, 4, 5, 6, 7 and 2 more')
    """
    distinct = list(dict.fromkeys(values))
    rest = len(distinct) - NAMED_MAX
    return ", ".join(distinct[:NAMED_MAX]) + (f" and {rest} more" if rest > 0 else "")


async def _parents(conn: AsyncConnection, asked: Asked) -> Sequence[str]:
    """Return the ids that mean the parent: its own, and those of its checkpoints, from which one may have branched."""
    named = str(asked.parent)
    if is_id(named):
        own = named
    else:
        project, _, name = named.partition("/")
        known = await experiments.find(conn, asked.uid, project, name)
        if known is None:
            raise NotFound(f"there is no experiment {named}", hint="`ckpt experiments` lists them")
        own = known.id
    row = schema.checkpoint.c
    no = select(_experiment.no).where(_experiment.id == own).scalar_subquery()
    branched = select(row.id).join(schema.experiment, _experiment.parent_id == row.id).where(row.experiment_no == no)
    return [own, *(await conn.execute(branched)).scalars()]


async def _facts(conn: AsyncConnection, shown: Sequence[Experiment], metric: str | None) -> list[Facts]:
    numbers, ids = [one.sequence for one in shown], [one.id for one in shown]
    segments = {
        row.experiment_no: (row.opened_at, row.start_step)
        for row in await conn.execute(
            select(_segment.experiment_no, _segment.opened_at, _segment.start_step)
            .join(
                schema.experiment,
                and_(_experiment.no == _segment.experiment_no, _experiment.segment == _segment.number),
            )
            .where(one_of(_segment.experiment_no, numbers))
        )
    }
    stalled = await _stalled(conn, ids)
    epochs = await _epochs(conn, numbers)
    values = await _values(conn, numbers, metric)
    return [
        Facts(
            one,
            *segments.get(one.sequence, (None, None)),
            epochs.get(one.sequence),
            stalled.get(one.id),
            values.get(one.sequence, {}),
        )
        for one in shown
    ]


async def _stalled(conn: AsyncConnection, ids: Sequence[str]) -> dict[str, tuple[datetime, int | None]]:
    last = (
        select(func.max(_event.sequence))
        .where(one_of(_event.experiment_id, ids), _event.name == STALLED)
        .group_by(_event.experiment_id)
    )
    wanted = select(_event.experiment_id, _event.at, _event.data).where(_event.sequence.in_(last))
    return {row.experiment_id: (row.at, row.data.get("step")) for row in await conn.execute(wanted)}


async def _epochs(conn: AsyncConnection, numbers: Sequence[int]) -> dict[int, float]:
    row = schema.checkpoint.c
    last = (
        select(func.max(row.sequence))
        .where(one_of(row.experiment_no, numbers), row.epoch.is_not(None))
        .group_by(row.experiment_no)
    )
    wanted = select(row.experiment_no, row.epoch).where(row.sequence.in_(last))
    return {found.experiment_no: found.epoch for found in await conn.execute(wanted)}


async def _values(conn: AsyncConnection, numbers: Sequence[int], metric: str | None) -> dict[int, Row]:
    if metric is None:
        return {}
    wanted = select(schema.metric_summary).where(one_of(_series.experiment_no, numbers), _series.name == metric)
    return {
        row.experiment_no: {
            "name": metric,
            "last": number(join_float(row.last, row.last_special)),
            "min": row.min,
            "max": row.max,
            "nonfinite": row.nonfinite,
        }
        for row in await conn.execute(wanted)
    }
