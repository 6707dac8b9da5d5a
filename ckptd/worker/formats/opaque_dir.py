"""A directory that is one checkpoint by custom, of a kind whose end is not known here.

Orbax writes commit_success.txt last where it can; that is an end mark. For all others a torn file
is told, and nothing proves that no further file will come.
"""

from ckptd.worker.formats import contents
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.source import Folder, broken
from ckptd.worker.protocol import Inspected

COMMITTED = "commit_success.txt"


def read(folder: Folder, ask: Ask) -> Inspected:
    """Check every file that has a format of its own. InvalidFormat "missing" when there is no file at all."""
    if not folder.members:
        raise broken("missing", "the directory holds no file yet")
    found = contents.check(folder, ask)
    committed = COMMITTED in folder.sizes
    return Inspected(
        format="opaque",
        complete=False if found.problem else (True if committed else None),
        problem=found.problem,
        tensors=found.tensors,
        tensors_total=found.tensors_total,
        step=found.step,
        epoch=found.epoch,
        extra={"marker": COMMITTED} if committed else {},
    )
