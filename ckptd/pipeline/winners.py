"""The best of every rule follows what is known of the checkpoints, and follows the rules when they change."""

from typing import Literal

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.best import best
from ckptd.catalog import bests, figures, listing
from ckptd.catalog.tx import Tx
from ckptd.config import Rules, Settings
from ckptd.jobs import NewJob
from ckptd.pipeline.tools import Tools

log = structlog.get_logger()

Decided = dict[tuple[str, Literal["min", "max"]], list[tuple[str, float]]]


async def refresh_best(tx: Tx, experiment_id: str, rules: Rules) -> bool:
    """Decide the best of every rule again, inside the transaction that changed what it depends on."""
    return await bests.replace(tx, experiment_id, await _decided(tx.conn, experiment_id, rules))


async def follow_rules(tools: Tools, before: Settings | None = None) -> int:
    """Decide the best again wherever the rules of now have other winners than are recorded; return in how many
    experiments. Links and retention follow by a job. Asked after a start and after each reload.

    before  the settings until now: experiments whose rules for the best are the same are not even looked at
    """
    changed = 0
    for experiment_id, project, name in await tools.catalog.read(lambda conn: figures.matching(conn, None, None)):
        rules = tools.settings().rules_for(project, name)
        if before is not None and before.rules_for(project, name).keep_best == rules.keep_best:
            continue
        # Read first: at a start nearly all are as they should be, and none of these costs a transaction.
        if await tools.catalog.read(lambda conn, of=experiment_id, r=rules: _is_decided(conn, of, r)):  # type: ignore[misc]
            continue

        async def decide(tx: Tx, of: str = experiment_id, rules: Rules = rules) -> bool:
            if not await refresh_best(tx, of, rules):
                return False
            newest = await listing.latest(tx.conn, of)
            if newest is not None:
                await tools.jobs.enqueue_after(tx, NewJob(checkpoint_id=newest.id, lane=f"{of}/after", stage="link"))
            return True

        changed += await tools.catalog.write(decide)
    if changed:
        log.info("best.rules_followed", experiments=changed)
    return changed


async def _decided(conn: AsyncConnection, experiment_id: str, rules: Rules) -> Decided:
    decided: Decided = {}
    for rule in rules.keep_best:
        found = await bests.candidates(conn, experiment_id, rule.metric, rule.mode, rule.k)
        decided[rule.metric, rule.mode] = [(winner.checkpoint.id, winner.value) for winner in best(found, rule)]
    return decided


async def _is_decided(conn: AsyncConnection, experiment_id: str, rules: Rules) -> bool:
    recorded: Decided = {}
    for one in await bests.current(conn, experiment_id):
        recorded.setdefault((one.metric, one.mode), []).append((one.checkpoint_id, one.value))
    decided = await _decided(conn, experiment_id, rules)
    return recorded == {rule: winners for rule, winners in decided.items() if winners}
