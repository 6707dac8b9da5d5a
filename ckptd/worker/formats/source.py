"""Bytes of foreign files by position, bounded and counted; what every reader reads from."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ckptd.errors import InvalidFormat
from ckptd.worker.beneath import open_file
from ckptd.worker.members import Member

_CHUNK_BYTES = 1 << 20


def broken(code: str, detail: str) -> InvalidFormat:
    """Make the error for bytes that are not what they should be, with a stable code in front.

    Codes: "truncated" and "missing" (may still be on their way), "crc", "stale", "invalid_format".
    """
    return InvalidFormat(f"{code}: {detail}")


class Source:
    """One open regular file. `read_bytes` counts what was read, `beat` is called while a lot is."""

    def __init__(self, fd: int, *, name: str = "", beat: Callable[[], None] = lambda: None) -> None:
        """Take a readable descriptor (which the caller keeps open) and its size as it is now."""
        self._fd = fd
        self._beat = beat
        self.name = name
        self.size_bytes = os.fstat(fd).st_size
        self.read_bytes = 0

    def read(self, offset: int, size_bytes: int, what: str = "file") -> bytes:
        """Return exactly these bytes. InvalidFormat "truncated" when the file ends before."""
        if offset < 0 or size_bytes < 0:
            raise broken("invalid_format", f"{what} has a negative offset or size")
        if offset + size_bytes > self.size_bytes:
            raise broken("truncated", f"{what} ends at byte {offset + size_bytes}, the file at {self.size_bytes}")
        data = self._pread(offset, size_bytes)
        if len(data) != size_bytes:
            raise broken("truncated", f"{what} was cut short while it was read")
        return data

    def head(self, size_bytes: int) -> bytes:
        """Return the first bytes, fewer when the file is shorter."""
        return self._pread(0, min(size_bytes, self.size_bytes))

    def crc32(self, offset: int, size_bytes: int) -> int:
        """Return the CRC-32 of these bytes, read in chunks of 1 MiB."""
        crc = 0
        while size_bytes:
            data = self.read(offset, min(size_bytes, _CHUNK_BYTES))
            crc = zlib.crc32(data, crc)
            offset += len(data)
            size_bytes -= len(data)
            self._beat()
        return crc

    def _pread(self, offset: int, size_bytes: int) -> bytes:
        parts = []
        while size_bytes:
            part = os.pread(self._fd, size_bytes, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size_bytes -= len(part)
        data = b"".join(parts) if len(parts) != 1 else parts[0]
        self.read_bytes += len(data)
        return data


class Folder:
    """An open directory checkpoint."""

    def __init__(self, fd: int, members: Sequence[Member], *, beat: Callable[[], None] = lambda: None) -> None:
        """Take the directory's descriptor (which the caller keeps open) and its members."""
        self._fd = fd
        self._beat = beat
        self.members = members
        self.sizes = {member.path: member.size_bytes for member in members}
        self.read_bytes = 0

    @contextmanager
    def opened(self, path: str) -> Iterator[Source]:
        """Give the Source of one member; InvalidFormat "missing" when there is none of that name."""
        if path not in self.sizes:
            raise broken("missing", f"{path!r} is not there")
        try:
            fd = open_file(self._fd, path)
        except FileNotFoundError as error:
            raise broken("missing", f"{path!r} vanished") from error
        source = Source(fd, name=path, beat=self._beat)
        try:
            yield source
        finally:
            self.read_bytes += source.read_bytes
            os.close(fd)

    def read_whole(self, path: str, bytes_max: int) -> bytes:
        """Return all of a small member. InvalidFormat when it is missing or over `bytes_max`."""
        with self.opened(path) as source:
            if source.size_bytes > bytes_max:
                raise broken("invalid_format", f"{path!r} has {source.size_bytes} bytes, {bytes_max} at most")
            return source.read(0, source.size_bytes, path)
