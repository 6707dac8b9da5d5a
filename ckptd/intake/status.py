"""How the daemon is: what it holds, what waits, what is wrong, how full the disks are.

Everything here is asked for when nothing else works, so no answer waits for a disk: a worker that
does not answer within DISK_ANSWER_S is left out, and named as what does not work.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import __version__
from ckptd.catalog import experiments, figures, roots
from ckptd.errors import CkptdError, TimedOut
from ckptd.intake import describe, spoolhomes
from ckptd.intake import requests as ask
from ckptd.intake.arenas import Use
from ckptd.intake.follow import sees_all, visible_to
from ckptd.intake.listener import Listener, Peer
from ckptd.intake.reconcile import Reconciler
from ckptd.intake.training import Answer, Front, Handler
from ckptd.intake.trouble import Troubles, Vitals
from ckptd.model import JobState, Level, State
from ckptd.worker import Workers
from ckptd.worker.protocol import Usage, Used

EXPERIMENTS_SHOWN_MAX = 50
DISK_ANSWER_S = 2.0
_WORKER_STATES = {"idle": "ok", "running": "ok", "degraded": "stuck"}


@dataclass(frozen=True)
class Plant:
    """The parts that status and doctor look at."""

    front: Front
    workers: Workers
    reconciler: Reconciler
    vitals: Vitals
    listener: Callable[[], Listener]


class Status:
    """Answers `status`, `health` and `roots`, and tells the doctor."""

    def __init__(self, plant: Plant, troubles: Troubles) -> None:
        """Keep what the methods look at."""
        self._plant = plant
        self._front = plant.front
        self._troubles = troubles
        self.handlers: dict[type[ask.Request], Handler] = {
            ask.Status: self.status,
            ask.Health: self.health,
            ask.Roots: self.roots,
        }

    async def status(self, peer: Peer, _request: ask.Status) -> Answer:
        """How is everything? Of experiments and roots a user sees the own ones."""
        front, plant = self._front, self._plant
        counts = await front.jobs.counts()
        arenas = list(front.pool.all())
        shown, total = await front.catalog.read(lambda conn: self._experiment_states(conn, visible_to(peer.uid)))
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
                "degraded": [trouble.to_wire() for trouble in self._troubles.known_to(peer.uid)],
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
            "spool": await anyio.to_thread.run_sync(_spooled, os.path.join(front.state_dir, "spool")),
            "workers": [
                {
                    "mount": w.mount,
                    "filesystem": w.filesystem,
                    "pid": w.pid,
                    "state": _WORKER_STATES[w.state],
                    "busy": w.requests,
                    "stuck": w.stuck,
                    "restarts": w.restarts,
                    "roots": list(w.roots) if sees_all(peer.uid) else [],
                    "rss_bytes": w.rss_bytes,
                    "last_error": "its I/O worker does not answer" if w.state == "degraded" else "",
                }
                for w in plant.workers.state()
            ],
            "roots": await self.root_states(peer.uid),
            "experiments": shown,
            "experiments_total": total,
            "disk": await self.disks(),
        }

    async def roots(self, peer: Peer, _request: ask.Roots) -> Answer:
        """Which trees are managed or watched?"""
        return {"roots": await self.root_states(peer.uid)}

    async def health(self, peer: Peer, _request: ask.Health) -> Answer:
        """Is it alive and well? Answered from memory: no disk, no catalog, no waiting."""
        troubles = self._troubles.known_to(peer.uid)
        return {
            "well": not any(trouble.grave for trouble in troubles),
            "line": self._troubles.line(troubles),
            "degraded": [trouble.to_wire() for trouble in troubles],
        }

    async def _experiment_states(self, conn: AsyncConnection, uid: int | None) -> tuple[list[dict[str, Any]], int]:
        shown = []
        for row in await experiments.active(conn, uid=uid, limit=EXPERIMENTS_SHOWN_MAX):
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
        return shown, await figures.experiments(conn, uid)

    async def root_states(self, uid: int) -> list[dict[str, Any]]:
        """Describe every root that a user may know of: those of the configuration, and the own ones."""
        of_mount = {root: w.filesystem for w in self._plant.workers.state() for root in w.roots}
        found = []
        for root in await self._front.catalog.read(roots.all_roots):
            if not (sees_all(uid) or root.uid == uid or sees_all(root.uid)):
                continue
            scanning, problem = self._plant.reconciler.state_of(root.path)
            count, size_bytes = await self._front.catalog.read(lambda conn, r=root: figures.on_disk(conn, root_id=r.id))  # type: ignore[misc]
            found.append(
                {
                    "path": root.path,
                    "kind": str(root.kind),
                    "project": root.project,
                    "state": "degraded" if problem else "scanning" if scanning else "ok",
                    "problem": problem,
                    "filesystem": of_mount.get(root.path),
                    "allow_delete": root.allow_delete,
                    "allow_links": root.allow_links,
                    "checkpoints": count,
                    "size_bytes": size_bytes,
                    "scanned_at": describe.at(root.reconciled_at),
                }
            )
        return found

    async def usage(self, root: str) -> Used:
        """How full is the file system under a root? TimedOut, and what the worker answers."""
        with anyio.move_on_after(DISK_ANSWER_S):
            used: Used = await self._plant.workers.call(Usage(root=root))
            return used
        raise TimedOut(f"the file system under {root} did not answer within {DISK_ANSWER_S:g} s")

    async def disks(self) -> list[dict[str, Any]]:
        """How full are the file systems that hold roots, asked side by side; those that do not answer are left out."""
        seen: dict[str, dict[str, Any]] = {}

        async def ask_one(mount: str, root: str) -> None:
            try:
                used = await self.usage(root)
            except CkptdError:
                return  # status reports it as degraded; a disk that fails has no figures
            seen[mount] = {
                "mount": mount,
                "filesystem": used.filesystem,
                "total_bytes": used.total_bytes,
                "free_bytes": used.free_bytes,
            }

        async with anyio.create_task_group() as group:
            for worker in self._plant.workers.state():
                if worker.roots and worker.state != "degraded":
                    group.start_soon(ask_one, worker.mount, worker.roots[0])
        return [seen[mount] for mount in sorted(seen)]


def _spooled(directory: str) -> dict[str, int]:
    return {
        "files": sum(1 for _ in spoolhomes.entries(directory)),
        "size_bytes": spoolhomes.used_bytes(directory),
    }
