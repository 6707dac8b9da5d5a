"""Limits of [alerts]: looked at by the daemon's own timer, told once when one is passed and once when it no longer is.

The decision is `judge`, which is pure. What it finds is an event (hooks and `ckpt log` have it), a line of the
log, and a trouble like every other, so that status, doctor and a probe say it too. A daemon that starts
tells again what still holds.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import config
from ckptd.catalog import experiments, figures
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError
from ckptd.events import Bus, Event
from ckptd.intake.alarm import announce
from ckptd.intake.meter import rss_bytes
from ckptd.intake.raised import tell_disk, tell_stalled
from ckptd.intake.status import Plant, Status
from ckptd.intake.trouble import Trouble
from ckptd.model import ExperimentStatus, JobState, State
from ckptd.query import volumes

log = structlog.get_logger()

EXPERIMENTS_MAX = 256  # running ones whose steps are followed
# A raised alert ends only when its value is back within this share of the limit: one that plays about it tells once.
RELAXED = 0.95
NAMES = ("rss", "backlog", "backlog_age", "disk", "corrupt", "stalled")

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Alert:
    """One limit that is passed. `about`: the disk's mount or the experiment's id where there are several."""

    name: str
    about: str
    value: float
    limit: float
    why: str
    do: str

    @property
    def key(self) -> Key:
        """What stays the same while it lasts."""
        return self.name, self.about

    def to_wire(self) -> dict[str, Any]:
        """Return the data of alert.raised."""
        return {"alert": self.name, "about": self.about, "value": self.value, "limit": self.limit, "why": self.why}


@dataclass(frozen=True)
class Readings:
    """What was looked at. None: it could not be read, and is left as it was.

    disks    free and total bytes by mount; one that does not answer is not among them
    stalled  seconds without a further step, and the name, by experiment id
    """

    rss_bytes: int = 0
    backlog_jobs: int | None = None
    backlog_age_s: float | None = None
    disks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    corrupt: int | None = None
    stalled: Mapping[str, tuple[float, str]] = field(default_factory=dict)


def judge(limits: config.Alerts, seen: Readings, raised: Collection[Key]) -> list[Alert]:
    """Return every alert that holds now, given those that held before."""
    return list(_judged(limits, seen, frozenset(raised)))


def _judged(limits: config.Alerts, seen: Readings, raised: frozenset[Key]) -> Iterator[Alert]:
    def over(name: str, value: float, limit: float) -> bool:
        return bool(limit) and value > limit * (RELAXED if (name, "") in raised else 1)

    if over("rss", seen.rss_bytes, limits.rss_bytes_max):
        why = f"the daemon uses {seen.rss_bytes / 2**20:.0f} MiB beside the arenas"
        do = "`ckpt stats` says what it holds; a defect if it keeps growing: please report it with the log"
        yield Alert("rss", "", seen.rss_bytes, limits.rss_bytes_max, why, do)
    if seen.backlog_jobs is not None and over("backlog", seen.backlog_jobs, limits.backlog_jobs_max):
        do = "the disks take less than trainers save: save less often, or look at the slow disk (`ckpt top`)"
        yield Alert("backlog", "", seen.backlog_jobs, limits.backlog_jobs_max, f"{seen.backlog_jobs} jobs wait", do)
    if seen.backlog_age_s is not None and over("backlog_age", seen.backlog_age_s, limits.backlog_age_s):
        why = f"the longest waiting job has waited for {seen.backlog_age_s / 60:.0f} min"
        do = "`ckpt status` names disks and workers that hang; `ckpt log` says what was tried"
        yield Alert("backlog_age", "", seen.backlog_age_s, limits.backlog_age_s, why, do)
    if limits.corrupt and seen.corrupt:
        do = "`ckpt cleanup` names them and what is damaged; with --confirm it moves them to the trash"
        yield Alert("corrupt", "", seen.corrupt, 0, f"{seen.corrupt} checkpoints on disk are damaged", do)
    for mount, (free, total) in sorted(seen.disks.items()):
        least = max(limits.disk_free_bytes_min, int(limits.disk_free_share_min * total))
        if least and free < least / (RELAXED if ("disk", mount) in raised else 1):
            why = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free on {mount}"
            do = "free space there, or set retention rules; nothing is deleted to make room without one"
            yield Alert("disk", mount, free, least, why, do)
    for experiment, (silent_s, name) in sorted(seen.stalled.items()):
        if limits.stalled_s and silent_s > limits.stalled_s:
            why = f"{name} runs, and has made no step for {silent_s / 60:.0f} min"
            yield Alert("stalled", experiment, silent_s, limits.stalled_s, why, "look at its process and its log")


class Alerts:
    """Looks every alerts.look_s. `raised` is what holds as of the last look."""

    def __init__(self, plant: Plant, status: Status, bus: Bus) -> None:
        """Nothing is raised before the first look."""
        self._plant = plant
        self._front = plant.front
        self._status = status
        self._bus = bus
        self._steps: dict[str, tuple[int, float]] = {}
        self.raised: dict[Key, Alert] = {}
        rss_bytes()  # now: when descriptors run out there is none to be had for the first look
        self.oldest_s: float | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await anyio.sleep(self._front.settings().alerts.look_s)
            await self.look()

    async def look(self) -> None:
        """Look once, and tell what has changed. Blocks for as long as the slowest of disks and catalog may."""
        limits = self._front.settings().alerts
        seen = await self._read(limits)
        found = {alert.key: alert for alert in judge(limits, seen, self.raised)}
        for key, alert in self.raised.items():
            if self._unknown(key, seen):
                found.setdefault(key, alert)
        before, self.raised = self.raised, found
        for key, alert in found.items():
            if key not in before:
                await self._tell("alert.raised", alert, alert.to_wire())
        for key, alert in before.items():
            if key not in found:
                await self._tell("alert.cleared", alert, {"alert": alert.name, "about": alert.about})

    def troubles(self) -> Iterator[Trouble]:
        """Name what is raised as `ckpt status` and `ckpt doctor` do. Damage has a check of its own there."""
        for alert in self.raised.values():
            if alert.name == "corrupt":
                yield Trouble("checkpoints", alert.why, alert.do)
            else:
                yield Trouble(f"alert {alert.name}" + (f" {alert.about}" if alert.about else ""), alert.why, alert.do)

    def _unknown(self, key: Key, seen: Readings) -> bool:
        """Whether nobody could say anything about it this time."""
        name, about = key
        if name == "disk":
            limits = self._front.settings().alerts
            wanted = limits.disk_free_bytes_min or limits.disk_free_share_min
            there = any(worker.mount == about for worker in self._plant.workers.state())
            return bool(wanted) and there and about not in seen.disks
        return name != "rss" and seen.backlog_jobs is None

    async def _tell(self, name: str, alert: Alert, data: dict[str, Any]) -> None:
        experiment = alert.about if alert.name == "stalled" else ""
        of_mount = {worker.mount: worker for worker in self._plant.workers.state()}

        async def tell(tx: Tx) -> None:
            tx.tell(name, data, experiment=experiment)
            if name == "alert.raised" and alert.name == "stalled":
                await tell_stalled(tx, alert.about, alert.value)
            elif name == "alert.raised" and alert.name == "disk":
                tell_disk(tx, of_mount.get(alert.about), alert.about, alert.value, alert.limit)

        try:
            await self._front.catalog.write(tell)
        except CkptdError as error:
            # A catalog that takes nothing is no reason to be silent: who listens hears it all the same.
            log.warning("alert.not_recorded", cause=error.code, **error.to_wire())
            announce(self._bus, Event(name, self._front.clock.now(), experiment, data=data))

    async def _read(self, limits: config.Alerts) -> Readings:
        front = self._front
        disks: dict[str, tuple[int, int]] = {}
        if limits.disk_free_bytes_min or limits.disk_free_share_min:
            for disk in await self._status.disks():
                disks[disk["mount"]] = (disk["free_bytes"], disk["total_bytes"])
        try:
            jobs = await front.jobs.counts()
            oldest, bad, running = await front.catalog.read(_look)
        except CkptdError as error:
            log.warning("alert.not_looked", cause=error.code, **error.to_wire())
            return Readings(rss_bytes(), disks=disks)
        self.oldest_s = 0.0 if oldest is None else max((front.clock.now() - oldest).total_seconds(), 0.0)
        return Readings(rss_bytes(), jobs.get(JobState.QUEUED, 0), self.oldest_s, disks, bad, self._silent(running))

    def _silent(self, running: list[experiments.Experiment]) -> dict[str, tuple[float, str]]:
        """Note how far each running experiment is, and since when; return how long that is, and its name."""
        now_s = self._front.clock.monotonic_s()
        known, self._steps = self._steps, {}
        found = {}
        for row in running:
            training = self._front.statistics.of_experiment(row.id)
            seen = [row.last_step, training.last[0] if training is not None and training.last is not None else None]
            step = max((step for step in seen if step is not None), default=None)
            if step is not None:
                before = known.get(row.id)
                self._steps[row.id] = before if before is not None and before[0] == step else (step, now_s)
                found[row.id] = (now_s - self._steps[row.id][1], f"{row.project}/{row.name}")
        return found


async def _look(conn: AsyncConnection) -> tuple[Any, int, list[experiments.Experiment]]:
    states = await figures.states(conn)
    rows = await experiments.active(conn, uid=None, limit=EXPERIMENTS_MAX)
    running = [row for row in rows if row.status is ExperimentStatus.RUNNING]
    return await volumes.oldest_queued(conn), states.get(State.CORRUPT, 0), running
