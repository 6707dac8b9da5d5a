"""Events that an operator must hear of, in the log as well: lost data is critical, and a journal syncs at that.

Everything else that happens is told by hooks, by `ckpt log` and to whoever follows.
"""

import structlog

from ckptd.events import Bus, Event

log = structlog.get_logger()

# critical: bytes that somebody relied on are gone or wrong. error: a person must act. warning: it mends itself.
LEVELS = {
    "checkpoint.corrupt": "critical",
    "checkpoint.failed": "critical",
    "checkpoint.missing": "error",
    "job.parked": "error",
    "root.degraded": "error",
    "disk.low": "error",
    "disk.relief": "warning",
    "catalog.failed": "error",
    "experiment.stalled": "warning",
    "hook.missed": "warning",
    "hook.opened": "warning",
    "retention.held": "warning",
    "catalog.migrated": "info",
    "worker.lost": "warning",
    "worker.started": "info",
    "root.recovered": "info",
    "alert.raised": "error",
    "alert.cleared": "info",
}
_ABOUT = (
    "worker.",
    "root.",
    "disk.",
    "catalog.",
    "hook.",
    "alert.",
)  # a mount and what happens on it: never many at a time


def announce(bus: Bus, event: Event) -> None:
    """Publish one event, and log it when LEVELS says so; of many about one experiment one line stands for all."""
    bus.publish(event)
    level = LEVELS.get(event.name)
    if level is None:
        return
    about = {} if event.name.startswith(_ABOUT) else {"cause": event.experiment, "checkpoint": event.checkpoint}
    getattr(log, level)(event.name, **about, **event.data)
