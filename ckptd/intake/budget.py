"""How much memory there may be for arenas: in all, for one user, for one experiment. What is being made counts."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ckptd.config import Arenas
from ckptd.intake.arena import Arena, Store


class Budget:
    """Counts the arenas of `arenas`, which belongs to the pool, against the settings."""

    def __init__(self, settings: Arenas, store: Store, arenas: Mapping[bytes, Arena]) -> None:
        """Nothing is being made."""
        self._settings = settings
        self._store = store
        self._arenas = arenas
        self._making_bytes: Counter[int] = Counter()  # by owner
        self._making: Counter[str] = Counter()  # by experiment

    @property
    def bytes_used(self) -> int:
        """Bytes of all arenas, those in the making included."""
        return sum(arena.size_bytes for arena in self._arenas.values()) + self._making_bytes.total()

    def has_room(self, size_bytes: int) -> bool:
        """Whether another arena of that size may be made."""
        # An arena that nobody keeps over a crash would break the promise of STAGED.
        kept = self._store.has_room(self._making.total() + 1)
        return kept and self.bytes_used + size_bytes <= self._settings.bytes_max

    def is_spent(self, experiment_id: str) -> bool:
        """Whether an experiment has as many arenas as it may have."""
        # An arena that somebody reads is out of use for saving; the two others are the experiment's.
        held = sum(1 for a in self._arenas.values() if a.experiment_id == experiment_id and not a.readers)
        return held + self._making[experiment_id] >= self._settings.per_experiment_max

    def share_bytes(self, owner: int) -> float:
        """How much one user may have."""
        return math.inf if owner == os.getuid() else self._settings.share_bytes

    def over_share_bytes(self, owner: int, size_bytes: int) -> float:
        """By how much a user would be over the share with another arena of that size."""
        held = sum(arena.size_bytes for arena in self._arenas.values() if arena.owner_uid == owner)
        return held + self._making_bytes[owner] + size_bytes - self.share_bytes(owner)

    @contextmanager
    def making(self, experiment_id: str, owner: int, size_bytes: int) -> Iterator[None]:
        """Count an arena that is being made, for as long as the block lasts."""
        self._making_bytes[owner] += size_bytes
        self._making[experiment_id] += 1
        try:
            yield
        finally:
            self._making_bytes[owner] -= size_bytes
            self._making[experiment_id] -= 1
            self._making += Counter()  # forget zeros
