"""As whom a worker makes what it makes: a shared daemon's as the user whose save it is, a user's own as itself."""

from ckptd.catalog import checkpoints
from ckptd.pipeline.tools import Tools


def of_user(tools: Tools, uid: int) -> int | None:
    """Return the uid that files of this user's are made as; None: the daemon's own."""
    return uid if tools.settings().mode == "system" else None


async def of_checkpoint(tools: Tools, checkpoint_id: str) -> int | None:
    """Return the uid that files of this checkpoint are made as; None: the daemon's own. NotFound."""
    if tools.settings().mode != "system":
        return None
    return await tools.catalog.read(lambda conn: checkpoints.uid_of(conn, checkpoint_id))
