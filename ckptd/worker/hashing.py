"""Digests of files: SHA-256 as the proof, xxh3-64 of each MiB as the map that finds the damage.

Both are taken of one MiB after the other while it is in the processor's cache, so that the map
costs about 3 % of the proof. hashlib and xxhash let go of the GIL for the length of a call.
"""

import hashlib
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Self

import xxhash

from ckptd.errors import Bug
from ckptd.worker.protocol import FileRecord

MIB = 1 << 20
BUFFER_BYTES = 4 * MIB
_SECTOR = 512
_BUFFERS = 3  # one being read, one being hashed, one between the two


class FileDigest:
    """Both digests of one file, fed in order. Not for two threads at once."""

    __slots__ = ("_map", "_sha256", "size_bytes")

    def __init__(self) -> None:
        """Start at the file's first byte."""
        self._sha256 = hashlib.sha256()
        self._map: list[str] = []
        self.size_bytes = 0

    def update(self, view: memoryview) -> None:
        """Take the next bytes: whole MiB each time, except for the file's last."""
        if self.size_bytes % MIB:
            raise Bug("bytes came after a part of a MiB")
        for start in range(0, len(view), MIB):
            part = view[start : start + MIB]
            self._sha256.update(part)
            self._map.append(xxhash.xxh3_64_hexdigest(part))
        self.size_bytes += len(view)

    def record(self, path: str) -> FileRecord:
        """Return what was taken so far as the record of a whole file."""
        return FileRecord(path, self.size_bytes, self._sha256.hexdigest(), self._map)


class HashThread:
    """A second thread that digests buffers while the caller reads the next ones.

    with HashThread() as hasher:
        for buffer in hasher.buffers(): read into it; hasher.feed(digest, buffer, size_bytes)

    Leaving the block waits for all that was fed; its error, if any, is raised there. `cpu_s` is
    the thread's processor time, known after the block.
    """

    def __init__(self) -> None:
        """Make page-aligned buffers (O_DIRECT needs that); the memory goes back at the end."""
        self._memory = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(_BUFFERS)]
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._work: SimpleQueue[tuple[FileDigest, memoryview, int] | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="hash", daemon=True)
        self.cpu_s = 0.0

    def __enter__(self) -> Self:
        """Start the thread."""
        for memory in self._memory:
            self._free.put(memoryview(memory))
        self._thread.start()
        return self

    def buffer(self) -> memoryview:
        """Wait for a free buffer of BUFFER_BYTES. Every buffer taken must be fed or given back."""
        return self._free.get()

    def give_back(self, buffer: memoryview) -> None:
        """Return a buffer that was not needed."""
        self._free.put(buffer)

    def feed(self, digest: FileDigest, buffer: memoryview, size_bytes: int) -> None:
        """Digest the first `size_bytes` of a buffer taken by buffer(); it becomes free by itself."""
        self._work.put((digest, buffer, size_bytes))

    def _run(self) -> None:
        # After an error buffers still go round, or the reader would wait for one for ever.
        while (work := self._work.get()) is not None:
            digest, buffer, size_bytes = work
            try:
                if self._error is None:
                    digest.update(buffer[:size_bytes])
            except BaseException as error:  # noqa: ASYNC103, BLE001  raised again in the caller's thread
                self._error = error
            self._free.put(buffer)
        self.cpu_s = time.thread_time()

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait for the thread. Raises its error unless the block already has one."""
        self._work.put(None)
        self._thread.join()
        while not self._free.empty():
            self._free.get().release()
        for memory in self._memory:
            try:
                memory.close()
            except BufferError:  # a traceback still holds a view; it goes with the traceback
                continue
        if kind is None and self._error is not None:
            raise self._error


def read_into(
    read: Callable[[memoryview, int], int], size_bytes: int, hasher: HashThread, digest: FileDigest
) -> Iterator[tuple[memoryview, int, int]]:
    """Read a file of `size_bytes` chunk by chunk into the hasher's buffers and feed them.

    read(buffer, offset) fills a buffer and returns how many bytes it got; 0 is the end of the file.
    Yields (buffer, offset, bytes) before each chunk is fed: the caller may write it elsewhere.
    Ends early when the file does: the digest's size tells.
    """
    offset = 0
    while offset < size_bytes:
        buffer = hasher.buffer()
        fed = False
        try:
            want = min(BUFFER_BYTES, size_bytes - offset)
            got = _fill(read, buffer, offset, want)
            if got:
                yield buffer, offset, got
                hasher.feed(digest, buffer, got)
                fed = True
        finally:
            if not fed:
                hasher.give_back(buffer)
        if got < want:
            return
        offset += got


def _fill(read: Callable[[memoryview, int], int], buffer: memoryview, offset: int, want: int) -> int:
    """Fill the buffer even when the kernel gives less at a time."""
    got = 0
    while got < want and got % _SECTOR == 0:  # off a sector's edge: that was the file's end
        more = read(buffer[got:], offset + got)
        if more <= 0:
            break
        got += more
    return min(got, want)
