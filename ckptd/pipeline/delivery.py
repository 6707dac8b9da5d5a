"""Facts to hooks: from the event log, in order, at least once; each hook at its own pace.

    commit ─► event log ─► recent (bounded) ─┬─► lane of hook A ─► Runner.deliver ─► cursor, runs, findings
                  └─ pages, for who is behind ┴─► lane of hook B ...

A lane is one hook's place in the log. The cursor is committed after the delivery, with what came of it:
killed in between, the fact is delivered again under the same key. Nobody waits for a lane, so a slow
hook is behind alone; one that is further behind than the log reaches is told by `hook.missed`. Lanes
of BACKGROUND hooks let the others go first, for a bounded time. A hook that is new, or was away, begins
with the next event; one that is disabled lets events pass. What is only on the bus (the database
failed: the log can't have it) is delivered as it comes, once, while the daemon lives.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import anyio
import anyio.abc
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import failpoint
from ckptd.catalog import Catalog, eventlog, hookruns
from ckptd.catalog.hookruns import Kept
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock, to_tick_s
from ckptd.errors import CkptdError
from ckptd.events import MISSED, Bus, Event
from ckptd.hooks.builtin import relays
from ckptd.hooks.context import Context
from ckptd.hooks.registry import Registry
from ckptd.hooks.result import Run
from ckptd.hooks.spec import Spec
from ckptd.pipeline.lane import Lane
from ckptd.pipeline.telling import contexts

T = TypeVar("T")

log = structlog.get_logger()

QUEUED_MAX = 8192  # events on their way from the bus
RECENT_MAX = 2048  # events kept in memory for all lanes; who is further behind reads the log
PAGE_MAX = 200  # events that a lane takes at a time
RECORD_S = 0.5  # what came of deliveries is written down together, this often
IDLE_S = 2.0  # a registry whose hooks have changed, or were asked what they are, is looked at this often
PASS_S = 30.0  # a lane that nothing concerned says how far it is
AGAIN_S, AGAIN_S_MAX = 0.5, 30.0  # pauses while the catalog refuses
BACKGROUND_S = 5.0  # longest that a BACKGROUND hook waits for the others, before each event
BACKGROUND_LOOK_S = 0.02


class Deliverer(Protocol):
    """What runs hooks: ckptd.hooks.runner.Runner."""

    async def deliver(self, context: Context, spec: Spec) -> Run:
        """Run one hook for one fact and report the run; never raises, never longer than the hook's timeout allows."""


class Delivery:
    """Brings every fact to every hook that names it. For the event loop's thread only."""

    deliverer: Deliverer  # set by whoever composes, before `run`

    def __init__(self, catalog: Catalog, bus: Bus, registry: Registry, clock: Clock) -> None:
        """Nothing is delivered before `run`."""
        self._catalog = catalog
        self._bus = bus
        self.registry = registry
        self._clock = clock
        self._lanes: dict[str, Lane] = {}
        self._said: dict[str, bool] = {}  # what a person said of a hook, whatever the configuration says
        self._recent: deque[tuple[int, Context]] = deque()
        self._recent_after: int | None = None  # `_recent` has every wanted event after this one; None: not known
        self._tail = 0
        self._group: anyio.abc.TaskGroup | None = None
        self._entering = anyio.Lock()
        self._recording = anyio.Lock()
        self._due = anyio.Event()  # there is something to write down

    async def run(self) -> None:
        """Deliver until cancelled; what was delivered by then is written down."""
        async with self._bus.subscribe(QUEUED_MAX) as events, anyio.create_task_group() as group:
            self._group = group
            try:
                await self.enter()
                group.start_soon(self._write_down)
                async for event in events:
                    await self._take([event, *events.ready()])
            finally:
                self._group = None
                with anyio.CancelScope(shield=True):
                    await self._record(self._lanes.values())

    async def enter(self) -> None:
        """Follow the registry: a lane for each hook it has, none for those that it has no more."""
        async with self._entering:
            names = [spec.name for spec in self.registry]
            kept = await self._persist(lambda tx: hookruns.enter(tx, names))
            self._obey(kept.values())
            for name in self._lanes.keys() - kept.keys():
                self._lanes.pop(name).scope.cancel()
            for spec in tuple(self.registry):
                row = kept[spec.name]
                if spec.name not in self._lanes:
                    at = row.cursor or 0
                    lane = Lane(spec.name, row.no, at, at, counts=row.counts, relays=relays(spec))
                    self._lanes[spec.name] = lane
                    if self._group is not None:
                        self._group.start_soon(self._follow, lane)

    async def recall(self) -> None:
        """Before any hook is asked: what people said of hooks holds. Errors as Catalog.read."""
        self._obey(await self._catalog.read(hookruns.every))

    def follow(self, registry: Registry) -> None:
        """Go on with the hooks of another configuration; what people said of hooks holds for it as well."""
        self.registry = registry
        registry.obey(self._said)

    def _obey(self, kept: Iterable[Kept]) -> None:
        self._said |= {row.name: row.enabled for row in kept if row.enabled is not None}
        self.registry.obey(self._said)

    async def switch(self, name: str, *, enabled: bool) -> bool:
        """Enable or disable a hook from now on and for later daemons; say whether that changes anything. NotFound."""
        before = self.registry.get(name).enabled
        await self.enter()
        await self._catalog.write(lambda tx: hookruns.set_enabled(tx, name, enabled=enabled))
        self._said[name] = enabled
        self.registry.obey(self._said)
        return before is not enabled

    def report(self, run: Run, context: Context) -> None:
        """Keep what came of a run, of a fact's delivery or of a question. What ckptd.hooks.runner reports to."""
        lane = self._lanes.get(run.hook)
        if lane is not None:
            lane.note(run, context)
            self._due.set()

    def state_of(self, name: str) -> tuple[dict[str, int], int]:
        """Return one hook's counts and how many events it is behind; nothing of a hook that is not known."""
        lane = self._lanes.get(name)
        return ({}, 0) if lane is None else (dict(lane.counts), max(0, self._tail - lane.read) if lane.busy else 0)

    async def flush(self) -> None:
        """Write down what is not yet, so that a reader of the catalog sees it. Errors are logged, and tried again later."""
        await self._record(self._lanes.values())

    async def _take(self, events: Sequence[Event]) -> None:
        """Put events into `_recent`, or straight into the lanes where the log does not have them; wake who wants them."""
        if self._lanes.keys() != {spec.name for spec in self.registry}:
            await self.enter()
        live = [event for event in events if event.seq is None and self.registry.of(event.name)]
        for context in await contexts(None, live):
            for spec in self.registry.of(context.event):
                if spec.name in self._lanes:
                    self._lanes[spec.name].live.append(context)
        self._wake({event.name for event in live})
        if any(event.name == MISSED for event in events):
            self._recent.clear()
            self._recent_after = None
        logged = [event for event in events if event.seq is not None]
        if not logged:
            return
        wanted = [event for event in logged if self.registry.of(event.name)]
        found = await self._told(wanted)
        if self._recent_after is None:
            self._recent_after = _number(logged[0]) - 1
        self._recent.extend(zip(map(_number, wanted), found, strict=True))
        while len(self._recent) > RECENT_MAX:
            self._recent_after = self._recent.popleft()[0]
        self._tail = _number(logged[-1])
        self._wake({event.name for event in wanted})

    def _wake(self, names: set[str]) -> None:
        """Wake lanes in the order in which their hooks start: by priority, then by registration."""
        for spec in sorted(self.registry, key=lambda spec: spec.priority) if names else ():
            lane = self._lanes.get(spec.name)
            if lane is not None and not names.isdisjoint(spec.events):
                lane.busy = True
                lane.more.set()

    async def _told(self, events: Sequence[Event]) -> list[Context]:
        pause_s = AGAIN_S
        while True:
            try:
                return await contexts(self._catalog, events)
            except CkptdError as error:
                log.warning("hooks.waiting", cause=error.code, **error.to_wire())
                await anyio.sleep(pause_s)
                pause_s = min(pause_s * 2, AGAIN_S_MAX)

    async def _follow(self, lane: Lane) -> None:
        """Deliver to one hook until it is gone."""
        with lane.scope:
            while True:
                found = await self._next(lane)
                if not found:
                    lane.busy = False
                    await lane.more.wait()
                    lane.more = anyio.Event()
                    continue
                for number, context in found:
                    await self._deliver(lane, context)
                    lane.read = max(lane.read, number)

    async def _deliver(self, lane: Lane, context: Context) -> None:
        spec = next((spec for spec in self.registry.of(context.event) if spec.name == lane.name), None)
        if spec is None:
            return  # disabled, or no longer at this point: it passes
        if spec.in_background:
            await self._let_others_go()
        await self.deliverer.deliver(context, spec)  # which reports the run
        failpoint.hit("hook.delivered")

    async def _let_others_go(self) -> None:
        with anyio.move_on_after(BACKGROUND_S):
            while any(self._is_ahead(one) for one in self._lanes.values()):  # noqa: ASYNC110 - many things end it
                await anyio.sleep(BACKGROUND_LOOK_S)

    def _is_ahead(self, lane: Lane) -> bool:
        return lane.busy and any(spec.name == lane.name and not spec.in_background for spec in self.registry)

    async def _next(self, lane: Lane) -> list[tuple[int, Context]]:
        """Return what a hook gets next, with the number up to which that brings it; empty: nothing for now."""
        if lane.live:
            found = [(lane.read, context) for context in lane.live]
            lane.live.clear()
            return found
        spec = self._known(lane)
        if spec is None:
            return []
        if lane.behind or self._recent_after is None or lane.read < self._recent_after:
            return await self._page(lane, spec)
        mine = []
        for one in reversed(self._recent):
            if one[0] <= lane.read:
                break
            if one[1].event in spec.events:
                mine.append(one)
        if not mine:
            lane.read = max(lane.read, self._tail)
        return mine[::-1]

    def _known(self, lane: Lane) -> Spec | None:
        """Return a lane's hook; None while its code was not asked where it runs, or it has just gone."""
        spec = next((spec for spec in self.registry if spec.name == lane.name), None)
        was_asked, lane.asking = lane.asking, spec is not None and spec in self.registry.undeclared
        lane.behind |= was_asked and not lane.asking
        return None if lane.asking else spec

    async def _page(self, lane: Lane, spec: Spec) -> list[tuple[int, Context]]:
        """Read on in the log, as far as it reaches."""

        async def read(conn: AsyncConnection) -> tuple[int, int, list[eventlog.Logged]]:
            oldest, newest = await eventlog.reach(conn)
            return oldest, newest, await eventlog.named(conn, spec.events, lane.read, PAGE_MAX)

        pause_s = AGAIN_S
        while True:
            try:
                oldest, newest, page = await self._catalog.read(read)
                break
            except CkptdError as error:
                log.warning("hooks.waiting", cause=error.code, hook=lane.name, **error.to_wire())
                await anyio.sleep(pause_s)
                pause_s = min(pause_s * 2, AGAIN_S_MAX)
        if oldest > lane.read + 1:
            await self._missed(lane, oldest - lane.read - 1)
        found = await self._told([one.event for one in page])
        if not page:
            lane.behind = False
            lane.read = max(lane.read, newest)
            if self._recent_after is not None and lane.read < self._recent_after:
                lane.more.set()  # the log goes on beyond what was there a moment ago
        return [(one.sequence, context) for one, context in zip(page, found, strict=True)]

    async def _missed(self, lane: Lane, count: int) -> None:
        """Say that events were trimmed from the log before this hook had them; how many of them it wanted is not known."""
        log.error("hook.missed", cause=lane.name, count=count)
        lane.counts["missed"] = lane.counts.get("missed", 0) + count
        lane.changed = True
        self._due.set()
        data = {"hook": lane.name, "count": count}

        async def tell(tx: Tx) -> None:
            tx.tell("hook.missed", data)

        await self._persist(tell)

    async def _write_down(self) -> None:
        """Commit cursors, runs and findings of all lanes together, when some are due."""
        passed_s = self._clock.monotonic_s()
        while True:
            with anyio.move_on_after(to_tick_s(IDLE_S)):
                await self._due.wait()
                self._due = anyio.Event()
                await anyio.sleep(RECORD_S)
            now_s = self._clock.monotonic_s()
            if self._lanes.keys() != {spec.name for spec in self.registry}:
                await self.enter()
            self._look_for_declared()
            passing = now_s - passed_s >= PASS_S
            passed_s = now_s if passing else passed_s
            # A list: lanes may come and go while this waits for its turn.
            await self._record([lane for lane in self._lanes.values() if lane.changed or passing])

    async def _record(self, lanes: Iterable[Lane]) -> None:
        """One after the other: who finds nothing to write down must not be told so while it is being written."""
        async with self._recording:
            await self._record_now(lanes)

    async def _record_now(self, lanes: Iterable[Lane]) -> None:
        taken = []
        for lane in lanes:
            if lane.changed or lane.read > lane.written:
                cursor = lane.read if lane.read > lane.written else None
                taken.append((lane, lane.progress(cursor)))
                lane.runs, lane.found, lane.opened, lane.changed = [], [], [], False
        if not taken:
            return
        try:
            await self._catalog.write(lambda tx: hookruns.record(tx, [progress for _, progress in taken]))
        except CkptdError as error:
            log.warning("hooks.not_recorded", cause=error.code, **error.to_wire())
            for lane, progress in taken:
                lane.runs, lane.found, lane.changed = (
                    [*progress.runs, *lane.runs],
                    [*progress.findings, *lane.found],
                    True,
                )
                del lane.runs[: -hookruns.RUNS_KEPT_MAX]
                del lane.found[: -hookruns.RUNS_KEPT_MAX]
            return
        failpoint.hit("hook.recorded")
        for lane, progress in taken:
            lane.written = max(lane.written, progress.cursor or 0)

    def _look_for_declared(self) -> None:
        for lane in self._lanes.values():
            if lane.asking:
                lane.more.set()

    async def _persist(self, fn: Callable[[Tx], Awaitable[T]]) -> T:
        """Write, and while the catalog refuses, again."""
        pause_s = AGAIN_S
        while True:
            try:
                return await self._catalog.write(fn)
            except CkptdError as error:
                log.warning("hooks.waiting", cause=error.code, **error.to_wire())
                await anyio.sleep(pause_s)
                pause_s = min(pause_s * 2, AGAIN_S_MAX)


def _number(event: Event) -> int:
    return int(event.seq or 0)
