"""Every point that a hook may name: what has just happened or is about to, and what it is told.

Facts are the events of `ckptd.events`, told after the commit that made them true. The before_* points
are asked: only there may a hook veto. HookEvent is written out, so that editors and type checkers know
the names; a test compares it with the events.
"""

from dataclasses import dataclass
from enum import StrEnum

from ckptd.events import EVENTS, MISSED


class HookEvent(StrEnum):
    """The points, in the order of a checkpoint's way. A second name of one value is an alias."""

    BEFORE_CHECKPOINT_SAVE = "checkpoint.before_save"
    AFTER_CHECKPOINT_SAVE = "checkpoint.published"
    CHECKPOINT_PUBLISHED = "checkpoint.published"
    BEFORE_CHECKPOINT_LOAD = "checkpoint.before_load"
    AFTER_CHECKPOINT_LOAD = "checkpoint.loaded"
    CHECKPOINT_LOADED = "checkpoint.loaded"
    CHECKPOINT_LOAD_FAILED = "checkpoint.load_failed"
    BEFORE_INTEGRITY_CHECK = "checkpoint.before_verify"
    AFTER_INTEGRITY_CHECK = "checkpoint.verified"
    CHECKPOINT_VERIFIED = "checkpoint.verified"
    ON_INTEGRITY_FAILURE = "checkpoint.corrupt"
    CHECKPOINT_CORRUPT = "checkpoint.corrupt"
    BEFORE_CHECKPOINT_DELETE = "checkpoint.before_delete"
    AFTER_CHECKPOINT_DELETE = "checkpoint.dropped"
    CHECKPOINT_DROPPED = "checkpoint.dropped"
    BEFORE_RETENTION = "retention.before_apply"
    AFTER_RETENTION = "retention.applied"
    RETENTION_APPLIED = "retention.applied"
    RETENTION_HELD = "retention.held"

    CHECKPOINT_STAGED = "checkpoint.staged"
    CHECKPOINT_FOUND = "checkpoint.found"
    CHECKPOINT_DESCRIBED = "checkpoint.described"
    CHECKPOINT_MISSING = "checkpoint.missing"
    CHECKPOINT_FAILED = "checkpoint.failed"
    CHECKPOINT_REPLACED = "checkpoint.replaced"
    CHECKPOINT_TRASHED = "checkpoint.trashed"
    CHECKPOINT_RESTORED = "checkpoint.restored"
    CHECKPOINT_PINNED = "checkpoint.pinned"
    CHECKPOINT_UNPINNED = "checkpoint.unpinned"
    CHECKPOINT_UNVETOED = "checkpoint.unvetoed"
    CHECKPOINT_TAGGED = "checkpoint.tagged"
    CHECKPOINT_STRIPPED = "checkpoint.stripped"
    CHECKPOINT_UNSTRIPPED = "checkpoint.unstripped"
    ON_BEST_MODEL_UPDATE = "best.changed"
    BEST_CHANGED = "best.changed"
    LATEST_CHANGED = "latest.changed"
    ON_METRIC_THRESHOLD = "metric.crossed"
    METRIC_CROSSED = "metric.crossed"

    ON_EXPERIMENT_START = "experiment.opened"
    EXPERIMENT_OPENED = "experiment.opened"
    EXPERIMENT_RESUMED = "experiment.resumed"
    ON_EXPERIMENT_END = "experiment.closed"
    EXPERIMENT_CLOSED = "experiment.closed"
    ON_EXPERIMENT_ERROR = "experiment.failed"
    EXPERIMENT_FAILED = "experiment.failed"
    EXPERIMENT_STALLED = "experiment.stalled"
    EXPERIMENT_LOST = "experiment.lost"

    DAEMON_STARTED = "daemon.started"
    DAEMON_STOPPING = "daemon.stopping"
    CONFIG_RELOADED = "config.reloaded"
    DISK_LOW = "disk.low"
    DISK_RELIEF = "disk.relief"
    ON_DB_ERROR = "catalog.failed"
    CATALOG_FAILED = "catalog.failed"
    CATALOG_MIGRATED = "catalog.migrated"
    ROOT_ADDED = "root.added"
    ROOT_DEGRADED = "root.degraded"
    ROOT_RECOVERED = "root.recovered"
    WORKER_STARTED = "worker.started"
    WORKER_LOST = "worker.lost"
    JOB_RETRIED = "job.retried"
    JOB_PARKED = "job.parked"
    HOOK_FINDING = "hook.finding"
    HOOK_OPENED = "hook.opened"
    HOOK_MISSED = "hook.missed"
    ALERT_RAISED = "alert.raised"
    ALERT_CLEARED = "alert.cleared"


@dataclass(frozen=True, slots=True)
class Point:
    """One point as documented.

    keys      of `context.data`; all optional, and a checkpoint's metrics may stand beside them
    may_veto  True exactly at the points that are asked before an act
    effect    what a veto does there
    """

    event: HookEvent
    meaning: str
    keys: tuple[str, ...]
    may_veto: bool = False
    effect: str = ""


_CHECKPOINT = ("project", "name", "step", "epoch", "path", "size_bytes", "metrics", "tags")

# The acts that are asked about.
_BEFORE = (
    Point(
        HookEvent.BEFORE_CHECKPOINT_SAVE,
        "a staged or found checkpoint is about to be published",
        (*_CHECKPOINT, "revision", "origin"),
        may_veto=True,
        effect="it is published as safely as any, and is neither latest nor best",
    ),
    Point(
        HookEvent.BEFORE_CHECKPOINT_LOAD,
        "a reader asked for a checkpoint and is about to be told where it is",
        (*_CHECKPOINT, "selector"),
        may_veto=True,
        effect="the reader gets an error with the reason, never another checkpoint",
    ),
    Point(
        HookEvent.BEFORE_INTEGRITY_CHECK,
        "a checkpoint is about to be read back and compared with its digests",
        _CHECKPOINT,
        may_veto=True,
        effect="it is read back later, after a bounded time at the latest",
    ),
    Point(
        HookEvent.BEFORE_CHECKPOINT_DELETE,
        "one checkpoint is about to go to the trash",
        (*_CHECKPOINT, "why"),
        may_veto=True,
        effect="it stays, this time",
    ),
    Point(
        HookEvent.BEFORE_RETENTION,
        "a plan that retires checkpoints of one experiment is about to be executed",
        ("project", "name", "checkpoints", "size_bytes", "why"),
        may_veto=True,
        effect="nothing of the plan is executed, this time",
    ),
)


def _facts() -> dict[HookEvent, Point]:
    members = set(HookEvent)
    return {
        HookEvent(name): Point(HookEvent(name), declared.meaning, declared.keys)
        for name, declared in EVENTS.items()
        if name != MISSED and name in members
    }


POINTS: dict[HookEvent, Point] = {**{point.event: point for point in _BEFORE}, **_facts()}

_ASKED = frozenset(str(point.event) for point in _BEFORE)


def may_veto(event: str) -> bool:
    """Whether a hook is asked at this point, so that its veto counts."""
    return event in _ASKED
