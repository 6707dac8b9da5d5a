"""The best of every rule follows what is known of the checkpoints, and follows the rules when they change.

Every function here that changes a place runs inside the transaction that changed what the place
depends on, so that no reader and no retention ever sees one without the other.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import anyio.to_thread
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.best import Contender, Decision, admit, age, decide, measure
from ckptd.bestrule import BestRule
from ckptd.catalog import bests, contenders, listing
from ckptd.catalog.bests import Board, Place, Whereabouts
from ckptd.catalog.contenders import Seen
from ckptd.catalog.tx import Tx
from ckptd.config import Settings
from ckptd.jobs import NewJob
from ckptd.model import Checkpoint
from ckptd.pipeline.tools import Tools
from ckptd.rules import Rules

log = structlog.get_logger()

Key = tuple[str, int, str, str]
MEMBER, LAST_BAR = 1, 2  # what a row's standing says of its part in what must be remembered; 0: none
INLINE_MAX = 500  # checkpoints that are compared on the event loop: some milliseconds


async def refresh_best(tx: Tx, checkpoint: Checkpoint, rules: Rules) -> bool:
    """Decide again what one checkpoint's verification, metrics, loss or move may have changed; say whether a place did.

    rules  those of the checkpoint's experiment, as it is now

    It costs what the places cost, however long the history is, unless the checkpoint is another than it was
    when it got its place: then everything that takes part is read.
    """
    row = await contenders.one(tx.conn, checkpoint.id)
    where = None if row is None else await bests.whereabouts(tx.conn, row.experiment_id)
    if row is None or where is None:
        return False
    known = await bests.boards_at(tx.conn, where)
    changed = bool(await _follow(tx, where, rules, known))
    boards = {board.no: board for board in known if not _is_abandoned(board, where, rules)}
    standing = await bests.places(tx.conn, list(boards), beside=row.sequence) if boards else {}
    for no, board in boards.items():
        changed |= await _admit(tx, board, standing[no], row)
    return changed


async def lost(tx: Tx, checkpoint_ids: Sequence[str]) -> bool:
    """Decide again where one of these had a place, after it went away; say whether a place changed."""
    changed = False
    for board in await bests.boards_holding(tx.conn, checkpoint_ids):
        changed |= await _decide(tx, board, await _all_rows(tx, board))
    return changed


async def moved(tx: Tx, before: Checkpoint, after: Checkpoint) -> None:
    """Decide again what hung on a checkpoint's being in the experiment that it left: `refresh_best` does the rest.

    That is its places there and, where another experiment was branched from it, the trees of both.
    """
    await lost(tx, [after.id])
    for experiment_id in (before.experiment_id, after.experiment_id):
        where = await bests.whereabouts(tx.conn, experiment_id)
        for board in await bests.boards_at(tx.conn, where) if where is not None else ():
            if board.scope == "tree":
                await _decide(tx, board, await _all_rows(tx, board))


async def opened(tx: Tx, experiment_id: str, rules: Rules) -> None:
    """Make the boards of a new experiment whose rules look at its descendants: those may save before it does."""
    if any(rule.scope == "tree" for rule in rules.keep_best):
        await follow(tx, experiment_id, rules)


async def follow(tx: Tx, experiment_id: str, rules: Rules) -> list[str]:
    """Make an experiment's boards those that its rules ask for; return the rules whose places changed by it."""
    where = await bests.whereabouts(tx.conn, experiment_id)
    return [] if where is None else await _follow(tx, where, rules, await bests.boards_at(tx.conn, where))


async def recompute(tx: Tx, experiment_id: str, rules: Rules) -> list[str]:
    """Decide every board of an experiment from everything that takes part; return the rules whose places changed.

    An empty list says that the answer kept up save by save was right.
    """
    changed = await follow(tx, experiment_id, rules)
    where = await bests.whereabouts(tx.conn, experiment_id)
    for board in await bests.boards_at(tx.conn, where) if where is not None else ():
        if await _decide(tx, board, await _all_rows(tx, board)):
            changed.append(board.name)
    return sorted(set(changed))


async def differing(conn: AsyncConnection, experiment_id: str, rules: Rules) -> list[str]:
    """Return the rules whose places `recompute` would change; changes nothing."""
    where = await bests.whereabouts(conn, experiment_id)
    if where is None:
        return []
    known = await bests.boards_at(conn, where)
    there = {board.key for board in known}
    fresh = [board for rule in rules.keep_best if (board := _board(rule, where)).key not in there]
    found = []
    for board in (*known, *fresh):
        now = (await bests.places(conn, [board.no]))[board.no] if board.no else []
        wanted = [] if _is_abandoned(board, where, rules) else await _decided(conn, board)
        if bests.ranks(now) != bests.ranks(wanted):
            found.append(board.name)
    return sorted(set(found))


async def follow_rules(tools: Tools, before: Settings | None = None) -> int:
    """Decide the best again wherever the rules are other ones than its boards were made by; return in how many
    experiments a place changed. Links and retention follow by a job. Asked after a start and after each reload.

    before  the settings until now: experiments whose rules for the best are the same are not even looked at
    """
    changed = 0
    there = await tools.catalog.read(bests.all_keys)
    own: defaultdict[int, set[Key]] = defaultdict(set)
    for key in there:
        if key[0] != "project":
            own[key[1]].add(key)
    wanted: set[Key] = set()
    for owner in await tools.catalog.read(bests.owners):
        rules = tools.settings().rules_for(owner.project, owner.name)
        keys = {_key(rule, owner.project_no, owner.experiment_no) for rule in rules.keep_best}
        wanted |= keys
        if before is not None and before.rules_for(owner.project, owner.name).keep_best == rules.keep_best:
            continue
        if keys <= there.keys() and own[owner.experiment_no] <= keys:
            continue

        async def follow_one(tx: Tx, of: str = owner.experiment_id, rules: Rules = rules) -> bool:
            if not await follow(tx, of, rules):
                return False
            await link_again(tools, tx, of)
            return True

        changed += await tools.catalog.write(follow_one)
    stale = [no for key, no in (await tools.catalog.read(bests.all_keys)).items() if key not in wanted]
    if stale:
        await tools.catalog.write(lambda tx: bests.close_boards(tx, stale))
    if changed:
        log.info("best.rules_followed", experiments=changed)
    return changed


async def link_again(tools: Tools, tx: Tx, experiment_id: str) -> None:
    """Have an experiment's links follow its boards, and retention the links, by a job."""
    newest = await listing.latest(tx.conn, experiment_id)
    if newest is not None:
        await tools.jobs.enqueue_after(tx, NewJob(checkpoint_id=newest.id, lane=f"{experiment_id}/after", stage="link"))


# -- boards follow the rules --------------------------------------------------------------------------


def _key(rule: BestRule, project_no: int, experiment_no: int) -> Key:
    return rule.scope, project_no if rule.scope == "project" else experiment_no, rule.name, rule.digest


def _board(rule: BestRule, where: Whereabouts) -> Board:
    scope, owner, name, digest = _key(rule, where.project_no, where.experiment_no)
    return Board(
        scope, owner, name, digest, rule.metric, rule.mode or "", rule.model_dump(mode="json", exclude_defaults=True)
    )


def _is_abandoned(board: Board, where: Whereabouts, rules: Rules) -> bool:
    """Whether it is the experiment's own board of a rule that it does not have any more."""
    own = board.scope != "project" and board.owner_no == where.experiment_no
    return own and board.key not in {_key(rule, where.project_no, where.experiment_no) for rule in rules.keep_best}


async def _follow(tx: Tx, where: Whereabouts, rules: Rules, known: Iterable[Board]) -> list[str]:
    """Make boards that the rules ask for, and drop the experiment's own that they do not."""
    changed = []
    abandoned = {board.no: board.name for board in known if _is_abandoned(board, where, rules)}
    if abandoned:
        rows = await bests.places(tx.conn, list(abandoned))
        changed = [name for no, name in abandoned.items() if any(place.rank > 0 for place in rows[no])]
        await bests.close_boards(tx, list(abandoned))
    there = {board.key for board in known}
    for rule in rules.keep_best:
        board = _board(rule, where)
        if board.key not in there:
            there.add(board.key)
            if await _decide(tx, replace(board, no=await bests.add_board(tx, board)), []):
                changed.append(board.name)
    return changed


# -- places follow the checkpoints ----------------------------------------------------------------------


async def _admit(tx: Tx, board: Board, top: list[Place], row: Seen) -> bool:
    """Let one checkpoint on a board, or see that it is the same as before; else decide from everything.

    top  the board's places, and the checkpoint's own row if it has one
    """
    rule = BestRule.model_validate(board.rule)
    takes_part = row.update_best and (row.counts if rule.remembers else row.is_good)
    one = _contender(rule, row) if takes_part else None
    was = next((place for place in top if place.checkpoint_no == row.sequence), None)
    if was is None and one is None:
        return False
    lasting = all(place.present for place in top if place.rank > 0)
    if was is not None and one is not None and lasting and was.rank > 0 and _is_as_it_was(was, one):
        return False
    rows = top if one is not None and _is_enough(rule, top, one) else await _all_rows(tx, board)
    after = admit(_decision(rows), one, rule) if was is None and one is not None and lasting else None
    if after is None:
        return await _decide(tx, board, await _all_rows(tx, board))
    return await bests.record(tx, board, rows, _as_rows(after, rule))


def _is_enough(rule: BestRule, top: list[Place], one: Contender) -> bool:
    """Whether the places alone say what becomes of one more: there may be thousands of bars behind the last."""
    if not rule.remembers:
        return True
    first = next((place for place in top if place.rank == 1), None)
    # An earlier bar may stand in the first place as well: when the last one was retired, and only value counts.
    return first is not None and first.standing[2] == LAST_BAR and one.age > _as_contender(first).age


async def _all_rows(tx: Tx, board: Board) -> list[Place]:
    return (await bests.places(tx.conn, [board.no]))[board.no]


def _is_as_it_was(was: Place, one: Contender) -> bool:
    return _as_contender(was) == one and one.present


async def _decide(tx: Tx, board: Board, rows: list[Place]) -> bool:
    return await bests.record(tx, board, rows, await _decided(tx.conn, board))


async def _decided(conn: AsyncConnection, board: Board) -> list[Place]:
    """Return what a board's rows should be, from everything that takes part.

    Of many the arithmetic is left to a thread: a Pareto set of thousands is seconds of it.
    """
    rule = BestRule.model_validate(board.rule)
    which = await contenders.among(conn, board)
    if rule.by == "metric" and not rule.remembers:
        found = await contenders.leaders(conn, which, rule.metric, board.mode, rule.places or 1)
    else:
        found = await contenders.everyone(conn, which, retired=rule.remembers)

    def decided() -> list[Place]:
        everyone = [one for one in (_contender(rule, row) for row in found) if one is not None]
        return _as_rows(decide(everyone, rule), rule)

    return decided() if len(found) <= INLINE_MAX else await anyio.to_thread.run_sync(decided)


def _contender(rule: BestRule, row: Seen) -> Contender | None:
    found = measure(rule, row.metrics)
    if found is None:
        return None
    when = age(rule, row.segment, row.step, row.revision, row.sequence)
    return Contender(row.id, row.sequence, when, *found, present=row.is_good, experiment_no=row.experiment_no)


def _as_rows(decided: Decision, rule: BestRule) -> list[Place]:
    ranks = {one.sequence: rank for rank, one in enumerate(decided.places, start=1)}
    parts = dict.fromkeys((one.sequence for one in decided.members), MEMBER)
    if rule.min_delta and decided.members:
        parts[decided.members[-1].sequence] = LAST_BAR
    return [
        Place(
            checkpoint_no=number,
            checkpoint_id=one.id,
            rank=ranks.get(number, 0),
            experiment_no=one.experiment_no,
            value=one.value,
            standing=[list(one.vector), list(one.age), parts.get(number, 0)],
            present=one.present,
        )
        for number, one in {one.sequence: one for one in (*decided.places, *decided.members)}.items()
    ]


def _decision(rows: Sequence[Place]) -> Decision:
    places = sorted((place for place in rows if place.rank > 0), key=lambda place: place.rank)
    members = sorted((_as_contender(place) for place in rows if place.standing[2]), key=lambda one: one.age)
    return Decision(tuple(map(_as_contender, places)), tuple(members))


def _as_contender(place: Place) -> Contender:
    vector, when, _ = place.standing
    return Contender(
        place.checkpoint_id,
        place.checkpoint_no,
        tuple(when),
        tuple(vector),
        place.value,
        present=place.present,
        experiment_no=place.experiment_no,
    )
