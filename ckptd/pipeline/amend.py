"""What was said of a checkpoint after its manifest was written follows to the disk, into late.json beside it.

The catalog comes first and is what everybody is answered from; the file is for the day when the
catalog is lost. The job runs in a lane of its own: a hung disk holds up nothing but the file.
"""

import structlog

from ckptd.catalog import checkpoints
from ckptd.errors import CkptdError
from ckptd.jobs import Job
from ckptd.model import State
from ckptd.pipeline.tools import Ended, Outcome, Tools
from ckptd.worker.protocol import Amend
from ckptd_client.wire import number

log = structlog.get_logger()

# The directory went away, or is another one now: there is nothing to write into.
_NOWHERE = frozenset({"missing", "not_found", "source_changed", "bad_path"})


async def run(job: Job, tools: Tools) -> Outcome:
    """Write what the row says now; later words have made a later job."""
    row = await tools.catalog.read(lambda conn: checkpoints.get(conn, job.checkpoint_id))
    if row.state in {State.LIVE, State.CORRUPT}:
        metrics = {name: number(value) for name, value in row.metrics.items()}
        try:
            said = Amend(root=row.root, path=row.path, checkpoint=row.id, metrics=metrics, veto=row.veto)
            await tools.workers.call(said)
        except CkptdError as error:
            if error.code not in _NOWHERE:
                raise
            log.warning("late.nowhere", checkpoint=row.id, path=row.path, **error.to_wire())
    await tools.catalog.write(lambda tx: tools.jobs.finish(tx, job))
    return Ended()
