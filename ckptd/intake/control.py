"""What people ask through `ckpt` and only want to know: lists, one checkpoint, status, log."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import __version__
from ckptd.catalog import audits, bests, checkpoints, eventlog, experiments, figures, holds, listing, metrics, roots
from ckptd.catalog.listing import Filter
from ckptd.errors import BadRequest, CkptdError, NotFound
from ckptd.intake import describe
from ckptd.intake import requests as ask
from ckptd.intake.arenas import Use
from ckptd.intake.follow import wire_event
from ckptd.intake.listener import Listener, Peer
from ckptd.intake.reconcile import Reconciler
from ckptd.intake.training import Answer, Front, Handler, select
from ckptd.model import Checkpoint, ExperimentStatus, JobState, Level, State
from ckptd.query.totals import totals
from ckptd.worker import Workers
from ckptd.worker.protocol import Usage, Used
from ckptd_client import spool
from ckptd_client.wire import number

T = TypeVar("T", State, Level)
EXPERIMENTS_SHOWN_MAX = 50
FILES_SHOWN_MAX = 1000
REPLY_BYTES_MAX = 900_000  # below a frame's limit, so that the envelope fits


@dataclass
class Vitals:
    """What the daemon knows of itself."""

    socket: str
    started_s: float
    draining: bool = False
    problems: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Plant:
    """The parts that status and doctor look at."""

    front: Front
    workers: Workers
    reconciler: Reconciler
    vitals: Vitals
    listener: Callable[[], Listener]


class Control:
    """One method per reading op; commands.py has the acting ones."""

    def __init__(self, plant: Plant) -> None:
        """Keep what the methods look at."""
        self._plant = plant
        self._front = plant.front
        self.handlers: dict[type[ask.Request], Handler] = {
            ask.Status: self.status,
            ask.List: self.page,
            ask.Experiments: self.page_experiments,
            ask.Summary: self.summary,
            ask.Show: self.show,
            ask.Events: self.events,
            ask.Audit: self.audit,
            ask.Roots: self.roots,
            ask.Tail: self.tail,
        }

    async def status(self, _peer: Peer, _request: ask.Status) -> Answer:
        """How is everything?"""
        front, plant = self._front, self._plant
        counts = await front.jobs.counts()
        arenas = list(front.pool.all())
        shown, total = await front.catalog.read(self._experiment_states)
        return {
            "daemon": {
                "version": __version__,
                "pid": os.getpid(),
                "uptime_s": round(front.clock.monotonic_s() - plant.vitals.started_s, 1),
                "mode": front.settings().mode,
                "socket": plant.vitals.socket,
                "state_dir": front.state_dir,
                "connections": len(plant.listener().peers),
                "draining": plant.vitals.draining,
                "degraded": self.degraded(),
            },
            "arenas": {
                "bytes_used": front.pool.bytes_used,
                "bytes_max": front.settings().arenas.bytes_max,
                "count": len(arenas),
                "leased": sum(a.use is Use.LEASED for a in arenas),
                "committed": sum(a.use is Use.BUSY for a in arenas),
                "hot": sum(a.use is Use.HOT for a in arenas),
            },
            "jobs": {
                str(state): counts.get(state, 0) for state in (JobState.QUEUED, JobState.RUNNING, JobState.PARKED)
            },
            "spool": self._spool(),
            "workers": [
                {
                    "mount": w.mount,
                    "filesystem": w.filesystem,
                    "pid": w.pid,
                    "state": w.state,
                    "busy": w.requests,
                    "stuck": w.stuck,
                    "restarts": w.restarts,
                    "roots": list(w.roots),
                    "rss_bytes": w.rss_bytes,
                }
                for w in plant.workers.state()
            ],
            "roots": await self.root_states(),
            "experiments": shown,
            "experiments_total": total,
            "disk": await self.disks(),
        }

    def degraded(self) -> list[dict[str, Any]]:
        """Everything that does not work as it should, with why and since when."""
        found = list(self._plant.vitals.problems)
        return found + [
            {"what": f"mount {worker.mount}", "why": "its I/O worker does not answer", "since": None}
            for worker in self._plant.workers.state()
            if worker.state == "degraded"
        ]

    def _spool(self) -> dict[str, int]:
        directory = os.path.join(self._front.state_dir, "spool")
        return {"files": sum(1 for _ in spool.entries(directory)), "size_bytes": spool.used_bytes(directory)}

    async def _experiment_states(self, conn: AsyncConnection) -> tuple[list[dict[str, Any]], int]:
        rows, _ = await experiments.page(conn, limit=ask.PAGE_MAX)
        rows.sort(key=lambda row: (row.status is not ExperimentStatus.RUNNING, -row.heartbeat_at.timestamp()))
        shown = []
        for row in rows[:EXPERIMENTS_SHOWN_MAX]:
            summary = await experiments.summary(conn, row.id)
            levels = await figures.levels(conn, row.id)
            shown.append(
                {
                    "experiment": row.id,
                    "project": row.project,
                    "name": row.name,
                    "status": str(row.status),
                    "last_step": row.last_step,
                    "seen_at": describe.at(row.heartbeat_at),
                    "levels": {str(level): levels.get(level, 0) for level in Level if level is not Level.NONE},
                    "problems": {
                        str(state): summary.by_state.get(state, 0)
                        for state in (State.CORRUPT, State.MISSING, State.FAILED)
                    },
                }
            )
        return shown, await figures.experiments(conn)

    async def root_states(self) -> list[dict[str, Any]]:
        """Describe every root."""
        found = []
        for root in await self._front.catalog.read(roots.all_roots):
            scanning, problem = self._plant.reconciler.state_of(root.path)
            count, size_bytes = await self._front.catalog.read(lambda conn, r=root: figures.on_disk(conn, root_id=r.id))  # type: ignore[misc]
            found.append(
                {
                    "path": root.path,
                    "kind": str(root.kind),
                    "project": root.project,
                    "state": "degraded" if problem else "scanning" if scanning else "ok",
                    "problem": problem,
                    "allow_delete": root.allow_delete,
                    "allow_links": root.allow_links,
                    "checkpoints": count,
                    "size_bytes": size_bytes,
                    "scanned_at": describe.at(root.reconciled_at),
                }
            )
        return found

    async def disks(self) -> list[dict[str, Any]]:
        """How full are the file systems that hold roots; those that do not answer are left out."""
        seen: dict[str, dict[str, Any]] = {}
        for worker in self._plant.workers.state():
            if not worker.roots or worker.state == "degraded":
                continue
            try:
                used: Used = await self._plant.workers.call(Usage(root=worker.roots[0]))
            except CkptdError:
                continue  # status reports it as degraded; a disk that fails has no figures
            seen[worker.mount] = {
                "mount": worker.mount,
                "filesystem": used.filesystem,
                "total_bytes": used.total_bytes,
                "free_bytes": used.free_bytes,
            }
        return list(seen.values())

    async def page(self, peer: Peer, request: ask.List) -> Answer:
        """Page through checkpoints."""
        wanted = Filter(
            uid=None if peer.uid in {0, os.getuid()} else peer.uid,
            project=request.project,
            name=request.name,
            state=None if request.state is None else _one_of(State, request.state),
            level=None if request.level is None else _one_of(Level, request.level),
            tag=request.tag,
            sort=request.sort,
            limit=request.limit,
            after=request.after,
        )

        async def read(conn: AsyncConnection) -> Answer:
            page = await listing.find(conn, wanted)
            return {"checkpoints": await self._described(conn, page.checkpoints), "next": page.next}

        return await self._front.catalog.read(read)

    async def _described(self, conn: AsyncConnection, rows: list[Checkpoint]) -> list[dict[str, Any]]:
        """Describe rows; holds are looked up once per experiment of the page."""
        now = self._front.clock.now()
        held: dict[str, tuple[str | None, list[bests.Best], list[holds.Hold]]] = {}
        for experiment_id in {row.experiment_id for row in rows}:
            newest = await listing.latest(conn, experiment_id)
            winners = await bests.current(conn, experiment_id)
            kept = await holds.of_experiment(conn, experiment_id, now)
            held[experiment_id] = (None if newest is None else newest.id, winners, kept)
        return [
            describe.checkpoint(
                row,
                describe.hold_words(row, *held[row.experiment_id]),
                hot=self._front.pool.of_checkpoint(row.id) is not None,
            )
            for row in rows
        ]

    async def page_experiments(self, peer: Peer, request: ask.Experiments) -> Answer:
        """Page through experiments."""
        uid = None if peer.uid in {0, os.getuid()} else peer.uid
        after = None if request.after is None else _number(request.after)

        async def read(conn: AsyncConnection) -> Answer:
            rows, cursor = await experiments.page(conn, uid=uid, limit=request.limit, after=after)
            shown = [
                await self._experiment(conn, row)
                for row in rows
                if request.project is None or row.project == request.project
            ]
            return {"experiments": shown, "next": None if cursor is None else str(cursor)}

        return await self._front.catalog.read(read)

    async def _experiment(self, conn: AsyncConnection, row: experiments.Experiment) -> dict[str, Any]:
        newest = await listing.latest(conn, row.id)
        winners = [w for w in await bests.current(conn, row.id) if w.rank == 1]
        rows = await checkpoints.get_many(conn, [w.checkpoint_id for w in winners])
        best = [
            {
                "metric": w.metric,
                "mode": w.mode,
                "checkpoint": w.checkpoint_id,
                "step": rows[w.checkpoint_id].step,
                "value": number(w.value),
            }
            for w in winners
            if w.checkpoint_id in rows
        ]
        return describe.experiment(row, newest, best, await figures.on_disk(conn, experiment_id=row.id))

    async def summary(self, peer: Peer, request: ask.Summary) -> Answer:
        """Counts, sizes, the newest, the oldest and the best."""
        uid = None if peer.uid in {0, os.getuid()} else peer.uid
        return await self._front.catalog.read(lambda conn: totals(conn, uid, request.project, request.name))

    async def show(self, peer: Peer, request: ask.Show) -> Answer:
        """Everything about one checkpoint."""
        row = await select(self._front, peer, request)

        async def read(conn: AsyncConnection) -> Answer:
            now = self._front.clock.now()
            files = await checkpoints.files(conn, row.id)
            experiment = await experiments.get(conn, row.experiment_id)
            winners = await bests.current(conn, row.experiment_id)
            newest = await listing.latest(conn, row.experiment_id)
            kept = await holds.of_checkpoint(conn, row.id, now)
            words = describe.hold_words(row, None if newest is None else newest.id, winners, kept)
            logged = await eventlog.page(conn, checkpoint_id=row.id, limit=100)
            spelled = [
                {"kind": h.kind, "by": h.by, "note": h.note, "at": None, "expires_at": describe.at(h.until)}
                for h in kept
            ]
            spelled += [
                {"kind": word, "by": "", "note": "", "at": None, "expires_at": None}
                for word in words
                if word == "latest" or word.startswith("best:")
            ]
            return {
                "checkpoint": describe.checkpoint(
                    row, words, hot=self._front.pool.of_checkpoint(row.id) is not None, meta=True
                ),
                "experiment": await self._experiment(conn, experiment),
                "files": [
                    {"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in files[:FILES_SHOWN_MAX]
                ],
                "files_total": len(files),
                "holds": spelled,
                "copies": [
                    {
                        "tier": "local",
                        "location": row.path,
                        "checked_at": describe.at(row.verified_at),
                        "ok": None if row.verified_at is None else row.state is State.LIVE,
                    }
                ],
                "history": [
                    {
                        "at": describe.at(entry.at),
                        "what": entry.event.name.partition(".")[2],
                        "by": "",
                        "detail": str(entry.event.data.get("why", "")),
                    }
                    for entry in logged
                ],
            }

        return await self._front.catalog.read(read)

    async def events(self, peer: Peer, request: ask.Events) -> Answer:
        """Recent events; from now on also as pushes, when asked to follow."""

        async def read(conn: AsyncConnection) -> list[eventlog.Logged]:
            if request.since_seq is None:
                return await eventlog.newest(conn, request.limit)
            return await eventlog.page(conn, since=request.since_seq, limit=request.limit)

        if request.follow:
            self._front.followers.listen(peer)
        logged = await self._front.catalog.read(read)
        shown = [{**wire_event(entry.event), "seq": entry.sequence, "at": describe.at(entry.at)} for entry in logged]
        full = len(logged) == request.limit and request.since_seq is not None
        return {"events": shown, "next": logged[-1].sequence if full else None}

    async def audit(self, _peer: Peer, request: ask.Audit) -> Answer:
        """Who did what, newest first."""
        after = None if request.after is None else _number(request.after)
        entries, cursor = await self._front.catalog.read(
            lambda conn: audits.page(conn, limit=request.limit, after=after)
        )
        shown = [
            {
                "entry": entry.id,
                "at": describe.at(entry.at),
                "uid": entry.deed.uid,
                "pid": entry.deed.pid,
                "action": entry.deed.verb,
                "checkpoint": entry.deed.subject,
                "experiment": None,
                "before": entry.deed.before,
                "after": entry.deed.after,
                "note": entry.deed.note,
            }
            for entry in entries
        ]
        return {"entries": shown, "next": None if cursor is None else str(cursor)}

    async def roots(self, _peer: Peer, _request: ask.Roots) -> Answer:
        """Which trees are managed or watched?"""
        return {"roots": await self.root_states()}

    async def tail(self, _peer: Peer, request: ask.Tail) -> Answer:
        """Metric points that arrived after a cursor, oldest first."""
        if request.project is None or request.name is None:
            raise BadRequest("project and name say whose metrics")
        project, name = request.project, request.name
        row = await self._front.catalog.read(lambda conn: experiments.find(conn, None, project, name))
        if row is None:
            raise NotFound(f"no experiment {project}/{name}")
        points = await self._front.catalog.read(
            lambda conn: metrics.tail(conn, row.id, request.after or 0, request.limit)
        )
        shown = [
            {"id": p.id, "name": p.name, "step": p.step, "value": number(p.value), "at": describe.at(p.at)}
            for p in points
        ]
        return {"points": shown, "next": points[-1].id if points else request.after}


def _one_of(kind: type[T], text: str) -> T:
    try:
        return kind(text)
    except ValueError as error:
        raise BadRequest(f"{text!r} is none of {', '.join(kind)}") from error


def _number(cursor: str) -> int:
    if not cursor.isdigit():
        raise BadRequest(f"{cursor!r} is no cursor")
    return int(cursor)
