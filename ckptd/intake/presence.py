"""Which experiments have a living trainer, and what became of those that have none.

A trainer's death is seen at once: the kernel closes its connection, and its pidfd (or its start
time in /proc) tells a dead process from one that merely reconnects. A trainer that neither closes
its experiment nor beats for intake.lost_after_s is lost too, wherever it is.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Protocol

import anyio
import structlog

from ckptd.catalog import Catalog, experiments, metrics
from ckptd.catalog.metrics import Point
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock, tick
from ckptd.errors import CkptdError, NotFound
from ckptd.model import ExperimentStatus
from ckptd_client import control

log = structlog.get_logger()

LOOK_S = 1.0
Look = Callable[[Tx, str, Sequence[Point]], Awaitable[None]]

POINTS_WAITING_MAX = 200_000
FLUSH_POINTS_MAX = 20_000  # of one commit
RETRY_S_MAX = 5.0


class Trainer(Protocol):
    """A connection."""

    pid: int
    experiments: set[str]


class Presence:
    """Keeps experiments' status true."""

    def __init__(self, catalog: Catalog, clock: Clock, lost_after_s: float) -> None:
        """Nobody trains yet."""
        self._catalog = catalog
        self._clock = clock
        self._lost_after_s = lost_after_s
        self._trainers: defaultdict[str, set[Trainer]] = defaultdict(set)
        self._gone: dict[str, tuple[int, int]] = {}

    def is_present(self, experiment_id: str) -> bool:
        """Whether some process is connected for this experiment."""
        return bool(self._trainers.get(experiment_id))

    def came(self, trainer: Trainer, experiment_id: str) -> None:
        """A process opened the experiment."""
        trainer.experiments.add(experiment_id)
        self._trainers[experiment_id].add(trainer)
        self._gone.pop(experiment_id, None)

    def closed(self, experiment_id: str) -> None:
        """Its process said how it ended: nothing is left to find out."""
        for trainer in self._trainers.pop(experiment_id, set()):
            trainer.experiments.discard(experiment_id)
        self._gone.pop(experiment_id, None)

    def left(self, trainer: Trainer) -> None:
        """A connection closed; its process may be dead, or only reconnect."""
        for experiment_id in trainer.experiments:
            self._trainers[experiment_id].discard(trainer)
            if not self._trainers[experiment_id]:
                del self._trainers[experiment_id]
                self._gone[experiment_id] = (trainer.pid, control.started_ticks(trainer.pid))

    async def run(self) -> None:
        """Look after those that left, every LOOK_S; and for silent ones, every lost_after_s."""
        looked_s = self._clock.monotonic_s()
        while True:
            await tick(LOOK_S)
            for experiment_id, (pid, ticks) in tuple(self._gone.items()):
                if not control.is_alive(pid, ticks):
                    await self._lost(experiment_id)
            if self._clock.monotonic_s() - looked_s >= self._lost_after_s:
                looked_s = self._clock.monotonic_s()
                await self._look_for_silent()

    async def _look_for_silent(self) -> None:
        before = self._clock.now() - timedelta(seconds=self._lost_after_s)
        try:
            silent = await self._catalog.read(lambda conn: experiments.silent_since(conn, before))
        except CkptdError as error:
            log.warning("presence.not_read", **error.to_wire())
            return
        for one in silent:
            if not self.is_present(one.id):
                await self._lost(one.id)

    async def _lost(self, experiment_id: str) -> None:
        if self.is_present(experiment_id):
            return  # it came back while the catalog was asked

        async def lost(tx: Tx) -> None:
            row = await experiments.get(tx.conn, experiment_id)
            if row.status is ExperimentStatus.RUNNING:
                await experiments.set_status(tx, experiment_id, ExperimentStatus.LOST)

        try:
            await self._catalog.write(lost)
        except NotFound:
            self._gone.pop(experiment_id, None)
        except CkptdError as error:
            log.warning("presence.not_recorded", experiment=experiment_id, **error.to_wire())  # looked at again
        else:
            self._gone.pop(experiment_id, None)


class MetricsBuffer:
    """Collects points of all experiments and commits them together, every catalog.metrics_flush_s."""

    def __init__(self, catalog: Catalog, flush_s: float, look: Look | None = None) -> None:
        """Nothing waits yet. `look` sees every point in the transaction that commits it."""
        self._catalog = catalog
        self._flush_s = flush_s
        self._look = look
        self._points: defaultdict[tuple[str, int], list[Point]] = defaultdict(list)
        self._waiting = 0
        self._some = anyio.Event()
        self._flushing = anyio.Lock()

    def put(self, experiment_id: str, segment: int, points: list[Point]) -> bool:
        """Take points in; False when too many wait already (the client keeps and repeats them)."""
        if self._waiting + len(points) > POINTS_WAITING_MAX:
            return False
        self._points[experiment_id, segment] += points
        self._waiting += len(points)
        self._some.set()
        return True

    async def run(self) -> None:
        """Commit until cancelled; what is left then goes with a last `flush()`."""
        pause_s = self._flush_s
        while True:
            await self._some.wait()
            await anyio.sleep(pause_s)
            pause_s = self._flush_s if await self.flush() else min(pause_s * 2, RETRY_S_MAX)

    async def flush(self) -> bool:
        """Commit everything that waits now; False when some of it could not be, and is kept for the next try."""
        async with self._flushing:
            self._some = anyio.Event()
            # Shielded: what was taken out of the buffer is either committed or put back, never between.
            with anyio.CancelScope(shield=True):
                while self._points:
                    if not await self._flush_some():
                        self._some.set()
                        return False
        return True

    async def _flush_some(self) -> bool:
        """Commit up to FLUSH_POINTS_MAX points, so that no other write waits long behind them."""
        taken: dict[tuple[str, int], list[Point]] = {}
        count = 0
        for key in tuple(self._points):
            taken[key] = self._points.pop(key)
            count += len(taken[key])
            if count >= FLUSH_POINTS_MAX:
                break
        self._waiting -= count

        async def append(tx: Tx) -> None:
            for (experiment_id, segment), points in taken.items():
                try:
                    await metrics.append(tx, experiment_id, segment, points)
                    if self._look is not None:
                        await self._look(tx, experiment_id, points)
                except NotFound as error:
                    # Nobody can ever take these: the catalog was made anew without their experiment.
                    log.warning("metrics.homeless", points=len(points), **error.to_wire())

        try:
            await self._catalog.write(append)
        except CkptdError as error:
            log.warning("metrics.not_recorded", cause=error.code, points=count, **error.to_wire())
            for key, points in self._points.items():
                taken[key] = taken.get(key, []) + points
            self._points = defaultdict(list, taken)
            self._waiting += count
            return False
        return True
