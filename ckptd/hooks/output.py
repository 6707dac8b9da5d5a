"""What a hook prints: the beginning is kept, the rest is read and thrown away, so that printing never blocks it."""

import os

READ_BYTES = 256 << 10
REST_BYTES_MAX = 4 << 20  # read at the end of a run; what is still printed then belongs to nobody


class Output:
    """One pipe, seen from its reading end. Never blocks."""

    def __init__(self, bytes_max: int) -> None:
        """Make the pipe; keep at most `bytes_max` of what comes. OSError without descriptors."""
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._bytes_max = bytes_max
        self._kept = bytearray()
        self.dropped_bytes = 0
        self.ended = False

    def fileno(self) -> int:
        """Return the reading end, for select."""
        return self._read_fd

    def read(self) -> int:
        """Read once; return how much came."""
        if self.ended:
            return 0
        try:
            data = os.read(self._read_fd, READ_BYTES)
        except BlockingIOError:
            return 0
        self.ended = not data
        room = self._bytes_max - len(self._kept)
        self._kept += data[:room]
        self.dropped_bytes += max(0, len(data) - room)
        return len(data)

    def read_rest(self) -> None:
        """Read what is there."""
        total = 0
        while total < REST_BYTES_MAX:
            found = self.read()
            if not found:
                return
            total += found

    def take(self) -> tuple[str, int]:
        """Return what was kept as text, and how many bytes were not; begin anew."""
        text, dropped = self._kept.decode("utf-8", "replace"), self.dropped_bytes
        self._kept.clear()
        self.dropped_bytes = 0
        return text, dropped

    def close_write(self) -> None:
        """Give up the writing end, which somebody else has now."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def close(self) -> None:
        """Give up both ends."""
        self.close_write()
        if self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd, self.ended = -1, True
