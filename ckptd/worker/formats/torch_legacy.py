"""torch.save's format before 1.6: pickles and raw storages in a row, with no end mark. Recognised, never parsed."""

from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.source import Source
from ckptd.worker.protocol import Inspected

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the format's magic number


def read(source: Source, ask: Ask) -> Inspected:  # noqa: ARG001 - every reader takes the same two
    """Say what it is; whether it is whole can't be told from outside."""
    return Inspected(format="torch-legacy", complete=None, extra={"bytes": source.size_bytes})
