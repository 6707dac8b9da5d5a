"""Places on boards, written down as a test wants them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ckptd.bestrule import BestRule
from ckptd.catalog import bests
from ckptd.catalog.bests import Board, Place
from ckptd.catalog.checkpoint_rows import one
from ckptd.catalog.tx import Tx

Decided = Mapping[tuple[str, Literal["min", "max"]], Sequence[tuple[str, float]]]


async def put_places(tx: Tx, experiment_id: str, decided: Decided) -> bool:
    """Make `decided` ((metric, mode) -> ids and values, best first) an experiment's own boards; say whether it changed."""
    where = await bests.whereabouts(tx.conn, experiment_id)
    assert where is not None
    known = {(board.metric, board.mode): board for board in await bests.boards_at(tx.conn, where)}
    changed = False
    for (metric, mode), winners in decided.items():
        rule = BestRule(metric=metric, mode=mode, k=max(1, len(winners)), name=f"{metric}")
        about: dict[str, Any] = {"scope": "experiment", "owner_no": where.experiment_no, "name": metric}
        board = known.pop((metric, mode), None)
        if board is None:
            made = Board(
                **about, digest=mode, metric=metric, mode=mode, rule=rule.model_dump(mode="json", exclude_defaults=True)
            )
            board = Board(**{**vars_of(made), "no": await bests.add_board(tx, made)})
        rows = []
        for rank, (checkpoint_id, value) in enumerate(winners, start=1):
            row = await one(tx.conn, checkpoint_id)
            rows.append(Place(row.sequence, row.id, rank, row.experiment_no, value, [[value], [row.sequence], False]))
        changed |= await bests.record(tx, board, (await bests.places(tx.conn, [board.no]))[board.no], rows)
    for board in known.values():
        before = (await bests.places(tx.conn, [board.no]))[board.no]
        changed |= bool(before)
        await bests.close_boards(tx, [board.no])
    return changed


def vars_of(board: Board) -> dict[str, Any]:
    """Return a board's fields."""
    return {name: getattr(board, name) for name in Board.__slots__}
