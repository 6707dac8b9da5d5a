"""What the machine can do at best, measured beside every peer in the same process."""

import ctypes
import hashlib
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.state import State, tensors

BUFFER_BYTES_MAX = 1 << 30
CHUNK_BYTES = 8 << 20
MAP_POPULATE = 0x8000


@dataclass(frozen=True)
class Cost:
    """Wall and CPU seconds of one act of this process."""

    wall_s: float
    cpu_s: float


class _Timer:
    """Measures what happens between its making and `cost()`."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def cost(self) -> Cost:
        return Cost(time.perf_counter() - self._wall, time.process_time() - self._cpu)


class Limits:
    """A warm, populated buffer and the three acts that bound every checkpoint: copy, write, hash.

    The buffer has at most BUFFER_BYTES_MAX (far beyond any cache) and is used round and round, so
    that a 4 GB state does not need 4 GB more for its yardstick.
    """

    def __init__(self, state: State, folder: Path, *, one_source: bool) -> None:
        """`one_source`: copy from one piece of memory instead of from the tensors one by one.

        That is the limit for many small tensors: a single memcpy of as many bytes.
        """
        self._state = state
        self._size = sum(tensor.nbytes for _, tensor in tensors(state))
        self._path = folder / "raw.bin"
        self._length = min(BUFFER_BYTES_MAX, -(-self._size // CHUNK_BYTES) * CHUNK_BYTES)
        self._buffer = self._map()
        self._source = self._map() if one_source else None
        self._moves = self._plan()

    def _map(self) -> mmap.mmap:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_POPULATE
        mapped = mmap.mmap(-1, self._length, flags=flags)
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), 1, self._length)
        return mapped

    def _plan(self) -> list[tuple[int, int, int]]:
        target = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        if self._source is not None:
            source = ctypes.addressof(ctypes.c_char.from_buffer(self._source))
            whole, rest = divmod(self._size, self._length)
            return [(target, source, self._length)] * whole + [(target, source, rest)] * (rest > 0)
        moves, at = [], 0
        for _, tensor in tensors(self._state):
            for start in range(0, tensor.nbytes, self._length):
                length = min(self._length, tensor.nbytes - start)
                at = 0 if at + length > self._length else at
                moves.append((target + at, tensor.data_ptr() + start, length))
                at += length
        return moves

    def memcpy(self) -> Cost:
        """Copy as many bytes as the state has into the warm buffer, on one thread."""
        move = ctypes.memmove
        timer = _Timer()
        for target, source, length in self._moves:
            move(target, source, length)
        return timer.cost()

    def sha256(self) -> Cost:
        """Hash as many bytes, on one thread."""
        view, digest = memoryview(self._buffer), hashlib.sha256()
        timer = _Timer()
        for start, length in self._chunks():
            digest.update(view[start : start + length])
        return timer.cost()

    def _chunks(self) -> list[tuple[int, int]]:
        sizes = [CHUNK_BYTES] * (self._size // CHUNK_BYTES)
        rest = self._size % CHUNK_BYTES
        sizes += [-(-rest // mmap.PAGESIZE) * mmap.PAGESIZE] if rest else []
        return [(number * CHUNK_BYTES % self._length, size) for number, size in enumerate(sizes)]

    def write(self) -> Cost:
        """Write as many bytes to a new file past the page cache, fsync included; it stays for `read`."""
        view = memoryview(self._buffer)
        self._path.unlink(missing_ok=True)
        timer = _Timer()
        opened = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(opened, 0, -(-self._size // mmap.PAGESIZE) * mmap.PAGESIZE)
            for start, length in self._chunks():
                os.write(opened, view[start : start + length])
            os.fsync(opened)
        finally:
            os.close(opened)
        return timer.cost()

    def read(self) -> Cost:
        """Read that file back past the page cache."""
        view = memoryview(self._buffer)
        timer = _Timer()
        opened = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        try:
            for start, length in self._chunks():
                os.readv(opened, [view[start : start + length]])
        finally:
            os.close(opened)
        return timer.cost()

    def remove(self) -> None:
        """Delete the raw file."""
        self._path.unlink(missing_ok=True)
