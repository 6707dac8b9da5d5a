"""Facts, told after the commit that made them true; and the bounded bus that carries them.

EVENTS is the whole vocabulary: an event that is not in it, or carries a key it does not declare, is
a Bug. Hooks, web, log and audit subscribe; nobody who publishes ever waits for them.
"""

from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import anyio

from ckptd.errors import Bug

QUEUED_MAX = 1024
MISSED = "events.missed"


@dataclass(frozen=True, slots=True)
class Event:
    """One fact.

    name        noun.verb, one of EVENTS
    at          aware UTC; for people, never for order
    experiment  id, "" where the fact is about none
    checkpoint  id, "" likewise
    data        JSON values under the keys that EVENTS declares, all optional
    seq         its number in the catalog's log where it was recorded there, else None
    """

    name: str
    at: datetime
    experiment: str = ""
    checkpoint: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    seq: int | None = None

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object of a push and of a hook's input."""
        return {
            "name": self.name,
            "at": self.at.isoformat(),
            "experiment": self.experiment,
            "checkpoint": self.checkpoint,
            "data": dict(self.data),
            "seq": self.seq,
        }


@dataclass(frozen=True, slots=True)
class Declared:
    """What an event means, in one line, and the keys its data may have."""

    meaning: str
    keys: tuple[str, ...] = ()


_CHECKPOINT = ("project", "name", "step", "path", "size_bytes")
_PROBLEM = (*_CHECKPOINT, "error")

EVENTS: dict[str, Declared] = {
    "daemon.started": Declared("the daemon serves", ("pid", "version")),
    "daemon.stopping": Declared("the daemon was told to stop and finishes what it promised", ("pid", "drain_s")),
    "catalog.migrated": Declared("an older catalog was brought to this version's schema", ("before", "after")),
    "catalog.failed": Declared("the database refuses or failed; told at once, and not logged by it", ("error",)),
    "config.reloaded": Declared("the configuration was read again and holds", ("changed",)),
    "experiment.opened": Declared("a training process opened an experiment", ("project", "name", "segment", "pid")),
    "experiment.resumed": Declared(
        "a known experiment goes on in a new segment", ("project", "name", "segment", "step", "pid")
    ),
    "experiment.closed": Declared("its process said that it is complete", ("project", "name", "step")),
    "experiment.failed": Declared("its process said that it failed", ("project", "name", "step", "error", "recovery")),
    "experiment.lost": Declared("its process is gone without a word", ("project", "name", "step", "pid", "recovery")),
    "experiment.stalled": Declared(
        "its process lives, and no step was logged for too long", ("project", "name", "step", "pid", "quiet_s")
    ),
    "metric.crossed": Declared(
        "a logged metric went beyond a threshold",
        ("project", "name", "step", "metric", "value", "above", "below", "count"),
    ),
    "checkpoint.staged": Declared("committed in an arena", (*_CHECKPOINT, "revision")),
    "checkpoint.found": Declared("finished files were found or submitted", (*_CHECKPOINT, "origin", "format")),
    "checkpoint.described": Declared("its writer said more about files that were found before", _CHECKPOINT),
    "checkpoint.published": Declared(
        "durable under its final name", (*_CHECKPOINT, "revision", "write_ms", "hash_ms", "adopted", "veto")
    ),
    "checkpoint.verified": Declared("read back from the disk, every digest equal", _CHECKPOINT),
    "checkpoint.corrupt": Declared("its bytes no longer match their digest", (*_PROBLEM, "damage")),
    "checkpoint.loaded": Declared("a reader has loaded it", (*_CHECKPOINT, "ms", "pid", "hot")),
    "checkpoint.load_failed": Declared("a reader was told where it is and could not load it", (*_PROBLEM, "ms", "pid")),
    "checkpoint.missing": Declared("its files are gone, and not by ckptd", _PROBLEM),
    "checkpoint.failed": Declared("it never became durable", _PROBLEM),
    "checkpoint.replaced": Declared("dropped before durable for a newer save", (*_CHECKPOINT, "by")),
    "checkpoint.trashed": Declared("retired; can be restored until its grace ends", (*_CHECKPOINT, "why")),
    "checkpoint.dropped": Declared("retired and unlinked", (*_CHECKPOINT, "why")),
    "checkpoint.restored": Declared("back from the trash, or readable again", (*_CHECKPOINT, "state")),
    "checkpoint.stripped": Declared("its optimizer states lie in the trash; the rest stays", (*_CHECKPOINT, "files")),
    "checkpoint.unstripped": Declared("they are back in their place", (*_CHECKPOINT, "files")),
    "checkpoint.tagged": Declared("its tags are others now", (*_CHECKPOINT, "tags")),
    "checkpoint.pinned": Declared("a person holds it", (*_CHECKPOINT, "note", "uid")),
    "checkpoint.unpinned": Declared(
        "a person let go of it, or it went to what lies at its path now", (*_CHECKPOINT, "uid")
    ),
    "checkpoint.unvetoed": Declared(
        "a person lets it count, whatever a hook said", (*_CHECKPOINT, "veto", "note", "uid")
    ),
    "retention.applied": Declared(
        "a plan was carried out: what it retired lies in the trash",
        ("project", "name", "retired", "kept", "size_bytes", "checkpoints"),
    ),
    "retention.held": Declared(
        "a plan that nobody asked for takes much at once: nothing of it is done until a person decides",
        ("project", "name", "drops", "strips", "live", "size_bytes", "why"),
    ),
    "best.changed": Declared(
        "another checkpoint is the best by a rule", (*_CHECKPOINT, "rule", "scope", "metric", "mode", "value")
    ),
    "latest.changed": Declared("another checkpoint is the newest verified one", _CHECKPOINT),
    "root.added": Declared("a directory tree is managed or watched from now on", ("root", "kind")),
    "root.degraded": Declared(
        "a mount hangs or fails, or a root's disk is not mounted; its roots are set aside",
        ("mount", "filesystem", "roots", "why"),
    ),
    "root.recovered": Declared("a mount answers again, or a root is there again", ("mount", "filesystem", "roots")),
    "disk.low": Declared(
        "less is free on a mount than [alerts] asks for: a person should make room",
        ("mount", "filesystem", "roots", "free_bytes", "floor_bytes"),
    ),
    "disk.relief": Declared(
        "less is free on a mount than the floor of [disk]: ckptd makes room from now on, if it finds what nothing holds",
        ("mount", "filesystem", "roots", "free_bytes", "floor_bytes"),
    ),
    "worker.started": Declared("an I/O worker process runs", ("mount", "filesystem", "pid")),
    "worker.lost": Declared("an I/O worker died or was given up", ("mount", "filesystem", "pid", "why", "stuck")),
    "job.retried": Declared("a job met a passing error and waits", ("job", "kind", "tries", "error", "retry_after_s")),
    "job.parked": Declared("a job gave up; a person must look", ("job", "kind", "tries", "error")),
    "hook.finding": Declared("a hook found something", ("project", "name", "step", "hook", "level", "text", "facts")),
    "hook.opened": Declared("a hook failed too often in a row and is given a rest", ("hook", "error")),
    "hook.missed": Declared("a hook was so far behind that events were trimmed before it had them", ("hook", "count")),
    "alert.raised": Declared("a limit of [alerts] is passed", ("alert", "about", "value", "limit", "why")),
    "alert.cleared": Declared("it is passed no longer", ("alert", "about")),
    MISSED: Declared("this subscriber was too slow and lost the oldest events", ("count",)),
}


def check(event: Event) -> None:
    """Bug unless the event's name is declared and so is every key of its data."""
    declared = EVENTS.get(event.name)
    if declared is None:
        message = f"the event {event.name!r} is not declared"
        raise Bug(message)
    undeclared = event.data.keys() - set(declared.keys)
    if undeclared:
        message = f"the event {event.name!r} does not declare {sorted(undeclared)}"
        raise Bug(message)


class Subscription:
    """What one subscriber has not read yet; an endless iterator. The oldest go first when it is full."""

    def __init__(self, queued_max: int) -> None:
        """Hold at most `queued_max` (1 or more) events."""
        self._events: deque[Event] = deque(maxlen=queued_max)
        self._missed = 0
        self.missed = 0  # in all, and never taken back
        self._more = anyio.Event()

    def put(self, event: Event) -> None:
        """Queue one event; never blocks."""
        if len(self._events) == self._events.maxlen:
            self._missed += 1
            self.missed += 1
        self._events.append(event)
        self._more.set()

    def ready(self) -> list[Event]:
        """Return what waits already, without waiting; `events.missed` is left to the next reading."""
        found = [] if self._missed else list(self._events)
        if found:
            self._events.clear()
        return found

    def __aiter__(self) -> "Subscription":
        """Return itself: what was read is gone."""
        return self

    async def __anext__(self) -> Event:
        """Return the next event, or `events.missed` in place of those that were lost."""
        while not self._events:
            self._more = anyio.Event()
            await self._more.wait()
        if self._missed:
            count, self._missed = self._missed, 0
            return Event(MISSED, self._events[0].at, data={"count": count})
        return self._events.popleft()


class Bus:
    """Carries events to whoever subscribed. For the event loop's thread only."""

    def __init__(self) -> None:
        """Start with no subscriber: events published now are nobody's."""
        self._subscriptions: list[Subscription] = []
        self._missed = 0

    @property
    def missed(self) -> int:
        """Return how many events subscribers have lost, those that are gone included."""
        return self._missed + sum(subscription.missed for subscription in self._subscriptions)

    def publish(self, event: Event) -> None:
        """Hand the event to every subscriber. Never blocks; Bug when it is not declared."""
        check(event)
        for subscription in self._subscriptions:
            subscription.put(event)

    @asynccontextmanager
    async def subscribe(self, queued_max: int = QUEUED_MAX) -> AsyncIterator[Subscription]:
        """Receive what is published from now on, in order, until the block is left.

        At most `queued_max` events wait. A subscriber slower than that loses the oldest and reads,
        in their place, one `events.missed` whose data says how many ("count").
        """
        subscription = Subscription(queued_max)
        self._subscriptions.append(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.remove(subscription)
            self._missed += subscription.missed
