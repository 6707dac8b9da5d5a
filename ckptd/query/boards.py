"""Who has which place by which rule, experiment by experiment. Behind `ckpt best`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.bestrule import BestRule
from ckptd.catalog import bests, checkpoints, experiments
from ckptd.catalog.bests import Board, Place
from ckptd.catalog.experiments import Experiment
from ckptd.errors import NotFound
from ckptd.model import Checkpoint
from ckptd_client.wire import number

EXPERIMENTS_MAX = 100  # of one reply: with eight rules each it is still well below a frame

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Whose boards, and how much of them. Everything narrows; None does not.

    places  how many of each board
    after   the cursor of the page before
    """

    uid: int | None = None
    project: str | None = None
    name: str | None = None
    rule: str | None = None
    places: int = 1
    after: int | None = None


async def boards(conn: AsyncConnection, wanted: Asked) -> Answer:
    """Return the reply of `best`. NotFound when an experiment is named that is not there."""
    following = None
    if wanted.name is not None and wanted.project is not None:
        row = await experiments.find(conn, wanted.uid, wanted.project, wanted.name)
        if row is None:
            hint = "`ckpt experiments` lists them"
            raise NotFound(f"there is no experiment {wanted.project}/{wanted.name}", hint=hint)
        rows = [row]
    else:
        which = experiments.Which(uid=wanted.uid, project=wanted.project)
        rows, following = await experiments.page(conn, which, limit=EXPERIMENTS_MAX, after=wanted.after)
    found = [await _of_experiment(conn, row, wanted) for row in rows]
    return {"experiments": [one for one in found if one["boards"]], "next": following}


async def _of_experiment(conn: AsyncConnection, row: Experiment, wanted: Asked) -> dict[str, Any]:
    where = await bests.whereabouts(conn, row.id)
    known = [] if where is None else await bests.boards_at(conn, where)
    # On a tree's board that an ancestor owns, it is the ancestor's best that is decided.
    own = [board for board in known if board.scope != "tree" or board.owner_no == row.sequence]
    own = [board for board in own if wanted.rule in {None, board.name}]
    own.sort(key=lambda board: (board.scope != "experiment", board.no))
    standing = await bests.places(conn, [board.no for board in own]) if own else {}
    shown = {no: sorted((p for p in rows if p.rank > 0), key=lambda p: p.rank) for no, rows in standing.items()}
    first = [place.checkpoint_id for rows in shown.values() for place in rows[: wanted.places]]
    won = await checkpoints.get_many(conn, first)
    return {
        "experiment": row.id,
        "project": row.project,
        "name": row.name,
        "boards": [_board(board, shown[board.no], won, wanted.places) for board in own],
    }


def _board(board: Board, places: list[Place], won: Mapping[str, Checkpoint], limit: int) -> dict[str, Any]:
    rule = BestRule.model_validate(board.rule)
    return {
        "rule": board.name,
        "scope": board.scope,
        "by": rule.by,
        "words": str(rule),
        "metric": board.metric,
        "mode": board.mode,
        "count": len(places),
        "places": [
            _place(place, won[place.checkpoint_id], rule) for place in places[:limit] if place.checkpoint_id in won
        ],
    }


def _place(place: Place, row: Checkpoint, rule: BestRule) -> dict[str, Any]:
    return {
        "rank": place.rank,
        "checkpoint": row.id,
        "project": row.project,
        "name": row.experiment,
        "step": row.step,
        "value": number(place.value),
        "metrics": {
            term.metric: number(row.metrics[term.metric]) for term in rule.criteria if term.metric in row.metrics
        },
        "path": row.path,
        "verified_at": None if row.verified_at is None else row.verified_at.isoformat(),
    }
