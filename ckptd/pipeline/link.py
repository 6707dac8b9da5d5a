"""Keep `latest` and `best` beside an experiment's checkpoints: relative symlinks, replaced atomically.

They are a convenience computed from the catalog, never read back as truth. `best` follows the
first rule of keep_best; each metric also has `best_<metric>` when there are several rules. A link
whose checkpoint no other one can replace is removed: a link never leads to what is not verified.
"""

import os

import structlog

from ckptd import failpoint
from ckptd.catalog import bests, checkpoints, listing, roots
from ckptd.catalog.tx import Tx
from ckptd.config import Rules
from ckptd.errors import CkptdError
from ckptd.jobs import Job
from ckptd.model import Checkpoint
from ckptd.pipeline.tools import Onward, Outcome, Tools
from ckptd.worker.protocol import Link

log = structlog.get_logger()

NEXT = "retain"

# Something of a person's own under the name, a directory that went away, a file system without links.
_REFUSED = frozenset({"exists", "bad_path", "missing", "not_found", "denied"})


async def run(job: Job, tools: Tools) -> Outcome:
    """Point the links at today's winners. A root that can't hold links loses nothing by it."""
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, job.checkpoint_id))
    linked = await place(tools, checkpoint)

    async def onward(tx: Tx) -> Job:
        return await tools.jobs.advance(tx, job, NEXT, {**job.payload, "linked": linked})

    further = await tools.catalog.write(onward)
    failpoint.hit("link.recorded")
    return Onward(further)


async def place(tools: Tools, checkpoint: Checkpoint) -> list[str]:
    """Bring the links of `checkpoint`'s experiment up to date; return the ids that they lead to now.

    One at a time for each root: of two that look and place side by side, the one that looked first
    might place last.
    """
    rules = tools.settings().rules_for(checkpoint.project, checkpoint.experiment)
    root = await tools.catalog.read(lambda conn: roots.by_path(conn, checkpoint.root))
    if not rules.links or root is None or not root.may_link or not checkpoint.path:
        return []
    beside = os.path.dirname(checkpoint.path)
    async with tools.placing[checkpoint.root]:
        wanted = await _wanted(tools, checkpoint.experiment_id, rules)
        for name, found in wanted.items():
            target = os.path.relpath(found.path, beside) if found is not None else ""  # noqa: ASYNC240 - text only
            try:
                await tools.workers.call(Link(root=checkpoint.root, name=os.path.join(beside, name), target=target))
            except CkptdError as error:
                if error.code not in _REFUSED:
                    raise
                log.warning("link.refused", link=os.path.join(beside, name), **error.to_wire())
    return [found.id for found in wanted.values() if found is not None]


async def _wanted(tools: Tools, experiment_id: str, rules: Rules) -> dict[str, Checkpoint | None]:
    """Which checkpoint each link leads to; None for a link that must not be there."""
    newest = await tools.catalog.read(lambda conn: listing.latest(conn, experiment_id))
    winners = await tools.catalog.read(lambda conn: bests.current(conn, experiment_id))
    firsts = {(w.metric, w.mode): w.checkpoint_id for w in winners if w.rank == 1}
    rows = await tools.catalog.read(lambda conn: checkpoints.get_many(conn, list(firsts.values())))
    good = {row.id: row for row in rows.values() if row.is_good}
    wanted: dict[str, Checkpoint | None] = {"latest": newest, "best": None}
    for number, rule in enumerate(rules.keep_best):
        winner = good.get(firsts.get((rule.metric, rule.mode), ""))
        if number == 0:
            wanted["best"] = winner
        if len(rules.keep_best) > 1 and "/" not in rule.metric:
            wanted[f"best_{rule.metric}"] = winner
    return wanted
