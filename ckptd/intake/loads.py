"""Loads: hooks are asked before one, and what its reader says of it becomes a fact."""

from typing import Any

import anyio

from ckptd.catalog import checkpoints
from ckptd.catalog.owners import owners_of
from ckptd.catalog.tx import Tx
from ckptd.errors import NotFound, Vetoed
from ckptd.hooks.points import HookEvent
from ckptd.intake import hookrequests as ask
from ckptd.intake.fields import Request
from ckptd.intake.follow import sees_all
from ckptd.intake.listener import Peer
from ckptd.intake.training import Answer, Handler
from ckptd.model import Checkpoint
from ckptd.pipeline import asking
from ckptd.pipeline.tools import Tools

ASKED_S_MAX = 8.0  # a client waits 10 s for the answer to `attach`


class Loads:
    """The gate before a load, and the ear after it."""

    def __init__(self, tools: Tools) -> None:
        """Keep what is asked and written to."""
        self._tools = tools
        self.handlers: dict[type[Request], Handler] = {ask.Loaded: self.loaded}

    async def check(self, row: Checkpoint, selector: str) -> None:
        """Vetoed when a hook forbids to load this checkpoint. Waits for hooks ASKED_S_MAX at most; then it may be loaded."""
        objection = ""
        with anyio.move_on_after(ASKED_S_MAX):
            objection = await asking.about(self._tools, HookEvent.BEFORE_CHECKPOINT_LOAD, row, selector=selector)
        if objection:
            raise Vetoed(f"checkpoint {row.id} must not be loaded: {objection}", checkpoint=row.id)

    async def loaded(self, peer: Peer, request: ask.Loaded) -> Answer:
        """Write down that a reader has a checkpoint, or could not load it. NotFound, also for other people's."""

        async def tell(tx: Tx) -> None:
            row = await checkpoints.get(tx.conn, request.checkpoint)
            if not sees_all(peer.uid) and (await owners_of(tx.conn, [row.id])).get(row.id) != peer.uid:
                raise NotFound(f"there is no checkpoint {row.id}")
            facts: dict[str, Any] = {
                "project": row.project,
                "name": row.experiment,
                "step": row.step,
                "path": row.path,
                "size_bytes": row.size_bytes,
                "ms": request.ms,
                "pid": peer.pid,
            }
            if request.ok:
                name, facts["hot"] = "checkpoint.loaded", request.hot
            else:
                name, facts["error"] = "checkpoint.load_failed", {"code": "load", "message": request.error}
            tx.tell(name, facts, experiment=row.experiment_id, checkpoint=row.id)

        await self._tools.catalog.write(tell)
        return {}
