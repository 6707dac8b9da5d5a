"""Fills query/statistics.py from what happens anyway, and answers `stats`.

Two sources: the bus (each event is true by then) and requests that were answered. Neither waits for
this: events queue up to QUEUED_MAX here, the oldest are lost beyond that, and how many is counted.
"""

import functools
import math
import os
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ckptd.catalog import figures
from ckptd.errors import NotFound
from ckptd.events import MISSED, Bus, Event
from ckptd.intake import requests as ask
from ckptd.intake.arenas import Use
from ckptd.intake.follow import visible_to
from ckptd.intake.hotcopies import HotCopies
from ckptd.intake.listener import Peer
from ckptd.intake.status import Plant
from ckptd.intake.training import Answer, Handler
from ckptd.model import JobState
from ckptd.query import volumes
from ckptd.query.answers import Answers
from ckptd.query.statistics import MEASURES, Period

QUEUED_MAX = 8192
FOLLOWED_MAX = 4096  # saves on their way whose beginning is remembered
STALLS_MAX = 512  # commits whose stall was counted: one is sent again soon or never
STALL_S_MAX = 86400.0  # what a client may claim
_STATM = "/proc/self/statm"
_PAGE = os.sysconf("SC_PAGE_SIZE")

# Events that are counted by name; a closed list, so that what is counted can be a label anywhere.
COUNTED = (
    "checkpoint.staged", "checkpoint.found", "checkpoint.published", "checkpoint.verified", "checkpoint.corrupt",
    "checkpoint.missing", "checkpoint.failed", "checkpoint.replaced", "checkpoint.trashed", "checkpoint.dropped",
    "checkpoint.restored", "experiment.opened", "experiment.resumed", "experiment.closed", "experiment.failed",
    "experiment.lost", "job.retried", "job.parked", "worker.started", "worker.lost", "root.degraded", "best.changed",
)  # fmt: skip


@dataclass(frozen=True)
class Gauges:
    """What is looked at when somebody asks, beside what was counted."""

    plant: Plant
    hot: HotCopies
    answers: Answers


class Meter:
    """Counts until cancelled; answers from memory and, for `stats`, with two or three reads of the catalog."""

    def __init__(self, gauges: Gauges, bus: Bus) -> None:
        """Nothing is counted before `run`, but for requests."""
        self._gauges = gauges
        self._front = gauges.plant.front
        self._statistics = self._front.statistics
        self._bus = bus
        self._staged_s: OrderedDict[str, float] = OrderedDict()
        self._stalls: OrderedDict[str, None] = OrderedDict()
        self.handlers: dict[type[ask.Request], Handler] = {ask.Stats: self.stats}

    async def run(self) -> None:
        """Count events until cancelled."""
        async with self._bus.subscribe(QUEUED_MAX) as events:
            async for event in events:
                self.note(event)

    def note(self, event: Event) -> None:
        """Count one event."""
        now_s, name = self._front.clock.monotonic_s(), event.name
        if name == MISSED:
            self._statistics.count(MISSED, now_s, int(event.data.get("count", 1)))
        if name not in COUNTED:
            return
        self._statistics.count(name, now_s)
        if name == "checkpoint.staged":
            _remember(self._staged_s, event.checkpoint, now_s, FOLLOWED_MAX)
        elif name == "checkpoint.published":
            self._published(event, now_s)
        elif name == "checkpoint.verified" and event.checkpoint in self._staged_s:
            self._statistics.time("verified", now_s - self._staged_s.pop(event.checkpoint), now_s)
        elif name in {"checkpoint.failed", "checkpoint.replaced"}:
            self._staged_s.pop(event.checkpoint, None)
        elif name in {"experiment.opened", "experiment.resumed"}:
            self._statistics.restarted(event.experiment)

    def _published(self, event: Event, now_s: float) -> None:
        self._statistics.count("written_bytes", now_s, int(event.data.get("size_bytes") or 0))
        if event.checkpoint in self._staged_s:
            self._statistics.time("durable", now_s - self._staged_s[event.checkpoint], now_s)
        for measure in ("write", "hash"):
            if f"{measure}_ms" in event.data:
                self._statistics.time(measure, float(event.data[f"{measure}_ms"]) / 1000, now_s)

    def noticed(self, request: ask.Request, answer: Answer) -> None:
        """A request was answered: count what it said. Never fails for what a client claims."""
        now_s = self._front.clock.monotonic_s()
        if isinstance(request, ask.Commit):
            stall_s = request.stall_s
            known = request.checkpoint in self._stalls  # a commit is sent again after a reconnect
            if stall_s is not None and not known and math.isfinite(stall_s) and 0 <= stall_s <= STALL_S_MAX:
                _remember(self._stalls, request.checkpoint, None, STALLS_MAX)
                self._statistics.stalled(request.experiment, stall_s, now_s)
        elif isinstance(request, ask.MetricPoints):
            steps = [step for _, step, _, _ in request.points if step is not None]
            if steps:
                self._statistics.stepped(request.experiment, max(steps), now_s)
        elif isinstance(request, ask.ExperimentBeat):
            if request.step is not None:
                self._statistics.stepped(request.experiment, request.step, now_s)
            if request.rss_bytes is not None:
                self._statistics.client(request.experiment, request.rss_bytes)
        elif isinstance(request, ask.Attach):
            self._statistics.count("hot_hits" if answer.get("hot") else "hot_misses", now_s)

    # -- what is asked -------------------------------------------------------------------------

    def now(self) -> Answer:
        """Return everything that memory knows, since the daemon's start. No disk, no catalog, no waiting."""
        front, gauges = self._front, self._gauges
        arenas = list(front.pool.all())
        answers, workers = gauges.answers, gauges.plant.workers.state()
        by_use = {use: [arena for arena in arenas if arena.use is use] for use in Use}
        return {
            "uptime_s": round(front.clock.monotonic_s() - gauges.plant.vitals.started_s, 1),
            "arenas": {
                "bytes_max": front.settings().arenas.bytes_max,
                "bytes_used": front.pool.bytes_used,
                "waiting": front.pool.waiting,
                "count": {str(use): len(found) for use, found in by_use.items()},
                "bytes": {str(use): sum(arena.size_bytes for arena in found) for use, found in by_use.items()},
            },
            "hot": {
                "hits": self._statistics.total.counts["hot_hits"],
                "misses": self._statistics.total.counts["hot_misses"],
                "bytes_used": gauges.hot.bytes_used,
                "bytes_max": front.settings().arenas.hot_bytes_max,
                "given_up": gauges.hot.given_up,
            },
            "answers": {
                "hits": answers.hits,
                "misses": answers.misses,
                "entries": len(answers),
                "bytes_used": answers.bytes_used,
                "bytes_max": answers.bytes_max,
            },
            "memory": {
                "daemon_rss_bytes": rss_bytes(),
                "workers_rss_bytes": sum(worker.rss_bytes or 0 for worker in workers),
                "clients_rss_bytes": sum(self._statistics.clients_rss_bytes.values()),
            },
            "workers": [
                {"mount": w.mount, "filesystem": w.filesystem, "restarts": w.restarts, "rss_bytes": w.rss_bytes}
                for w in workers
            ],
            "events_missed": self._bus.missed,
            "total": period(self._statistics.total),
        }

    async def stats(self, peer: Peer, request: ask.Stats) -> Answer:
        """How fast, how much, how full; of one experiment more. Errors as Catalog.read; NotFound."""
        front, uid = self._front, visible_to(peer.uid)
        now, now_s = front.clock.now(), front.clock.monotonic_s()
        since = None if request.since_s is None else now - timedelta(seconds=request.since_s)
        found = self._statistics.total if request.since_s is None else self._statistics.since(now_s - request.since_s)
        counts = await front.jobs.counts()
        oldest = await front.catalog.read(volumes.oldest_queued)
        one: Answer | None = None
        if request.name is not None:
            named = await front.catalog.read(lambda c: figures.matching(c, request.project, request.name, uid))
            if len(named) != 1:
                raise NotFound(
                    f"{len(named)} experiments are called {request.project or '*'}/{request.name}",
                    hint="name one as PROJECT/EXPERIMENT; `ckpt experiments` lists them",
                )
            one = await self._one(named[0], request)
        scope = volumes.Scope(uid, request.project, None if one is None else one["experiment"])
        rows = await front.catalog.read(lambda conn: volumes.volumes(conn, scope, since))
        for row in rows:
            training = self._statistics.of_experiment(row["experiment"])
            row |= {
                "stall_p50_s": None if training is None else training.stalls.percentile(0.5),
                "step_s": None if training is None else training.step_s,
                "cost": None if training is None else training.cost,
            }
        return {
            **self.now(),
            "since_s": request.since_s,
            "period": period(found),
            "jobs": {
                **{str(s): counts.get(s, 0) for s in (JobState.QUEUED, JobState.RUNNING, JobState.PARKED)},
                "oldest_s": None if oldest is None else max((now - oldest).total_seconds(), 0.0),
            },
            "experiments": rows,
            "experiment": one,
        }

    async def _one(self, named: tuple[str, str, str], request: ask.Stats) -> Answer:
        experiment_id, project, name = named
        now = self._front.clock.now()
        since = None if request.since_s is None else now - timedelta(seconds=request.since_s)
        durable, verified = await self._front.catalog.read(lambda c: volumes.climbs(c, experiment_id, since))
        training = self._statistics.of_experiment(experiment_id)
        return {
            "experiment": experiment_id,
            "project": project,
            "name": name,
            "stall": None if training is None else training.stalls.to_wire(),
            "durable": durable.to_wire(),
            "verified": verified.to_wire(),
            "step_s": None if training is None else training.step_s,
            "cost": None if training is None else training.cost,
            "client_rss_bytes": self._statistics.clients_rss_bytes.get(experiment_id),
        }


def period(found: Period) -> Answer:
    """Return a stretch of time as the objects `counts` and `took` of the reply of `stats`."""
    names = (*COUNTED, MISSED)
    return {
        "counts": {name: found.counts[name] for name in names if found.counts[name]},
        "written_bytes": found.counts["written_bytes"],
        "took": {what: found.took[what].to_wire() for what in MEASURES if what in found.took},
    }


@functools.cache
def _statm() -> int:
    return os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC)


def rss_bytes() -> int:
    """Return this process's memory. Does not block: the kernel answers from memory.

    OSError where the first call finds no descriptor left; it keeps one, so that no later call needs any.
    """
    return int(os.pread(_statm(), 256, 0).split()[1]) * _PAGE


def _remember(of: "OrderedDict[str, Any]", key: str, value: object, at_most: int) -> None:
    of[key] = value
    if len(of) > at_most:
        of.popitem(last=False)
