"""Automatic plans that the brake holds: told once, named while it lasts, and decided anew by each plan.

What is held lies in no table: each plan says it again. In memory is what was told already and what `ckpt status`
names. That follows each automatic plan, each plan that a person makes or has carried out, and a reload; a
daemon that starts looks again at those that the event log tells of.
"""

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

import structlog

from ckptd import retention
from ckptd.catalog import eventlog, experiments
from ckptd.catalog.experiments import Experiment
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError
from ckptd.pipeline import history
from ckptd.pipeline.tools import OnHold, Tools
from ckptd.retention import Braked, Plan
from ckptd.rules import Rules

log = structlog.get_logger()

HELD = "retention.held"
PAGE = 500  # events of the log that are read at once


async def stops(tools: Tools, experiment_id: str, decided: Plan, rules: Rules) -> bool:
    """Whether a plan that nobody asked for must not be carried out. Emits retention.held when that is new."""
    found = retention.brake(decided, rules)
    if found is not None and experiment_id not in tools.on_hold:
        row = await tools.catalog.read(lambda conn: experiments.get(conn, experiment_id))
        await _tell(tools, row, found)
        tools.on_hold[experiment_id] = OnHold(row.project, row.name, row.uid, tools.clock.now(), rules, found)
    seen(tools, experiment_id, decided, rules)
    return found is not None


def seen(tools: Tools, experiment_id: str, decided: Plan, rules: Rules) -> None:
    """Take note of a plan, whoever made it: what was held has other numbers now, or is held no longer."""
    known = tools.on_hold.get(experiment_id)
    if known is None:
        return
    found = retention.brake(decided, rules)
    if found is None:
        forget(tools, experiment_id)
    else:
        tools.on_hold[experiment_id] = replace(known, rules=rules, braked=found)


def forget(tools: Tools, experiment_id: str) -> None:
    """Take note that nothing is held: no rule deletes any more, or the plan is a small one again."""
    if tools.on_hold.pop(experiment_id, None) is not None:
        log.info("retention.released", cause=experiment_id)


async def look_again(tools: Tools, experiment_ids: Iterable[str] | None = None) -> None:
    """Plan again for what is held and forget what no longer is; of all of it only that whose rules are others now."""
    given = experiment_ids is not None
    for experiment_id in list(tools.on_hold if experiment_ids is None else experiment_ids):
        known = tools.on_hold.get(experiment_id)
        if known is None:
            continue
        rules = tools.settings().rules_for(known.project, known.name)
        if given or rules != known.rules:
            seen(tools, experiment_id, await _planned(tools, experiment_id, rules), rules)


async def recall(tools: Tools) -> None:
    """After a start: name again what an earlier daemon held, where it is held still. It is not told again. Never raises."""
    try:
        for experiment_id, at in (await _logged(tools)).items():
            row = await tools.catalog.read(lambda conn, of=experiment_id: experiments.get(conn, of))  # type: ignore[misc]
            rules = tools.settings().rules_for(row.project, row.name)
            found = retention.brake(await _planned(tools, experiment_id, rules), rules)
            if found is not None and experiment_id not in tools.on_hold:
                tools.on_hold[experiment_id] = OnHold(row.project, row.name, row.uid, at, rules, found)
    except CkptdError as error:
        log.warning("retention.not_recalled", **error.to_wire())


async def _logged(tools: Tools) -> dict[str, datetime]:
    """Return the experiments that were ever held, as far as the log goes back, and when that was told last."""
    found: dict[str, datetime] = {}
    after = 0
    while page := await tools.catalog.read(lambda conn, at=after: eventlog.named(conn, [HELD], at, PAGE)):  # type: ignore[misc]
        found |= {one.event.experiment: one.at for one in page}
        after = page[-1].sequence
    return found


async def _planned(tools: Tools, experiment_id: str, rules: Rules) -> Plan:
    known = await tools.catalog.read(lambda conn: history.read(conn, tools.clock, experiment_id, rules))
    return await history.planned(known, rules)


async def _tell(tools: Tools, row: Experiment, found: Braked) -> None:
    data = {
        "project": row.project,
        "name": row.name,
        "drops": found.drops,
        "strips": found.strips,
        "live": found.live,
        "size_bytes": found.size_bytes,
        "why": "; ".join(found.why),
    }

    async def tell(tx: Tx) -> None:
        tx.tell(HELD, data, experiment=row.id)

    await tools.catalog.write(tell)
