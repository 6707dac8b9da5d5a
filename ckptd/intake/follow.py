"""Who wants to hear of which checkpoint: levels are pushed after the commit that made them true.

Events carry ids; what is pushed is read from the catalog, so a follower that missed ten steps gets
the last one right. When the bus says that events were lost, everything followed is looked up again.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Protocol

from ckptd.catalog import Catalog, checkpoints
from ckptd.events import MISSED, Bus, Event
from ckptd.model import Checkpoint

QUEUED_MAX = 8192
BATCH_MAX = 256


class Follower(Protocol):
    """A connection."""

    follows: set[str]
    wants_events: bool

    def push(self, message: dict[str, Any]) -> None:
        """Send without waiting."""


class Followers:
    """Routes events of checkpoints to the connections that follow them."""

    def __init__(self, catalog: Catalog, bus: Bus, follows_max: int) -> None:
        """Nobody follows anything yet."""
        self._catalog = catalog
        self._bus = bus
        self._follows_max = follows_max
        self._by_checkpoint: defaultdict[str, set[Follower]] = defaultdict(set)
        self._listeners: set[Follower] = set()

    def add(self, follower: Follower, checkpoint_ids: Iterable[str]) -> None:
        """Follow; beyond the limit the oldest ended ones have long been removed, so more is refused silently."""
        for checkpoint_id in checkpoint_ids:
            if len(follower.follows) >= self._follows_max:
                return
            follower.follows.add(checkpoint_id)
            self._by_checkpoint[checkpoint_id].add(follower)

    def listen(self, follower: Follower) -> None:
        """Push every event to this connection."""
        self._listeners.add(follower)

    def remove(self, follower: Follower) -> None:
        """Forget a connection that closed."""
        for checkpoint_id in follower.follows:
            self._by_checkpoint[checkpoint_id].discard(follower)
            if not self._by_checkpoint[checkpoint_id]:
                del self._by_checkpoint[checkpoint_id]
        follower.follows.clear()
        self._listeners.discard(follower)

    async def run(self) -> None:
        """Push until cancelled."""
        async with self._bus.subscribe(QUEUED_MAX) as events:
            async for event in events:
                for listener in self._listeners:
                    listener.push({"push": "event", "event": wire_event(event)})
                if event.name == MISSED:
                    await self._push(tuple(self._by_checkpoint))
                elif event.checkpoint in self._by_checkpoint:
                    await self._push((event.checkpoint,))

    async def _push(self, checkpoint_ids: tuple[str, ...]) -> None:
        for start in range(0, len(checkpoint_ids), BATCH_MAX):
            some = checkpoint_ids[start : start + BATCH_MAX]
            rows = await self._catalog.read(lambda conn, of=some: checkpoints.get_many(conn, of))  # type: ignore[misc]
            for row in rows.values():
                for follower in tuple(self._by_checkpoint.get(row.id, ())):
                    follower.push({"push": "level", **level_of(row)})


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
