"""Who looks on while saves go their way: counts, alerts, copies in memory, the web. None of it is needed by a save."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import anyio

from ckptd import __version__
from ckptd.events import Bus
from ckptd.intake import requests as ask
from ckptd.intake import trimming
from ckptd.intake.alerts import NAMES, Alerts
from ckptd.intake.fetchedfiles import FetchedFiles
from ckptd.intake.hotcopies import HotCopies
from ckptd.intake.meter import Gauges, Meter
from ckptd.intake.premises import web_doors
from ckptd.intake.recall import Recall
from ckptd.intake.status import Plant, Status
from ckptd.intake.training import Handler
from ckptd.intake.trouble import Troubles
from ckptd.model import JobState
from ckptd.pipeline.filecache import FileCache
from ckptd.web import Door, Sources, Web


@dataclass
class Observers:
    """Made once, from what exists already. `noticed` is for whoever answers requests."""

    plant: Plant
    status: Status
    troubles: Troubles
    bus: Bus
    recall: Recall
    hot: HotCopies = field(init=False)
    meter: Meter = field(init=False)
    alerts: Alerts = field(init=False)
    files: FileCache = field(init=False)
    doors: list[Door] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Put the parts together; nothing runs, and nothing listens, yet."""
        front = self.plant.front
        self.hot = HotCopies(front.pool, front.catalog, front.clock, lambda: front.settings().arenas)
        self.meter = Meter(Gauges(self.plant, self.hot, self.recall.answers), self.bus)
        self.alerts = Alerts(self.plant, self.status, self.bus)
        self.files = FileCache(front.catalog, self.plant.workers, front.clock, front.settings)
        self.troubles.alerts = self.alerts.troubles
        self.noticed = self.meter.noticed

    @property
    def handlers(self) -> dict[type[ask.Request], Handler]:
        """Return what they answer."""
        return {**self.meter.handlers, **FetchedFiles(self.files).handlers}

    async def run(self) -> None:
        """Look on until cancelled."""
        settings = self.plant.front.settings()
        self.doors = web_doors(settings)
        sources = Sources(self.figures, self.health, self.plant.front.statistics, __version__)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self.meter.run)
                group.start_soon(self.hot.run)
                group.start_soon(self.alerts.run)
                group.start_soon(trimming.run, self.recall.sweep)
                group.start_soon(Web(sources, self.doors, settings.web.connections_max).run)
        finally:
            for door in self.doors:
                door.sock.close()

    def figures(self) -> dict[str, Any]:
        """Return what a scrape shows: from memory alone, jobs as of the last beat, their age as of the last look."""
        jobs = self.troubles.pulse.jobs
        raised = Counter(name for name, _ in self.alerts.raised)
        return {
            **self.meter.now(),
            "jobs": {str(s): jobs.get(s, 0) for s in (JobState.QUEUED, JobState.RUNNING, JobState.PARKED)},
            "oldest_s": self.alerts.oldest_s,
            "alerts": {name: raised[name] for name in NAMES},
            "well": self.health()["well"],
        }

    def health(self) -> dict[str, Any]:
        """Return what a probe wants. Paths are in it: both doors are for the operator."""
        troubles = self.troubles.now()
        return {"well": not any(trouble.grave for trouble in troubles), "line": self.troubles.line(troubles)}
