"""What people ask about training itself: how a sweep is doing, and how an experiment can go on."""

from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import experiments, recovery
from ckptd.errors import BadRequest, NotFound
from ckptd.intake import sweeprequests as ask
from ckptd.intake.fields import Request
from ckptd.intake.follow import visible_to
from ckptd.intake.listener import Peer
from ckptd.intake.training import Answer, Front, Handler
from ckptd.model import ExperimentStatus
from ckptd.query.grid import Asked, grid


class Sweeps:
    """One method per op."""

    def __init__(self, front: Front) -> None:
        """Keep what the methods look at."""
        self._front = front
        self.handlers: dict[type[Request], Handler] = {ask.Grid: self.grid, ask.Recovery: self.recovery}

    async def grid(self, peer: Peer, request: ask.Grid) -> Answer:
        """Progress, time left and signs of life of each experiment."""
        wanted = Asked(
            uid=visible_to(peer.uid),
            project=request.project,
            tag=request.tag,
            parent=request.parent,
            metric=request.metric,
            silent_s=self._front.settings().intake.lost_after_s,
            limit=request.limit,
        )
        return await self._front.catalog.read(lambda conn: grid(conn, wanted, self._front.clock.now()))

    async def recovery(self, peer: Peer, request: ask.Recovery) -> Answer:
        """The last good checkpoint, and the command that goes on from it."""
        uid = visible_to(peer.uid)
        return await self._front.catalog.read(lambda conn: recover(conn, request, uid))


async def recover(conn: AsyncConnection, request: ask.Recovery, uid: int | None) -> Answer:
    """Return the reply of `recovery`. NotFound, Ambiguous; BadRequest when no experiment is named."""
    if request.experiment is not None:
        row: experiments.Experiment | None = await experiments.get(conn, request.experiment)
    elif request.project is not None and request.name is not None:
        row = await experiments.find(conn, uid, request.project, request.name)
    else:
        raise BadRequest("project and name, or experiment, say which one")
    if row is None or uid not in {None, row.uid}:
        named = request.experiment or f"{request.project}/{request.name}"
        raise NotFound(f"there is no experiment {named}", hint="`ckpt experiments` lists them")
    return {
        "experiment": row.id,
        "status": str(row.status),
        "error": row.error,
        **await recovery.of_experiment(conn, experiments.ended(row)),
    }


async def after_bad_end(conn: AsyncConnection, row: experiments.Experiment) -> Answer | None:
    """Return how an experiment that failed or was lost can go on; None for any other."""
    if row.status not in {ExperimentStatus.FAILED, ExperimentStatus.LOST}:
        return None
    return await recovery.of_experiment(conn, experiments.ended(row))
