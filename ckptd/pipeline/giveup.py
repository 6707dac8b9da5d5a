"""A save that is on its way is given up, because a person said so.

Its own trainer may have it replaced by a newer one; nothing else ever ends a save whose bytes are there.

    row, job                                       bytes                     a crash here ends as
    PENDING, waiting or parked                     arena or spool            it is tried again
    FAILED "given_up", done   (giveup.recorded)    arena or spool            the next daemon lets go of them
    FAILED "given_up", done                        gone                      the same

*Proof that nothing is lost by accident:* the row says that it was given up, durably, before a byte goes, in the
transaction that ends its job: so no publish of it is under way, and none begins. *And that it does not come back:*
whoever finds the bytes afterwards asks the row first (intake/admit.py).
"""

from ckptd import failpoint
from ckptd.catalog import audits, checkpoints, holds
from ckptd.catalog.tx import Tx
from ckptd.errors import Busy, Changed, GivenUp, Held
from ckptd.model import Checkpoint, Origin, State
from ckptd.pipeline.tools import Tools

RETRY_S = 1.0


async def look_at(tx: Tx, checkpoint: Checkpoint) -> None:
    """Held by a pin or a lease; Changed when it is no save on its way."""
    state = await checkpoints.state_of(tx.conn, checkpoint.id)
    if state is not State.PENDING or checkpoint.origin is not Origin.MEMORY:
        raise Changed(
            f"checkpoint {checkpoint.id} is {state}, and no save that waits in memory or in the spool: nothing was done",
            hint="`ckpt show ID` says what it is; `ckpt rm ID` removes one that is on disk",
        )
    found = await holds.of_checkpoint(tx.conn, checkpoint.id, tx.clock.now())
    why = [f"{hold.kind} of {hold.by}" for hold in found]
    if why:
        raise Held(f"checkpoint {checkpoint.id} is kept: {', '.join(why)}", holds=why)


async def give_up(tools: Tools, checkpoint: Checkpoint, uid: int, pid: int) -> None:
    """End a save of which nothing is on disk; its memory is free, its image gone. See the module for the order.

    Held, Changed as of `look_at`. Busy: it is being worked on at this moment.
    """

    async def record(tx: Tx) -> None:
        await look_at(tx, checkpoint)
        if not await tools.jobs.cancel(tx, checkpoint.id):
            raise Busy(f"checkpoint {checkpoint.id} is being worked on at this moment", retry_after_s=RETRY_S)
        await checkpoints.mark_failed(
            tx, checkpoint.id, GivenUp(f"uid {uid} gave it up before it was written").to_wire()
        )
        await audits.record(tx, audits.Deed(uid=uid, pid=pid, verb="give_up", subject=checkpoint.id))

    await tools.catalog.write(record)
    failpoint.hit("giveup.recorded")
    await tools.sources.drop(checkpoint.id)
