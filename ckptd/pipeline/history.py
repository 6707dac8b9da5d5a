"""What the rules of one experiment are applied to, as the catalog says it in one view; and whether that still holds."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import anyio.to_thread
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import retention
from ckptd.catalog import bests, burials, checkpoints, holds, listing, roots, strips
from ckptd.catalog import history as rows
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.model import Checkpoint
from ckptd.retention import Given
from ckptd.rules import Rules

INLINE_MAX = 500  # checkpoints that are planned for on the event loop: some milliseconds; more go to a thread


@dataclass(frozen=True, slots=True)
class History:
    """One experiment's checkpoints and what is known beside them.

    good          how many are good, for `still_holds`
    sequence_max  the last of them that had arrived
    """

    experiment_id: str
    checkpoints: tuple[Checkpoint, ...]
    given: Given
    good: int
    sequence_max: int


async def read(conn: AsyncConnection, clock: Clock, experiment_id: str, rules: Rules) -> History:
    """Read everything that a plan for one experiment needs."""
    now = clock.now()
    found = await rows.of_experiment(conn, experiment_id)
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for hold in await holds.of_experiment(conn, experiment_id, now):
        reasons[hold.checkpoint_id].append(f"{hold.kind} of {hold.by}" + (f": {hold.note}" if hold.note else ""))
    for winner in await bests.held(conn, experiment_id):
        reasons[winner.checkpoint_id].append(winner.words)
    places = {checkpoint.root for checkpoint in found}
    known = {root.path: root for root in await roots.at_paths(conn, places)}
    for checkpoint in found:
        root = known.get(checkpoint.root)
        if root is None or not root.may_remove(checkpoint.origin):
            reasons[checkpoint.id].append("root does not allow deletion")
    given = Given(
        now=now,
        holds=reasons,
        configurations={} if rules.keep_hashes is None else await rows.configurations(conn, experiment_id),
        tags=await rows.tags(conn, experiment_id) if rules.keep_tags else frozenset(),
        strippable=frozenset()
        if rules.strip_after is None
        else await strips.strippable(conn, experiment_id, rules.strip_files),
    )
    return History(
        experiment_id,
        tuple(found),
        given,
        sum(one.is_good for one in found),
        max((one.sequence for one in found), default=0),
    )


async def planned(history: History, rules: Rules) -> retention.Plan:
    """Plan; for long histories in a thread, since it is a second of arithmetic for ten thousand."""
    if len(history.checkpoints) <= INLINE_MAX:
        return retention.plan(history.checkpoints, rules, history.given)
    return await anyio.to_thread.run_sync(retention.plan, history.checkpoints, rules, history.given)


async def still_holds(tx: Tx, history: History, rules: Rules, drops: Sequence[Checkpoint], buried: int) -> bool:
    """Whether `drops` of a plan made from `history` may still go, of which `buried` others went since.

    A plan stands as long as what it keeps is as good as it was: then checkpoints that came since can
    only push more out. So: as many good ones as then, and none of the drops held, best, newest, tagged
    or saved in the future (the clock may have been set back). Costs a few statements, whatever the history's length.
    """
    conn, now, ids = tx.conn, tx.clock.now(), [one.id for one in drops]
    if await burials.good_count(conn, history.experiment_id, history.sequence_max) != history.good - buried:
        return False
    if await holds.of_checkpoints(conn, ids, now) or await bests.of_checkpoints(conn, ids):
        return False
    newest = await listing.latest(conn, history.experiment_id)
    if newest is None or newest.id in ids or any(one.created_at > now for one in drops):
        return False
    if rules.keep_tags and (
        await burials.bearing(conn, ids, rules.keep_tags)
        or await rows.tags(conn, history.experiment_id) - history.given.tags
    ):
        return False
    known = await checkpoints.get_many(conn, ids)
    return len(known) == len(ids) and all(one.is_good for one in known.values())
