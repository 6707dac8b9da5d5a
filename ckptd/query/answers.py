"""Answers kept in memory, so that what many ask again and again is read once. Never a stale one.

An answer belongs to the version of the catalog at which its reading began. A commit that touches what
lists show bumps the version before its writer hears of it, so whoever reads after a write was
confirmed misses the cache. Within one version an answer lives for its own time to live (monotonic) at
most, and until entries or bytes run out: then the one unused for longest goes.

Answers are kept as JSON: their size is exact, and nobody can change one that another was given.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

ENTRY_BYTES = 512  # what an entry costs beside its key and its answer: record, objects, place in the table


@dataclass(frozen=True, slots=True)
class _Kept:
    version: int
    answer: bytes
    until_s: float
    size_bytes: int


@dataclass
class Answers:
    """LRU with a time to live for each entry, bounded by entries and by bytes. For the event loop's thread."""

    entries_max: int
    bytes_max: int
    hits: int = 0
    misses: int = 0
    bytes_used: int = 0
    _kept: "OrderedDict[bytes, _Kept]" = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        """Return how many are kept, those that are over included."""
        return len(self._kept)

    def get(self, key: bytes, version: int, now_s: float) -> bytes | None:
        """Return the answer to `key` as of `version`, or None. Counts a hit or a miss."""
        kept = self._kept.get(key)
        if kept is None or kept.version != version or kept.until_s <= now_s:
            if kept is not None:
                self._drop(key)
            self.misses += 1
            return None
        self._kept.move_to_end(key)
        self.hits += 1
        return kept.answer

    def put(self, key: bytes, version: int, answer: bytes, until_s: float) -> None:
        """Keep an answer whose reading began at `version`, until `until_s`; one that is too large is not kept."""
        self._drop(key)
        size_bytes = len(key) + len(answer) + ENTRY_BYTES
        if size_bytes > self.bytes_max:
            return
        self._kept[key] = _Kept(version, answer, until_s, size_bytes)
        self.bytes_used += size_bytes
        while self.bytes_used > self.bytes_max or len(self._kept) > self.entries_max:
            self._drop(next(iter(self._kept)))

    def sweep(self, now_s: float) -> None:
        """Drop what is over. Nobody asks for the page after a row that has gone: it would stay until room ran out."""
        for key in [key for key, kept in self._kept.items() if kept.until_s <= now_s]:
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.bytes_used -= kept.size_bytes
