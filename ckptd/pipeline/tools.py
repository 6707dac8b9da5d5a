"""What a stage gets and what it answers."""

from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import anyio

from ckptd.catalog import Catalog, checkpoints
from ckptd.catalog.checkpoints import Durable
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.config import Settings
from ckptd.hooks.context import Context
from ckptd.hooks.result import Verdict
from ckptd.jobs import Job, Jobs
from ckptd.model import Checkpoint
from ckptd.retention import Braked
from ckptd.rules import Rules
from ckptd.worker import Workers


class Sources(Protocol):
    """Where the bytes of a memory hand-off are: an arena, or a spool file."""

    async def open(self, checkpoint_id: str) -> int | None:
        """Return a descriptor of the image, which the caller closes; None when it is gone."""

    async def published(self, checkpoint_id: str) -> None:
        """The bytes are durable elsewhere now: the arena becomes a hot copy, the spool file goes."""

    async def drop(self, checkpoint_id: str) -> None:
        """Nobody needs the image any more."""

    def keep(self, checkpoint_id: str) -> bool:
        """Its files are damaged: from now on nobody is lent the memory of its copy, nor is it given up.

        False when there is no copy. Without an `await`: there is no moment between the look and the mark.
        """

    def let_go(self, checkpoint_id: str) -> None:
        """What `keep` kept is a hot copy as others are. Safe to repeat."""

    def kept(self) -> list[str]:
        """Of which checkpoints copies are kept."""


class Bell:
    """Wakes the one who waits for it; rung while nobody waits, it is heard at the next waiting."""

    def __init__(self) -> None:
        """Not rung yet."""
        self._rung = anyio.Event()

    def ring(self) -> None:
        """Wake the one who waits, or the next who will. Never blocks."""
        self._rung.set()

    async def heard(self, within_s: float) -> bool:
        """Wait until it was rung, or for so long; return whether it was."""
        with anyio.move_on_after(within_s):
            await self._rung.wait()
        rung = self._rung.is_set()
        self._rung = anyio.Event()
        return rung


@dataclass(slots=True)
class Low:
    """Mounts below a free-space floor of [disk], with that floor, and when it was told last (monotonic seconds)."""

    told_s: dict[tuple[str, int], float] = field(default_factory=dict)
    held_s: dict[str, float] = field(default_factory=dict)  # roots where nothing more may go, and when that was logged


@dataclass(frozen=True, slots=True)
class OnHold:
    """An experiment whose plan the brake holds (pipeline/braking.py): by which rules, and since when."""

    project: str
    name: str
    uid: int
    since: datetime
    rules: Rules
    braked: Braked


@dataclass(frozen=True)
class Tools:
    """What every stage works with. `settings` is a call, so that a reload reaches running stages.

    placing  of each root: held while links under it are placed
    moved    retired checkpoints known to lie in the trash already
    delayed  those that the last look at the trash could not unlink
    trashed  set when more is to be moved into the trash than a job waits for
    resting  held while some of the rest of a large plan is carried out (pipeline/rest.py)
    burying  held while tombstones of a large plan are written, and for the rest after each of its transactions
    emptying  of each root: held while something of it moves into its trash, out of it, or is unlinked
    space    rung when budgets and free space should be looked at
    low      roots whose disk is below its floor (pipeline/relieve.py)
    on_hold  experiments whose plan the brake holds, by id
    ask      hooks, before an act (pipeline/asking.py); None: there are none
    """

    catalog: Catalog
    jobs: Jobs
    workers: Workers
    sources: Sources
    clock: Clock
    settings: Callable[[], Settings]
    moved: set[str] = field(default_factory=set)
    delayed: set[str] = field(default_factory=set)
    trashed: Bell = field(default_factory=Bell)
    resting: anyio.Lock = field(default_factory=anyio.Lock)
    burying: anyio.Lock = field(default_factory=anyio.Lock)
    space: Bell = field(default_factory=Bell)
    low: Low = field(default_factory=Low)
    on_hold: dict[str, OnHold] = field(default_factory=dict)
    emptying: defaultdict[str, anyio.Lock] = field(default_factory=lambda: defaultdict(anyio.Lock))
    ask: Callable[[Context], Awaitable[Verdict]] | None = None
    placing: defaultdict[str, anyio.Lock] = field(default_factory=lambda: defaultdict(anyio.Lock))


@dataclass(frozen=True, slots=True)
class Fresh:
    """Files that were digested and fsynced and are not written down yet: the next stage does both."""

    checkpoint: Checkpoint
    durable: Durable
    metrics: dict[str, float]  # what the files say themselves

    async def record(self, tx: Tx) -> None:
        """Make the row LIVE and durable, with the metrics that nobody has said better."""
        row = await checkpoints.mark_durable(tx, self.checkpoint.id, self.durable)
        found = {name: value for name, value in self.metrics.items() if name not in row.metrics}
        if found:
            await checkpoints.add_metrics(tx, row.id, found)


@dataclass(frozen=True, slots=True)
class Onward:
    """The stage is done and has recorded it; the job (as it is now) goes on to its next stage."""

    job: Job


@dataclass(frozen=True, slots=True)
class Ended:
    """The job is finished, postponed or parked; nothing is left to do with it now."""


Outcome = Onward | Ended
Stage = Callable[[Job, Tools], Awaitable[Outcome]]
