"""Descriptors that outlive the daemon: named, unique, bounded."""

import os
import stat
from collections.abc import Iterator

COUNT_MAX = 512


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class FdStore:
    """What the daemon asked to keep. Every descriptor put in belongs to the store."""

    def __init__(self, count_max: int = COUNT_MAX, bytes_max: int | None = None) -> None:
        """Hold at most `count_max` descriptors of files of `bytes_max` bytes together (None: the machine's memory)."""
        self.count_max = count_max
        self._bytes_max = _memory_bytes() if bytes_max is None else bytes_max
        self._kept: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._kept)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Yield (name, fd), the oldest first."""
        for name, (fd, _) in self._kept.items():
            yield name, fd

    @property
    def size_bytes(self) -> int:
        """Return the size of all regular files (memfds are such) that are kept."""
        return sum(size for _, size in self._kept.values())

    def put(self, name: str, fd: int) -> bool:
        """Keep `fd` as `name`, in place of what had that name; False (and `fd` closed) when there is no room."""
        status = os.fstat(fd)
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        count, size_bytes = len(self._kept), self.size_bytes
        if name in self._kept:
            count, size_bytes = count - 1, size_bytes - self._kept[name][1]
        if count >= self.count_max or size_bytes + size > self._bytes_max:
            os.close(fd)
            return False
        self.drop(name)
        self._kept[name] = (fd, size)
        return True

    def drop(self, name: str) -> bool:
        """Close and forget `name`; False when it was not there."""
        found = self._kept.pop(name, None)
        if found is None:
            return False
        os.close(found[0])
        return True
