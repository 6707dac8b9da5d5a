"""From what a person or a trainer calls a checkpoint to the one row that is meant, or an error.

    latest                      newest verified          best, best:RULE, best:METRIC, best_RULE
    step:N, N                   by step                  32 hex digits, or a unique prefix of 6 or more
    PROJECT/NAME[@SELECTOR]     in that experiment       /absolute/path

Never another checkpoint in its place: what fits several is Ambiguous, what fits none is NotFound.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.bestrule import BestRule
from ckptd.catalog import schema
from ckptd.catalog.bests import current
from ckptd.catalog.checkpoint_rows import SELECT, from_row, newest_good
from ckptd.errors import Ambiguous, BadRequest, NotFound, UnknownRule, Vetoed
from ckptd.model import Checkpoint, State

PREFIX_MIN = 6

_row = schema.checkpoint.c
_SELECTORS = "latest, best, best:RULE, step:N, an id (6 digits or more), a path, or PROJECT/NAME[@...]"
_VETOED = "`ckpt ls` names them; one that is named loads, and `ckpt unveto` lets it count"
_HEX = re.compile(r"[0-9a-f]+")
_RETIRED = (State.DROPPED, State.REPLACED, State.TRASHED, State.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Among whose checkpoints to look. uid None: everybody's.

    rules  what says which is the best in PROJECT, NAME: the first is what a bare "best" means. None: not known here
    """

    uid: int | None = None
    project: str | None = None
    name: str | None = None  # of the experiment
    experiment_id: str | None = None
    rules: Callable[[str, str], Sequence[BestRule]] | None = None


async def resolve(conn: AsyncConnection, selector: str, scope: Scope) -> Checkpoint:
    """Return the checkpoint a selector names within `scope`.

    NotFound    nothing fits     Ambiguous   several do     BadRequest  it is no selector
    """
    if selector == "latest":
        return await _latest(conn, scope)
    if selector == "best":
        return await _best(conn, scope, None)
    if selector.startswith(("best:", "best_")):
        return await _best(conn, scope, selector[len("best:") :])
    number = selector.removeprefix("step:")
    if number.isascii() and number.isdigit() and len(selector) < schema.ID:
        return await _step(conn, scope, int(number))
    if selector.startswith("/"):
        return await _path(conn, scope, selector)
    if "/" in selector:
        return await _named(conn, selector, scope)
    if len(selector) >= PREFIX_MIN and _HEX.fullmatch(selector):
        return await _id(conn, scope, selector)
    raise BadRequest(
        f"{selector!r} names no checkpoint",
        hint=_SELECTORS,
    )


async def _named(conn: AsyncConnection, selector: str, scope: Scope) -> Checkpoint:
    """A name may hold an "@" itself, so the whole is tried as a name first."""
    project, _, rest = selector.partition("/")
    name, at, inner = rest, "", "latest"
    if "@" in rest and not await _experiments(conn, Scope(uid=scope.uid, project=project, name=rest)):
        name, at, inner = rest.rpartition("@")
    if at and not inner:
        raise BadRequest(f"{selector!r} ends where a selector should follow", hint=_SELECTORS)
    within = replace(scope, project=project, name=name, experiment_id=None)
    await _experiment(conn, within)  # a missing experiment is named as such, not as a missing checkpoint
    return await resolve(conn, inner, within)


async def _latest(conn: AsyncConnection, scope: Scope) -> Checkpoint:
    no, experiment_id, called = await _experiment(conn, scope)
    found = await newest_good(conn, experiment_id)
    if found is None:
        vetoed = select(_row.veto).where(_row.experiment_no == no, _row.state == State.LIVE, _row.veto.is_not(None))
        veto = (await conn.execute(vetoed.order_by(_row.sequence.desc()).limit(1))).scalar()
        if veto is not None:
            raise Vetoed(f"every checkpoint of {called} is vetoed, the newest by {veto}", hint=_VETOED)
        raise NotFound(f"{called} has no verified checkpoint yet")
    return found


async def _best(conn: AsyncConnection, scope: Scope, asked: str | None) -> Checkpoint:
    """By the rule of that name or, when there is none, by the one rule that has this metric.

    No winner yet is NotFound, and a trainer may begin afresh; no rule that could ever have one is UnknownRule.
    """
    _, experiment_id, called = await _experiment(conn, scope)
    project, _, name = called.partition("/")
    rules = None if scope.rules is None else scope.rules(project, name)
    asked = asked or (rules[0].name if rules else None)
    won = [place for place in await current(conn, experiment_id) if place.rank == 1]
    found = [place for place in won if asked in {None, place.rule}] or [place for place in won if asked == place.metric]
    # A rule of the experiment's own comes before one of the same name that looks further.
    found = [place for place in found if place.scope == "experiment"] or found
    if len(found) > 1:
        names = ", ".join(sorted({f"{place.rule} ({place.mode or 'of several'}, {place.scope})" for place in found}))
        raise Ambiguous(f"{called} has several best checkpoints: {names}", hint="say which: best:RULE")
    if not found and rules is not None and not any(asked in {rule.name, rule.metric} for rule in rules):
        raise _unknown(called, asked, sorted({rule.name for rule in rules} | {place.rule for place in won}))
    row = await _still_good(conn, found[0].checkpoint_id) if found else None
    if row is None:
        what = f"no best checkpoint by {asked}" if asked else "no best checkpoint"
        hint = "a keep_best rule names the metric and its direction; verified checkpoints with a finite value count"
        raise NotFound(f"{called} has {what}", hint=hint)
    return row


def _unknown(called: str, asked: str | None, known: list[str]) -> UnknownRule:
    there_are = f"there are: {', '.join(known)}" if known else "none says what is best"
    return UnknownRule(
        f"{called} has no rule {asked!r}; {there_are}" if asked else f"{called} has no rule that says what is best"
    )


async def _still_good(conn: AsyncConnection, checkpoint_id: str) -> Checkpoint | None:
    """Return a winner as it is now; None when it is not good any more, and the boards have yet to follow."""
    row = (await conn.execute(SELECT.where(_row.id == checkpoint_id, _row.is_good))).one_or_none()
    return None if row is None else from_row(row)


async def _step(conn: AsyncConnection, scope: Scope, step: int) -> Checkpoint:
    """Newest revision of a step; a retired one only when there is no other (so that `show` can tell of it)."""
    no, _, called = await _experiment(conn, scope)
    ordered = (
        SELECT.where(_row.experiment_no == no, _row.step == step)
        .order_by(_row.segment.desc(), _row.revision.desc())
        .limit(1)
    )
    row = (await conn.execute(ordered.where(_row.state.not_in(_RETIRED)))).one_or_none()
    row = row or (await conn.execute(ordered)).one_or_none()
    if row is None:
        raise NotFound(f"{called} has no checkpoint of step {step}")
    return from_row(row)


async def _path(conn: AsyncConnection, scope: Scope, path: str) -> Checkpoint:
    ordered = SELECT.where(_row.path_key == schema.path_key(path)).order_by(_row.sequence.desc()).limit(1)
    ordered = _mine(ordered, scope)
    row = (await conn.execute(ordered.where(_row.state.not_in(_RETIRED)))).one_or_none()
    row = row or (await conn.execute(ordered)).one_or_none()
    if row is None:
        raise NotFound(f"no checkpoint lies at {path}")
    return from_row(row)


async def _id(conn: AsyncConnection, scope: Scope, prefix: str) -> Checkpoint:
    # "g" sorts after every hex digit: the half-open range is the prefix, and an index has it.
    wanted = SELECT.where(_row.id >= prefix, _row.id < prefix + "g").order_by(_row.id).limit(2)
    rows = (await conn.execute(_mine(wanted, scope))).all()
    if not rows:
        raise NotFound(f"there is no checkpoint {prefix}")
    if len(rows) > 1:
        raise Ambiguous(f"{prefix} is the beginning of several ids", hint="give more digits of the id")
    return from_row(rows[0])


def _mine(query: Select[Any], scope: Scope) -> Select[Any]:
    if scope.uid is not None:
        query = query.where(_row.uid == scope.uid)
    if scope.experiment_id is not None:
        query = query.where(schema.experiment.c.id == scope.experiment_id)
    if scope.project is not None:
        query = query.where(schema.project.c.name == scope.project)
    if scope.name is not None:
        query = query.where(schema.experiment.c.name == scope.name)
    return query


async def _experiments(conn: AsyncConnection, scope: Scope) -> list[tuple[int, str, str]]:
    """Return up to two experiments in the scope: number, id, and what to call it."""
    experiment, project = schema.experiment.c, schema.project.c
    wanted = select(experiment.no, experiment.id, project.name.label("project"), experiment.name).join_from(
        schema.experiment, schema.project
    )
    if scope.uid is not None:
        wanted = wanted.where(experiment.uid == scope.uid)
    if scope.experiment_id is not None:
        wanted = wanted.where(experiment.id == scope.experiment_id)
    if scope.project is not None:
        wanted = wanted.where(project.name == scope.project)
    if scope.name is not None:
        wanted = wanted.where(experiment.name == scope.name)
    rows = await conn.execute(wanted.order_by(experiment.no.desc()).limit(2))
    return [(row.no, row.id, f"{row.project}/{row.name}") for row in rows]


async def _experiment(conn: AsyncConnection, scope: Scope) -> tuple[int, str, str]:
    found = await _experiments(conn, scope)
    if not found:
        asked = "/".join(filter(None, (scope.project, scope.name))) or scope.experiment_id or "of yours"
        raise NotFound(f"there is no experiment {asked}")
    if len(found) > 1:
        raise Ambiguous("there are several experiments", hint="say which: PROJECT/NAME@SELECTOR")
    return found[0]
