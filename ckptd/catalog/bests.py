"""Which checkpoints are the best by which rule, as last decided.

A board is one rule as applied to one owner: an experiment, an experiment with its descendants, or
a project. It holds the places, and beside them (rank 0) what must be remembered to admit one more
without reading the history again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Row, and_, bindparam, delete, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import schema
from ckptd.catalog.checkpoint_rows import get
from ckptd.catalog.keys import one_of, padded
from ckptd.catalog.tx import Tx

DEPTH_MAX = 64  # generations of a tree of experiments; a deeper one, or a ring, ends there
ROWS_MAX = 500  # of one statement


@dataclass(frozen=True, slots=True)
class Best:
    """One place as people and links ask for it: `rank` 1 is the best by its rule. metric is "" for several."""

    rule: str
    scope: str
    metric: str
    mode: str
    rank: int
    checkpoint_id: str
    value: float

    @property
    def words(self) -> str:
        """Why the checkpoint stays."""
        return f"best:{self.rule}" + (f" #{self.rank}" if self.rank > 1 else "")


@dataclass(frozen=True, slots=True)
class Board:
    """One rule as applied to one owner. `rule` is the rule as written, for whoever decides."""

    scope: str
    owner_no: int
    name: str
    digest: str
    metric: str
    mode: str
    rule: dict[str, Any]
    no: int = 0

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What makes it this board."""
        return self.scope, self.owner_no, self.name, self.digest


@dataclass(frozen=True, slots=True)
class Place:
    """One row of a board. `present` is of now, all else as it was when it was decided."""

    checkpoint_no: int
    checkpoint_id: str
    rank: int
    experiment_no: int
    value: float
    standing: list[Any]
    present: bool = True


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """To which owners an experiment belongs: `line` is itself and those that it descends from."""

    experiment_no: int
    project_no: int
    line: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Owner:
    """An experiment as the rules are looked up for it."""

    experiment_no: int
    project_no: int
    experiment_id: str
    project: str
    name: str


_board = schema.board.c
_best = schema.best.c
_row = schema.checkpoint.c
_metric = schema.checkpoint_metric.c
_experiment = schema.experiment.c

_WON = (
    select(schema.board, _best.rank, _best.value, _best.experiment_no, _row.id.label("checkpoint_id"))
    .join_from(schema.best, schema.board)
    .join(schema.checkpoint, _row.sequence == _best.checkpoint_no)
    .where(_best.rank > 0)
)
_IN_ORDER = (_board.name, _board.scope, _board.no, _best.rank)
_HELD = _WON.where(
    _best.experiment_no == select(_experiment.no).where(_experiment.id == bindparam("experiment")).scalar_subquery()
).order_by(*_IN_ORDER)
_PLACES = (
    select(schema.best, _row.id.label("checkpoint_id"), and_(_row.is_good, _row.update_best).label("present"))
    .join_from(schema.best, schema.checkpoint)
    .where(_best.board_no.in_(bindparam("boards", expanding=True)))
    .order_by(_best.board_no, _best.rank)
)
_TOP = _PLACES.where(or_(_best.rank > 0, _best.checkpoint_no == bindparam("beside")))
_WHO = select(_experiment.no, _experiment.project_no, _experiment.parent_id, _experiment.uid)
_BY_ID = _WHO.where(_experiment.id == bindparam("wanted"))
# A parent is named by its own id or by that of the checkpoint that was branched from.
_BRANCHED_FROM = (
    _WHO.select_from(schema.experiment)
    .join(schema.checkpoint, _row.experiment_no == _experiment.no)
    .where(_row.id == bindparam("wanted"))
)
_AT = or_(
    and_(_board.scope == "experiment", _board.owner_no == bindparam("experiment")),
    and_(_board.scope == "project", _board.owner_no == bindparam("project")),
    and_(_board.scope == "tree", _board.owner_no.in_(bindparam("line", expanding=True))),
)
_BOARDS = select(schema.board).where(_AT, _board.digest != "").order_by(_board.no)
_LEFT = select(schema.board).where(_AT, _board.digest == "").order_by(_board.no)
# -- asked by people, links and retention ---------------------------------------------------------


async def current(conn: AsyncConnection, experiment_id: str, *, own: bool = False) -> list[Best]:
    """Return the places on all boards that an experiment belongs to, by rule and rank. Empty for no experiment.

    own  without those of the experiments that it descends from
    """
    where = await whereabouts(conn, experiment_id)
    if where is None:
        return []
    if own:
        where = replace(where, line=(where.experiment_no,))
    rows = await conn.execute(_WON.where(_AT).order_by(*_IN_ORDER), _asked(where))
    return [_won(row) for row in rows]


async def held(conn: AsyncConnection, experiment_id: str) -> list[Best]:
    """Return the places that checkpoints of this experiment hold, whosever board it is: they must stay."""
    return [_won(row) for row in await conn.execute(_HELD, {"experiment": experiment_id})]


async def firsts(conn: AsyncConnection, experiment_ids: Sequence[str]) -> dict[str, list[Best]]:
    """Return the first places on the own boards of each of these experiments (those of a page), by rule."""
    wanted = _WON.add_columns(_experiment.id.label("owner_id")).join(
        schema.experiment, and_(_board.scope == "experiment", _experiment.no == _board.owner_no)
    )
    # Asked for by number, not by the id beside it: of a long list SQLite would read all experiments' boards, and pick.
    numbers = select(_experiment.no).where(one_of(_experiment.id, experiment_ids))
    wanted = wanted.where(_board.owner_no.in_(numbers), _best.rank == 1)
    found: dict[str, list[Best]] = {}
    for row in await conn.execute(wanted.order_by(*_IN_ORDER)):
        found.setdefault(row.owner_id, []).append(_won(row))
    return found


async def of_checkpoints(conn: AsyncConnection, checkpoint_ids: Sequence[str]) -> list[Best]:
    """Return the places that these checkpoints (a page of them) hold now, by rule and rank."""
    rows = await conn.execute(_WON.where(one_of(_row.id, checkpoint_ids)).order_by(*_IN_ORDER))
    return [_won(row) for row in rows]


def _won(row: Row[Any]) -> Best:
    return Best(row.name, row.scope, row.metric, row.mode, row.rank, row.checkpoint_id, row.value)


# -- boards -----------------------------------------------------------------------------------------


async def whereabouts(conn: AsyncConnection, experiment_id: str) -> Whereabouts | None:
    """Return which owners' boards concern an experiment; other users' experiments are nobody's ancestors."""
    row = (await conn.execute(_BY_ID, {"wanted": experiment_id})).one_or_none()
    if row is None:
        return None
    line, parent, uid = [row.no], row.parent_id, row.uid
    while parent is not None and len(line) < DEPTH_MAX:
        above = (await conn.execute(_BY_ID, {"wanted": parent})).one_or_none()
        above = above or (await conn.execute(_BRANCHED_FROM, {"wanted": parent})).one_or_none()
        if above is None or above.uid != uid or above.no in line:
            break
        line.append(above.no)
        parent = above.parent_id
    return Whereabouts(row.no, row.project_no, tuple(line))


async def descent(conn: AsyncConnection, experiment_no: int) -> list[int]:
    """Return an experiment and all that descend from it, of the same user."""
    known = [experiment_no]
    generation = [experiment_no]
    while generation and len(known) < DEPTH_MAX * ROWS_MAX:
        part, generation = generation[:ROWS_MAX], generation[ROWS_MAX:]
        parents = schema.experiment.alias("parent")
        child = (
            _WHO.select_from(schema.experiment)
            .join(parents, parents.c.uid == _experiment.uid)
            .where(
                one_of(parents.c.no, part),
                or_(
                    _experiment.parent_id == parents.c.id,
                    _experiment.parent_id.in_(
                        select(_row.id).where(_row.experiment_no == parents.c.no).correlate(parents).scalar_subquery()
                    ),
                ),
            )
        )
        found = {row.no for row in await conn.execute(child)} - set(known)
        known += sorted(found)
        generation += sorted(found)
    return known


async def boards_at(conn: AsyncConnection, where: Whereabouts) -> list[Board]:
    """Return every board that an experiment's checkpoints may have a place on."""
    return [_as_board(row) for row in await conn.execute(_BOARDS, _asked(where))]


async def boards_holding(conn: AsyncConnection, checkpoint_ids: Sequence[str]) -> list[Board]:
    """Return the boards that have or remember one of these checkpoints."""
    found: dict[int, Board] = {}
    for start in range(0, len(checkpoint_ids), ROWS_MAX):
        part = checkpoint_ids[start : start + ROWS_MAX]
        wanted = (
            select(schema.board)
            .join_from(schema.board, schema.best)
            .join(schema.checkpoint, _row.sequence == _best.checkpoint_no)
        )
        for row in await conn.execute(wanted.where(one_of(_row.id, part))):
            found[row.no] = _as_board(row)
    return [found[no] for no in sorted(found)]


async def all_keys(conn: AsyncConnection) -> dict[tuple[str, int, str, str], int]:
    """Return which boards there are, with their numbers."""
    wanted = select(_board.scope, _board.owner_no, _board.name, _board.digest, _board.no)
    rows = await conn.execute(wanted.where(_board.digest != ""))
    return {(row[0], row[1], row[2], row[3]): row[4] for row in rows}


async def owners(conn: AsyncConnection) -> list[Owner]:
    """Return every experiment, for whoever looks up its rules."""
    wanted = select(_experiment.no, _experiment.project_no, _experiment.id, schema.project.c.name, _experiment.name)
    rows = await conn.execute(wanted.join_from(schema.experiment, schema.project).order_by(_experiment.no))
    return [Owner(*row) for row in rows]


async def add_board(tx: Tx, board: Board) -> int:
    """Make a board without places; return its number."""
    return await tx.add(
        schema.board,
        scope=board.scope,
        owner_no=board.owner_no,
        name=board.name,
        digest=board.digest,
        metric=board.metric,
        mode=board.mode,
        rule=board.rule,
    )


async def close_boards(tx: Tx, numbers: Sequence[int]) -> None:
    """Take all places from boards whose rules are no more. Their names stay until no link bears them (`drop_board`)."""
    for start in range(0, len(numbers), ROWS_MAX):
        part = numbers[start : start + ROWS_MAX]
        await tx.conn.execute(delete(schema.best).where(one_of(_best.board_no, part)))
        for row in (await tx.conn.execute(select(schema.board).where(one_of(_board.no, part)))).all():
            same = (_board.scope == row.scope, _board.owner_no == row.owner_no, _board.name == row.name)
            await tx.conn.execute(delete(schema.board).where(*same, _board.digest == ""))
            await tx.conn.execute(update(schema.board).where(_board.no == row.no).values(digest=""))


async def closed_boards(conn: AsyncConnection, where: Whereabouts) -> list[Board]:
    """Return the boards of an experiment that have been closed, for whoever removes their links."""
    return [_as_board(row) for row in await conn.execute(_LEFT, _asked(where))]


async def drop_board(tx: Tx, no: int) -> None:
    """Forget a closed board."""
    await tx.conn.execute(delete(schema.board).where(_board.no == no, _board.digest == ""))


async def places(conn: AsyncConnection, boards: Sequence[int], *, beside: int | None = None) -> dict[int, list[Place]]:
    """Return the rows of these boards, places first to last behind what is remembered.

    beside  the number of a checkpoint: of what is remembered only its row
    """
    found: dict[int, list[Place]] = {no: [] for no in boards}
    asked = {"boards": padded(boards)}
    rows = await (conn.execute(_PLACES, asked) if beside is None else conn.execute(_TOP, {**asked, "beside": beside}))
    for row in rows:
        found[row.board_no].append(
            Place(
                row.checkpoint_no,
                row.checkpoint_id,
                row.rank,
                row.experiment_no,
                row.value,
                row.standing,
                bool(row.present),
            )
        )
    return found


async def record(tx: Tx, board: Board, before: Iterable[Place], after: Iterable[Place]) -> bool:
    """Make `after` a board's rows; say whether a place changed. Only rows that differ are written.

    Emits best.changed when another checkpoint has the first place.
    """
    old = {place.checkpoint_no: place for place in before}
    new = {place.checkpoint_no: place for place in after}
    gone = [no for no in old if no not in new]
    for start in range(0, len(gone), ROWS_MAX):
        part = gone[start : start + ROWS_MAX]
        await tx.conn.execute(delete(schema.best).where(_best.board_no == board.no, one_of(_best.checkpoint_no, part)))
    now = tx.clock.now()
    added = [_values(board.no, place, now) for no, place in new.items() if no not in old]
    if added:
        await tx.conn.execute(insert(schema.best), added)
    moved = [
        {**_values(board.no, place, now), "of_board": board.no, "of_checkpoint": no}
        for no, place in new.items()
        if no in old and not _same(old[no], place)
    ]
    if moved:
        where = (_best.board_no == bindparam("of_board"), _best.checkpoint_no == bindparam("of_checkpoint"))
        await tx.conn.execute(update(schema.best).where(*where), moved)
    first, was = _first(new.values()), _first(old.values())
    if first is not None and (was is None or was.checkpoint_no != first.checkpoint_no):
        await _tell(tx, board, first)
    return ranks(old.values()) != ranks(new.values())


def _values(board_no: int, place: Place, now: Any) -> dict[str, Any]:
    return {
        "board_no": board_no,
        "checkpoint_no": place.checkpoint_no,
        "rank": place.rank,
        "experiment_no": place.experiment_no,
        "value": place.value,
        "standing": place.standing,
        "decided_at": now,
    }


def _same(one: Place, other: Place) -> bool:
    mine = (one.rank, one.experiment_no, one.value, one.standing)
    return mine == (other.rank, other.experiment_no, other.value, other.standing)


def _first(rows: Iterable[Place]) -> Place | None:
    return next((place for place in rows if place.rank == 1), None)


def ranks(rows: Iterable[Place]) -> set[tuple[int, int, float]]:
    """Return what people see of a board's rows, for a comparison."""
    return {(place.rank, place.checkpoint_no, place.value) for place in rows if place.rank > 0}


async def _tell(tx: Tx, board: Board, first: Place) -> None:
    about = await get(tx.conn, first.checkpoint_id)
    data = {
        "project": about.project,
        "name": about.experiment,
        "step": about.step,
        "path": about.path,
        "size_bytes": about.size_bytes,
        "rule": board.name,
        "scope": board.scope,
        "metric": board.metric,
        "mode": board.mode,
        "value": first.value,
    }
    tx.tell("best.changed", data, experiment=about.experiment_id, checkpoint=about.id)


def _asked(where: Whereabouts) -> dict[str, Any]:
    return {"experiment": where.experiment_no, "project": where.project_no, "line": padded(where.line)}


def _as_board(row: Row[Any]) -> Board:
    return Board(row.scope, row.owner_no, row.name, row.digest, row.metric, row.mode, row.rule, row.no)
