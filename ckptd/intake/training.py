"""What training processes ask: open an experiment, lend memory, take a save, resume."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import __version__
from ckptd.catalog import Catalog, checkpoints, experiments, listing
from ckptd.catalog.listing import Scope
from ckptd.catalog.metrics import Point
from ckptd.catalog.owners import owners_of
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.config import Settings
from ckptd.errors import BadRequest, Busy, NoArena, NotAuthorized, NotFound, UnsupportedVersion
from ckptd.intake import requests as ask
from ckptd.intake import spoolhomes
from ckptd.intake.admit import Admission
from ckptd.intake.arena import owner_of
from ckptd.intake.arenas import Arena, ArenaPool, Use
from ckptd.intake.files import Files
from ckptd.intake.follow import Followers, level_of, sees_all, visible_to
from ckptd.intake.listener import Peer
from ckptd.intake.presence import MetricsBuffer, Presence
from ckptd.intake.spooled import offer_of
from ckptd.jobs import Jobs
from ckptd.model import Checkpoint, ExperimentStatus, Level, Origin, State
from ckptd.query.statistics import Statistics
from ckptd_client import wire
from ckptd_client.wire import from_number, number

Answer = dict[str, Any]
Handler = Callable[[Peer, Any], Awaitable[Answer]]
_UNSEEN_HINT = "have it share the pid namespace of the daemon: a container with --pid=host, or both in one"


@dataclass(frozen=True)
class Front:
    """What the handlers of requests work with."""

    catalog: Catalog
    jobs: Jobs
    pool: ArenaPool
    admission: Admission
    files: Files
    followers: Followers
    presence: Presence
    metrics: MetricsBuffer
    clock: Clock
    settings: Callable[[], Settings]
    state_dir: str
    check_load: Callable[[Checkpoint, str], Awaitable[None]]
    statistics: Statistics = field(default_factory=Statistics)


class Training:
    """One method per training op."""

    def __init__(self, front: Front) -> None:
        """Keep what the methods work with."""
        self._front = front
        self.handlers: dict[type[ask.Request], Handler] = {
            ask.Hello: self.hello,
            ask.ExperimentOpen: self.open,
            ask.ExperimentBeat: self.beat,
            ask.ExperimentClose: self.close,
            ask.ExperimentTag: self.tag,
            ask.Commit: self.commit,
            ask.Abandon: self.abandon,
            ask.Submit: self.submit,
            ask.Resolve: self.resolve,
            ask.Follow: self.follow,
            ask.MetricPoints: self.points,
            ask.CheckpointMetrics: self.late_metrics,
            ask.Report: self.report,
            ask.Replace: self.replace,
        }

    async def hello(self, peer: Peer, request: ask.Hello) -> Answer:
        """Agree on a version."""
        if wire.VERSION not in request.versions:
            raise UnsupportedVersion(f"this daemon speaks version {wire.VERSION}, the client {request.versions}")
        peer.greeted = True
        self._front.pool.rejoin(peer)
        settings = self._front.settings()
        return {
            "server": f"ckptd/{__version__}",
            "version": wire.VERSION,
            "uid": os.getuid(),
            "mode": settings.mode,
            "state_dir": self._front.state_dir,
            "spool_dir": await spoolhomes.at_hello(self._front.state_dir, peer.uid, settings.mode),
            "limits": {"arena_bytes_max": settings.arenas.bytes_max, "frame_bytes_max": wire.FRAME_BYTES_MAX},
        }

    async def open(self, peer: Peer, request: ask.ExperimentOpen) -> Answer:
        """Open or go on with an experiment."""
        front = self._front
        known = await front.catalog.read(
            lambda c: experiments.find(c, owner_of(peer.uid), request.project, request.name)
        )
        join = known is not None and front.presence.is_present(known.id)
        opened, newest = await front.admission.open_experiment(request, peer.uid, join=join)
        front.presence.came(peer, opened.experiment.id)
        peer.ended.discard(opened.experiment.id)
        if opened.existed and not join:
            peer.fresh[opened.experiment.id] = opened.segment
        return {
            "experiment": opened.experiment.id,
            "segment": opened.segment,
            "root": opened.experiment.root,
            "existed": opened.existed,
            "latest": None if newest is None else {"checkpoint": newest.id, "step": newest.step},
        }

    async def beat(self, peer: Peer, request: ask.ExperimentBeat) -> Answer:
        """Note a sign of life; after a reconnect also where it comes from."""
        await self._mine(peer, request.experiment)
        self._front.presence.came(peer, request.experiment)
        await self._front.catalog.write(lambda tx: experiments.heartbeat(tx, request.experiment, request.step))
        return {}

    async def close(self, peer: Peer, request: ask.ExperimentClose) -> Answer:
        """Training ended, well or not."""
        await self._mine(peer, request.experiment)
        await self._front.metrics.flush()
        error = {"code": "training", "message": request.error, "hint": ""} if request.error else None
        status = ExperimentStatus(request.status)
        await self._front.catalog.write(lambda tx: experiments.set_status(tx, request.experiment, status, error))
        self._front.presence.closed(request.experiment)
        peer.ended.add(request.experiment)
        return {}

    async def tag(self, peer: Peer, request: ask.ExperimentTag) -> Answer:
        """Change an experiment's tags."""
        await self._mine(peer, request.experiment)
        tags = await self._front.catalog.write(
            lambda tx: experiments.change_tags(tx, request.experiment, request.add, request.remove)
        )
        return {"tags": list(tags)}

    async def lease(self, peer: Peer, request: ask.Lease) -> tuple[Answer, Arena]:
        """Lend an arena; may wait. The caller sends the descriptor along with the answer.

        Nothing to a process whose end can't be seen: its connection may break while it writes, and nobody could
        tell when the memory may be lent to the next. It has the spool.
        """
        await self._mine(peer, request.experiment)
        if not peer.ticks:
            raise NoArena(f"process {peer.pid} can't be seen from here: its saves go to the spool", hint=_UNSEEN_HINT)
        arena = await self._front.pool.lease(request.experiment, request.size_bytes, peer, request.wait_s)
        return {"arena": arena.id.hex(), "generation": arena.generation, "size_bytes": arena.size_bytes}, arena

    async def commit(self, peer: Peer, request: ask.Commit) -> Answer:
        """Take a save over. Repeats (after a reconnect, after a restart) are one save."""
        front = self._front
        peer.fresh.pop(request.experiment, None)
        front.followers.add(peer, [request.checkpoint])
        arena = front.pool.get(bytes.fromhex(request.arena))
        if arena is not None and arena.use is Use.LEASED:
            # Also when the row is there already (the same image came through the spool): the arena must go on.
            row = await front.admission.arena(front.pool.leased(arena.id, request.generation, peer), peer.uid)
        else:
            known = await front.catalog.read(lambda conn: checkpoints.get_many(conn, [request.checkpoint]))
            if request.checkpoint not in known:
                raise NoArena(f"arena {request.arena[:12]} holds no save under generation {request.generation}")
            row = known[request.checkpoint]
            await self._mine(peer, row.experiment_id)
        return {**level_of(row), "revision": row.revision}

    async def abandon(self, peer: Peer, request: ask.Abandon) -> Answer:
        """Take an unused arena back."""
        arena = self._front.pool.leased(bytes.fromhex(request.arena), request.generation, peer)
        if arena.descriptor() is not None:
            raise BadRequest("the arena holds a committed save: commit it")
        self._front.pool.free(arena)
        return {}

    async def submit(self, peer: Peer, request: ask.Submit) -> Answer:
        """Take in files that lie where they lie."""
        row = await self._front.files.file(offer_of(request, owner_of(peer.uid)))
        self._front.followers.add(peer, [row.id])
        return level_of(row)

    async def resolve(self, peer: Peer, request: ask.Resolve) -> Answer:
        """Name one checkpoint and say where it is."""
        row = await self._selected(peer, request)
        if row.level.rank < Level(request.level).rank or row.state is not State.LIVE:
            raise NotFound(
                f"checkpoint {row.id} (step {row.step}) is {row.state}, {row.level}; {request.level} was asked for"
            )
        files = await self._front.catalog.read(lambda conn: checkpoints.files(conn, row.id))
        return {
            "checkpoint": row.id,
            "experiment": row.experiment_id,
            "project": row.project,
            "name": row.experiment,
            "step": row.step,
            "path": row.path,
            "level": str(row.level),
            "state": str(row.state),
            "size_bytes": row.size_bytes,
            "format": row.format,
            "metrics": {name: number(value) for name, value in row.metrics.items()},
            "files": [{"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in files[:1000]],
        }

    async def follow(self, peer: Peer, request: ask.Follow) -> Answer:
        """Follow checkpoints, and say where they are now."""
        self._front.followers.add(peer, request.checkpoints)

        async def read(conn: AsyncConnection) -> list[Checkpoint]:
            rows = await checkpoints.get_many(conn, request.checkpoints)
            owners = {} if sees_all(peer.uid) else await owners_of(conn, list(rows))
            return [row for row in rows.values() if sees_all(peer.uid) or owners.get(row.id) == peer.uid]

        return {"states": [level_of(row) for row in await self._front.catalog.read(read)]}

    async def points(self, peer: Peer, request: ask.MetricPoints) -> Answer:
        """Take metric points; answered once they wait for the next common commit."""
        row = await self._mine(peer, request.experiment)
        peer.fresh.pop(row.id, None)
        points = [
            Point(name, step, from_number(value), datetime.fromtimestamp(at, UTC))
            for name, step, value, at in request.points
        ]
        if not self._front.metrics.put(row.id, row.segment, points):
            raise Busy("too many metric points wait", retry_after_s=1.0)
        return {"accepted": len(points)}

    async def late_metrics(self, peer: Peer, request: ask.CheckpointMetrics) -> Answer:
        """Validation ended after the save: the best is decided again in the same transaction."""
        values = {name: from_number(value) for name, value in request.metrics.items()}
        await self._checkpoint(peer, request.checkpoint)
        await self._front.admission.late_metrics(request.checkpoint, values)
        return {}

    async def report(self, peer: Peer, request: ask.Report) -> Answer:
        """A reader found damage: our own worker reads it back before anybody believes it."""
        row = await self._checkpoint(peer, request.checkpoint)
        await self._front.admission.recheck(row)
        return {}

    async def replace(self, peer: Peer, request: ask.Replace) -> Answer:
        """Drop the oldest save of the experiment that is staged and not yet being written."""
        await self._mine(peer, request.experiment)
        front = self._front

        async def drop(tx: Tx) -> str | None:
            rows = await listing.of_experiment(tx.conn, request.experiment)
            for row in sorted(rows, key=lambda row: row.sequence):
                staged = row.state is State.PENDING and row.origin is Origin.MEMORY
                if staged and await front.jobs.cancel(tx, row.id):
                    await checkpoints.mark_replaced(tx, row.id)
                    return row.id
            return None

        dropped = await front.catalog.write(drop)
        if dropped is not None:
            front.pool.free_checkpoint(dropped)
        return {"replaced": dropped}

    # -- who may ---------------------------------------------------------------------------

    async def _mine(self, peer: Peer, experiment_id: str) -> experiments.Experiment:
        row = await self._front.catalog.read(lambda conn: experiments.get(conn, experiment_id))
        if peer.uid != row.uid and not sees_all(peer.uid):
            raise NotAuthorized(f"experiment {row.project}/{row.name} belongs to uid {row.uid}")
        return row

    async def _checkpoint(self, peer: Peer, checkpoint_id: str) -> Checkpoint:
        row = await self._front.catalog.read(lambda conn: checkpoints.get(conn, checkpoint_id))
        await self._mine(peer, row.experiment_id)
        return row

    async def _selected(self, peer: Peer, request: ask.Selecting) -> Checkpoint:
        return await select(self._front, peer, request)


async def select(front: Front, peer: Peer, request: ask.Selecting) -> Checkpoint:
    """Return the checkpoint that a selector names among those the peer may see."""
    project, name = request.project, request.name
    settings = front.settings()
    if request.experiment is not None:
        row = await front.catalog.read(lambda conn: experiments.get(conn, str(request.experiment)))
        project, name = row.project, row.name
    scope = Scope(
        uid=visible_to(peer.uid),
        project=project,
        name=name,
        experiment_id=request.experiment,
        rules=lambda project, name: settings.rules_for(project, name).keep_best,
    )
    return await front.catalog.read(lambda conn: listing.resolve(conn, request.selector, scope))
