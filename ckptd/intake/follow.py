"""Who wants to hear of which checkpoint: levels are pushed after the commit that made them true.

Events carry ids; what is pushed is read from the catalog, so a follower that missed ten steps gets
the last one right. When the bus says that events were lost, everything followed is looked up again.
Nobody hears of another user's checkpoints: a follower that may not see a row gets no push about it.
"""

import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from ckptd.catalog import Catalog, checkpoints
from ckptd.catalog.owners import owners_of
from ckptd.errors import CkptdError
from ckptd.events import MISSED, Bus, Event
from ckptd.model import Checkpoint, Level, State

log = structlog.get_logger()

QUEUED_MAX = 8192
BATCH_MAX = 256
OWNERS_MAX = 512  # what events are about again and again is what was saved last
_ENDED = {State.FAILED, State.REPLACED, State.TRASHED, State.DROPPED}


class Follower(Protocol):
    """A connection."""

    uid: int
    follows: dict[str, None]

    def push(self, message: dict[str, Any]) -> None:
        """Send without waiting."""


@dataclass(eq=False)
class _Listening:
    """A follower of all events; what happens before its first page is answered waits in `held`."""

    after_seq: int | None = None
    held: list[Event] = field(default_factory=list)


class Followers:
    """Routes events of checkpoints to the connections that follow them."""

    def __init__(self, catalog: Catalog, bus: Bus, follows_max: int) -> None:
        """Nobody follows anything yet."""
        self._catalog = catalog
        self._bus = bus
        self._follows_max = follows_max
        self._by_checkpoint: defaultdict[str, set[Follower]] = defaultdict(set)
        self._listeners: dict[Follower, _Listening] = {}
        self._owners: OrderedDict[str, int] = OrderedDict()

    def add(self, follower: Follower, checkpoint_ids: Iterable[str]) -> None:
        """Follow until they are verified or ended; beyond the limit the longest followed gives way."""
        for checkpoint_id in checkpoint_ids:
            follower.follows.pop(checkpoint_id, None)
            follower.follows[checkpoint_id] = None
            self._by_checkpoint[checkpoint_id].add(follower)
            if len(follower.follows) > self._follows_max:
                self._drop(follower, next(iter(follower.follows)))

    def listen(self, follower: Follower) -> None:
        """Collect every event from now on for this connection; `begin` pushes them."""
        self._listeners.setdefault(follower, _Listening())

    async def begin(self, follower: Follower, after_seq: int) -> None:
        """Push the events after `after_seq`: those collected meanwhile, then each as it comes."""
        listening = self._listeners.get(follower)
        if listening is None or listening.after_seq is not None:
            return
        listening.after_seq = after_seq
        held, listening.held = listening.held, []
        for event in held:
            _push_event(follower, listening, event)

    def remove(self, follower: Follower) -> None:
        """Forget a connection that closed."""
        for checkpoint_id in tuple(follower.follows):
            self._drop(follower, checkpoint_id)
        self._listeners.pop(follower, None)

    def _drop(self, follower: Follower, checkpoint_id: str) -> None:
        follower.follows.pop(checkpoint_id, None)
        self._by_checkpoint[checkpoint_id].discard(follower)
        if not self._by_checkpoint[checkpoint_id]:
            del self._by_checkpoint[checkpoint_id]

    async def run(self) -> None:
        """Push until cancelled."""
        async with self._bus.subscribe(QUEUED_MAX) as events:
            async for event in events:
                try:
                    await self._route(event)
                except CkptdError as error:
                    # A reading that failed costs a push; `watch` and `wait` read for themselves.
                    log.warning("push.failed", event_name=event.name, **error.to_wire())

    async def _route(self, event: Event) -> None:
        if self._listeners:
            await self._tell(event)
        if event.name == MISSED:
            await self._push(tuple(self._by_checkpoint))
        elif event.checkpoint in self._by_checkpoint:
            await self._push((event.checkpoint,))

    async def _tell(self, event: Event) -> None:
        """Hand one event to everybody who listens and may know of it."""
        owner = None
        if any(not sees_all(follower.uid) for follower in self._listeners):
            owner = await self._owner(event)
        for follower, listening in tuple(self._listeners.items()):
            if event.name == MISSED or sees_all(follower.uid) or follower.uid == owner:
                _push_event(follower, listening, event)

    async def _owner(self, event: Event) -> int | None:
        """Whose experiment or checkpoint an event is about; None for what concerns the operator alone."""
        key = event.checkpoint or event.experiment
        if not key:
            return None
        if key not in self._owners:
            found = await self._catalog.read(lambda conn: owners_of(conn, [key]))
            if key not in found:
                return None
            self._owners[key] = found[key]
            if len(self._owners) > OWNERS_MAX:
                self._owners.popitem(last=False)
        return self._owners[key]

    async def _push(self, checkpoint_ids: tuple[str, ...]) -> None:
        for start in range(0, len(checkpoint_ids), BATCH_MAX):
            some = checkpoint_ids[start : start + BATCH_MAX]
            rows = await self._catalog.read(lambda conn, of=some: checkpoints.get_many(conn, of))  # type: ignore[misc]
            owners: dict[str, int] = {}
            if any(not sees_all(f.uid) for row in rows for f in self._by_checkpoint.get(row, ())):
                owners = await self._catalog.read(lambda conn, of=some: owners_of(conn, of))  # type: ignore[misc]
            for row in rows.values():
                for follower in tuple(self._by_checkpoint.get(row.id, ())):
                    if sees_all(follower.uid) or owners.get(row.id) == follower.uid:
                        follower.push({"push": "level", **level_of(row)})
                    if row.state in _ENDED or (row.state is State.LIVE and row.level.rank >= Level.VERIFIED.rank):
                        self._drop(follower, row.id)


def sees_all(uid: int) -> bool:
    """Whether a peer may see and do everything here: root, and the daemon's own user."""
    return uid in {0, os.getuid()}


def visible_to(uid: int) -> int | None:
    """Whose rows a peer may see, as filters take it: None for everybody's."""
    return None if sees_all(uid) else uid


def _push_event(follower: Follower, listening: _Listening, event: Event) -> None:
    if listening.after_seq is None:
        listening.held.append(event)
        if len(listening.held) > QUEUED_MAX:
            del listening.held[0]
    elif event.seq is None or event.seq > listening.after_seq:
        follower.push({"push": "event", "event": wire_event(event)})


def level_of(row: Checkpoint) -> dict[str, Any]:
    """Return the fields of a level push, which are also the answer of `wait` and `watch`."""
    return {
        "checkpoint": row.id,
        "level": str(row.level),
        "state": str(row.state),
        "step": row.step,
        "path": row.path,
        "error": row.error,
    }


def wire_event(event: Event) -> dict[str, Any]:
    """Return an event as docs/reference/wire-control.md shows it."""
    data = dict(event.data)
    return {
        "seq": event.seq,
        "at": event.at.isoformat(),
        "event": event.name,
        "project": data.pop("project", None),
        "name": data.pop("name", None),
        "experiment": event.experiment or None,
        "checkpoint": event.checkpoint or None,
        "step": data.pop("step", None),
        "data": data,
    }
