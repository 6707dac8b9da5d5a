"""Files whose structure is not known here: only an empty one, or one that is all zeros in front, tells anything."""

from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.source import Source, broken
from ckptd.worker.protocol import Inspected

_HEAD_BYTES = 4096
_ZEROS_MIN = 16


def read(source: Source, ask: Ask) -> Inspected:  # noqa: ARG001 - every reader takes the same two
    """Answer "can't tell". InvalidFormat "truncated" for an empty file."""
    if source.size_bytes == 0:
        raise broken("truncated", "the file is empty")
    return Inspected(format="opaque", complete=None)


def read_named_torch(source: Source, ask: Ask) -> Inspected:
    """As `read`, for a file that torch's suffix is on and that none of torch's formats begins.

    InvalidFormat "truncated" for one too short to be anything, and for one that starts with zeros:
    it was made, and never written.
    """
    found = read(source, ask)
    head = source.head(_HEAD_BYTES)
    if len(head) < _ZEROS_MIN:
        raise broken("truncated", f"{len(head)} bytes are no checkpoint")
    if not any(head):
        raise broken("truncated", f"the first {len(head)} bytes are zeros")
    return found
