"""Reads that many ask again and again, answered from memory while the catalog is what it was (query/answers.py).

What an answer takes from elsewhere than the catalog's tables is put in by whoever serves it (whether
a copy is hot), or ends it (the expiry of a reader's hold).
"""

from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import config
from ckptd.catalog import Catalog
from ckptd.catalog.edition import PROGRESS
from ckptd.clock import Clock
from ckptd.query.answers import Answers

# Tables that no list, summary or description reads; what trainers log all the time must not end every answer.
UNSEEN = frozenset({"metric", "metric_summary", "job", "audit"})
# What an answer about checkpoints alone does not show either. `show` has events and the experiment's progress.
UNSEEN_WITH_CHECKPOINTS = UNSEEN | {"event", PROGRESS}


class Expiry:
    """The wall time at which an answer ends by itself."""

    def __init__(self) -> None:
        """Never, so far."""
        self.until: datetime | None = None

    def add(self, ends: Iterable[datetime | None]) -> None:
        """The answer shows what ends at these times."""
        self.until = min((end for end in (self.until, *ends) if end is not None), default=None)


class Recall:
    """Reads through the cache. An answer belongs to whoever gets it: it may be changed."""

    def __init__(self, catalog: Catalog, clock: Clock, settings: config.Catalog) -> None:
        """Nothing is known yet."""
        self._catalog = catalog
        self._clock = clock
        self._settings = settings
        self.answers = Answers(settings.answers_max, settings.answers_bytes_max)

    def edition(self, without: frozenset[str] = UNSEEN) -> int | None:
        """Return the edition to hand to `read`, taken before anything is read; an answer shows no table of `without`."""
        return self._catalog.edition(without)

    def sweep(self) -> None:
        """Drop the answers that are over."""
        self.answers.sweep(self._clock.monotonic_s())

    async def read(
        self,
        key: bytes,
        edition: int | None,
        fn: Callable[[AsyncConnection, Expiry], Awaitable[dict[str, Any]]],
    ) -> dict[str, Any]:
        """Return what `fn` reads, or what it read at the same edition. Errors as Catalog.read."""
        if edition is None or not self.answers.bytes_max:
            return await self._catalog.read(lambda conn: fn(conn, Expiry()))
        known = self.answers.get(key, edition, self._clock.monotonic_s())
        if known is not None:
            answer: dict[str, Any] = msgspec.json.decode(known)
            return answer
        expiry = Expiry()
        begun_s, begun = self._clock.monotonic_s(), self._clock.now()
        answer = await self._catalog.read(lambda conn: fn(conn, expiry))
        lives_s = self._settings.answers_s
        if expiry.until is not None:
            lives_s = min(lives_s, (expiry.until - begun).total_seconds())
        self.answers.put(key, edition, msgspec.json.encode(answer), begun_s + lives_s)
        return answer
