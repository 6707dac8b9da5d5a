"""Keep `latest` and `best` beside an experiment's checkpoints: relative symlinks, replaced atomically.

They are a convenience computed from the catalog, never read back as truth. `best` follows the
first rule of keep_best, and each rule has `best_<name>`. Rules for a project have theirs one directory
up, beside the experiments'; a tree of experiments has no directory. A link whose checkpoint no other
one can replace, or whose rule is no more, is removed: a link never leads to what is not verified.
"""

import os
from collections.abc import Sequence

import structlog

from ckptd import failpoint
from ckptd.catalog import bests, checkpoints, listing, roots
from ckptd.catalog.bests import Board
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError
from ckptd.jobs import Job
from ckptd.model import Checkpoint
from ckptd.pipeline import owner
from ckptd.pipeline.tools import Onward, Outcome, Tools
from ckptd.rules import Rules
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
    async with tools.placing[checkpoint.root]:
        closed = await _closed(tools, checkpoint)
        wanted = await _wanted(tools, checkpoint, rules, closed)
        whose = await owner.of_checkpoint(tools, checkpoint.id)
        for link, found in wanted.items():
            target = "" if found is None else os.path.relpath(found.path, os.path.dirname(link))  # noqa: ASYNC240 - text only
            try:
                await tools.workers.call(Link(root=checkpoint.root, name=link, target=target, owner=whose))
            except CkptdError as error:
                if error.code not in _REFUSED:
                    raise
                log.warning("link.refused", link=link, **error.to_wire())
        for board in closed:
            await tools.catalog.write(lambda tx, no=board.no: bests.drop_board(tx, no))  # type: ignore[misc]
    return [found.id for found in wanted.values() if found is not None]


async def _wanted(
    tools: Tools, checkpoint: Checkpoint, rules: Rules, closed: Sequence[Board]
) -> dict[str, Checkpoint | None]:
    """Which checkpoint each link leads to; None for a link that must not be there."""
    newest = await tools.catalog.read(lambda conn: listing.latest(conn, checkpoint.experiment_id))
    winners = await tools.catalog.read(lambda conn: bests.current(conn, checkpoint.experiment_id, own=True))
    firsts = {(won.scope, won.rule): won.checkpoint_id for won in winners if won.rank == 1}
    rows = await tools.catalog.read(lambda conn: checkpoints.get_many(conn, list(firsts.values())))
    good = {row.id: row for row in rows.values() if row.is_good}
    beside = os.path.dirname(checkpoint.path)
    wanted: dict[str, Checkpoint | None] = {
        os.path.join(beside, "latest"): newest if rules.save_last else None,
        os.path.join(beside, "best"): None,
    }
    wanted |= {os.path.join(beside, name): None for name in _names(closed, "experiment")}
    for rule in rules.keep_best:
        if rule.scope == "experiment":
            winner = good.get(firsts.get(("experiment", rule.name), ""))
            if rule is rules.keep_best[0]:
                wanted[os.path.join(beside, "best")] = winner
            if "/" not in rule.name:
                wanted[os.path.join(beside, f"best_{rule.name}")] = winner
    above = os.path.dirname(beside)
    if above.startswith(checkpoint.root.rstrip("/") + "/"):
        # Whoever's rules made the board: the link must follow, whichever experiment has the winner.
        wanted |= {os.path.join(above, name): None for name in _names(closed, "project")}
        shared = {rule.name for rule in rules.keep_best if rule.scope == "project"}
        shared |= {name for scope, name in firsts if scope == "project"}
        for name in sorted(one for one in shared if "/" not in one):
            winner = good.get(firsts.get(("project", name), ""))
            found = winner if winner is not None and _leads_down(checkpoint.root, above, winner) else None
            wanted[os.path.join(above, f"best_{name}")] = found
    return wanted


async def _closed(tools: Tools, checkpoint: Checkpoint) -> list[Board]:
    """Return the boards whose rules are no more, and whose links may still be there."""
    where = await tools.catalog.read(lambda conn: bests.whereabouts(conn, checkpoint.experiment_id))
    return [] if where is None else await tools.catalog.read(lambda conn: bests.closed_boards(conn, where))


def _names(boards: Sequence[Board], scope: str) -> list[str]:
    return [f"best_{board.name}" for board in boards if board.scope == scope and "/" not in board.name]


def _leads_down(root: str, directory: str, winner: Checkpoint) -> bool:
    """Whether a link there may lead to the winner: it must not leave its root, nor climb."""
    return winner.root == root and winner.path.startswith(f"{directory}/")
