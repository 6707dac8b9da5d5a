"""Keep `latest` and `best` beside an experiment's checkpoints: relative symlinks, replaced atomically.

They are a convenience computed from the catalog, never read back as truth. `best` follows the
first rule of keep_best; each metric also has `best_<metric>` when there are several rules.
"""

import os

from ckptd.catalog import bests, checkpoints, listing, roots
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError
from ckptd.jobs import Job
from ckptd.model import Checkpoint, RootKind
from ckptd.pipeline.tools import Onward, Outcome, Tools
from ckptd.worker.protocol import Link

NEXT = "retain"


async def run(job: Job, tools: Tools) -> Outcome:
    """Point the links at today's winners. A root that can't hold links loses nothing by it."""
    checkpoint = await tools.catalog.read(lambda conn: checkpoints.get(conn, job.checkpoint_id))
    await place(tools, checkpoint)

    async def onward(tx: Tx) -> Job:
        return await tools.jobs.advance(tx, job, NEXT)

    return Onward(await tools.catalog.write(onward))


async def place(tools: Tools, checkpoint: Checkpoint) -> None:
    """Bring the links of `checkpoint`'s experiment up to date."""
    rules = tools.settings().rules_for(checkpoint.project, checkpoint.experiment)
    root = await tools.catalog.read(lambda conn: roots.by_path(conn, checkpoint.root))
    if not rules.links or root is None or not (root.kind is RootKind.MANAGED or root.allow_links):
        return
    newest = await tools.catalog.read(lambda conn: listing.latest(conn, checkpoint.experiment_id))
    winners = await tools.catalog.read(lambda conn: bests.current(conn, checkpoint.experiment_id))
    firsts = {(w.metric, w.mode): w.checkpoint_id for w in winners if w.rank == 1}
    wanted: dict[str, str] = {}
    if newest is not None:
        wanted["latest"] = newest.path
    for number, rule in enumerate(rules.keep_best):
        winner = firsts.get((rule.metric, rule.mode))
        if winner is None:
            continue
        path = (await tools.catalog.read(lambda conn, of=winner: checkpoints.get(conn, of))).path  # type: ignore[misc]
        if number == 0:
            wanted["best"] = path
        if len(rules.keep_best) > 1 and "/" not in rule.metric:
            wanted[f"best_{rule.metric}"] = path
    beside = os.path.dirname(checkpoint.path)
    for name, path in wanted.items():
        await tools.workers.call(
            Link(root=checkpoint.root, name=os.path.join(beside, name), target=os.path.relpath(path, beside))  # noqa: ASYNC240 - text only
        )


def refusal(error: CkptdError) -> bool:
    """Whether an error of `place` means that a person put something of their own under the link's name."""
    return error.code in {"refused", "bad_path", "exists"}
