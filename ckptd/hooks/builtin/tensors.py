"""The tensors of a published checkpoint, a few at a time. Runs in a hook's own process, never in the daemon's.

Headers go through the restricted readers of `ckptd.worker.formats`: nothing is executed. Data is read
with pread in pieces, not mapped: a file that is cut short meanwhile is an error and not a SIGBUS, a
large one does not count against the process's address space, and what was read is dropped from the
page cache again, so that looking at a checkpoint costs training no memory.
"""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ckptd.errors import BadPath
from ckptd.worker import formats
from ckptd.worker.beneath import open_file
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.dtypes import BITS
from ckptd.worker.formats.source import Folder, Source, broken
from ckptd.worker.members import members
from ckptd.worker.protocol import TensorRecord

TENSORS_MAX = 200_000  # of one checkpoint; more are not looked at, and it is said
PIECE_BYTES = 4 << 20  # read and converted at once
SAMPLE_BYTES = 64 << 10  # of a piece when only a part of a tensor is read
_ALIGNMENT = 64  # a multiple of every element's size: pieces never cut an element


class Tensor(NamedTuple):
    """One tensor with its place. `key` names it uniquely: its file's name before its own, in a directory."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    size_bytes: int


class Tensors:
    """An open checkpoint. `listed` are its tensors, `unlisted` counts those beyond TENSORS_MAX or without a place."""

    def __init__(self, fd: int, name: str) -> None:
        """Take the descriptor of a file or directory checkpoint, which the caller keeps open. InvalidFormat."""
        self._fd = fd
        self._directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        ask = Ask(TENSORS_MAX)
        if self._directory:
            found = formats.read_folder(Folder(fd, members(fd)), name, ask)
        else:
            found = formats.read_file(Source(fd, name=name), name, ask)
        if found.complete is False:
            code, _, detail = found.problem.partition(": ")
            raise broken(code, detail)
        self.format = found.format
        self.step = found.step
        self.listed = [tensor for record in found.tensors if (tensor := self._placed(record)) is not None]
        self.unlisted = found.tensors_total - len(self.listed)
        self.read_bytes = 0

    def pieces(self, tensor: Tensor, share: float = 1.0, row_bytes: int = 1) -> Iterator[bytes]:
        """Yield its bytes in pieces, all of them or evenly spread samples of about `share`; rows stay whole.

        InvalidFormat "truncated" when the file has become shorter.
        """
        with self._opened(tensor.file) as fd:
            source = Source(fd, name=tensor.file)
            for offset, size_bytes in stretches(tensor.size_bytes, share, row_bytes):
                yield source.read(tensor.start + offset, size_bytes, tensor.key)
                self.read_bytes += size_bytes
                os.posix_fadvise(fd, tensor.start + offset, size_bytes, os.POSIX_FADV_DONTNEED)

    @contextmanager
    def _opened(self, file: str) -> Iterator[int]:
        if not self._directory:
            yield self._fd
            return
        fd = open_file(self._fd, file)
        try:
            yield fd
        finally:
            os.close(fd)

    def _placed(self, record: TensorRecord) -> Tensor | None:
        if record.start is None or record.end is None or record.dtype not in BITS:
            return None
        key = f"{record.file}:{record.name}" if self._directory else record.name
        return Tensor(key, record.dtype, tuple(record.shape), record.file, record.start, record.end - record.start)


@contextmanager
def opened(path: str) -> Iterator[Tensors]:
    """Open the checkpoint at `path`, a file or a directory.

    InvalidFormat  its bytes break the format's rules     OSError  it is gone or can't be read
    BadPath        it is neither a file nor a directory, or a symlink
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise BadPath(f"{path!r} is neither a file nor a directory")
        yield Tensors(fd, os.path.basename(path.rstrip("/")))
    finally:
        os.close(fd)


def stretches(size_bytes: int, share: float, row_bytes: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (offset, size): everything in pieces for share >= 1, else samples spread over all of it.

    A tensor of at most SAMPLE_BYTES is always read whole. Offsets are multiples of the row.

    >>> list(stretches(10, 1.0)), sum(size for _, size in stretches(1 << 30, 0.25))
    ([(0, 10)], 268435456)
    """
    row = math.lcm(row_bytes, _ALIGNMENT)
    whole = share >= 1.0 or size_bytes <= SAMPLE_BYTES
    piece = max(row, (PIECE_BYTES if whole else SAMPLE_BYTES) // row * row)
    total = -(-size_bytes // piece)
    wanted = total if whole else max(1, min(total, round(total * share)))
    for number in range(wanted):
        offset = number * total // wanted * piece
        yield offset, min(piece, size_bytes - offset)
