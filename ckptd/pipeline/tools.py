"""What a stage gets and what it answers. No behaviour."""

from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import anyio

from ckptd.catalog import Catalog
from ckptd.clock import Clock
from ckptd.config import Settings
from ckptd.jobs import Job, Jobs
from ckptd.worker import Workers


class Sources(Protocol):
    """Where the bytes of a memory hand-off are: an arena, or a spool file."""

    async def open(self, checkpoint_id: str) -> int | None:
        """Return a descriptor of the image, which the caller closes; None when it is gone."""

    async def published(self, checkpoint_id: str) -> None:
        """The bytes are durable elsewhere now: the arena becomes a hot copy, the spool file goes."""

    async def drop(self, checkpoint_id: str) -> None:
        """Nobody needs the image any more."""


@dataclass(frozen=True)
class Tools:
    """What every stage works with. `settings` is a call, so that a reload reaches running stages.

    placing  of each root: held while links under it are placed
    moved    retired checkpoints known to lie in the trash already
    """

    catalog: Catalog
    jobs: Jobs
    workers: Workers
    sources: Sources
    clock: Clock
    settings: Callable[[], Settings]
    moved: set[str] = field(default_factory=set)  # retired checkpoints known to lie in the trash
    placing: defaultdict[str, anyio.Lock] = field(default_factory=lambda: defaultdict(anyio.Lock))


@dataclass(frozen=True, slots=True)
class Onward:
    """The stage is done and has recorded it; the job (as it is now) goes on to its next stage."""

    job: Job


@dataclass(frozen=True, slots=True)
class Ended:
    """The job is finished, postponed or parked; nothing is left to do with it now."""


Outcome = Onward | Ended
Stage = Callable[[Job, Tools], Awaitable[Outcome]]
