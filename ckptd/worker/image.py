"""The arena that a publish reads from: what was promised about it is checked before it is touched."""

import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from contextlib import suppress

from ckptd.errors import BadRequest, Bug, SourceChanged
from ckptd.worker import beneath, kernel
from ckptd.worker.protocol import FileImage

BLOCK = 4096  # every file starts on one, in the arena and (O_DIRECT) in memory and on disk
FILES_MAX = 100_000
_SEALED = fcntl.F_SEAL_SHRINK


class Image:
    """An arena, open for reading.

    A memfd that is sealed against shrinking is mapped: its bytes are hashed and written from where
    they lie. Anything else (a spool file) could be cut short under a mapping, and touching the
    lost page would kill this process; it is only ever read with pread.
    """

    def __init__(self, fd: int, files: Sequence[FileImage]) -> None:
        """Check `files` against what `fd` is. BadRequest: they don't fit, or it is no arena."""
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise BadRequest("the descriptor is neither a memfd nor a file")
        self.fd = fd
        self.size_bytes = facts.st_size
        _check_files(files, facts.st_size)
        self._map: mmap.mmap | None = None
        self._populated: set[tuple[int, int]] = set()
        if _seals(fd) & _SEALED and facts.st_size:
            self._map = mmap.mmap(fd, facts.st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            self._view = memoryview(self._map)

    @property
    def mapped(self) -> bool:
        """Whether view() may be used; read() otherwise."""
        return self._map is not None

    def view(self, offset: int, size_bytes: int) -> memoryview:
        """Return the bytes where they lie, with their pages mapped in one go.

        Much cheaper than a fault for every 16 of them; a kernel before 5.14 refuses, and they are
        then faulted in as they are touched. The thread that asks for a span first does it for the
        others: the writer is ahead of the digest, and waits for the disk anyway.
        """
        if self._map is None:
            raise Bug("only a mapped image has views")
        start = offset - offset % mmap.PAGESIZE
        if (offset, size_bytes) not in self._populated:
            self._populated.add((offset, size_bytes))
            with suppress(OSError):
                self._map.madvise(kernel.MADV_POPULATE_READ, start, offset + size_bytes - start)
        return self._view[offset : offset + size_bytes]

    def read(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from `offset`. SourceChanged when the file was cut short meanwhile."""
        got = os.preadv(self.fd, [buffer], offset)
        if got == 0:
            raise SourceChanged("the spool file was cut short while it was read")
        return got

    def close(self) -> None:
        """Unmap, at once or with the last view: the traceback of a failed write still holds the one it wrote from."""
        if self._map is not None:
            self._view.release()
            with suppress(BufferError):
                self._map.close()
            self._map = None


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return 0  # EINVAL: not a memfd


def _check_files(files: Sequence[FileImage], size_bytes: int) -> None:
    if not 0 < len(files) <= FILES_MAX:
        raise BadRequest(f"{len(files)} files, 1 to {FILES_MAX} are possible")
    seen: set[str] = set()
    for file in files:
        beneath.parts_of(file.path)
        if file.offset % BLOCK or file.offset < 0 or file.size_bytes < 0 or file.offset + file.size_bytes > size_bytes:
            raise BadRequest(f"{file.path!r} is not on a page of the arena, or does not fit in it")
        if file.path in seen or file.path in {"manifest.json", "late.json"}:
            raise BadRequest(f"{file.path!r} occurs twice, or is a name of ours")
        seen.add(file.path)
