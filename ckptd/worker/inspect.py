"""The verb `inspect`: what a checkpoint looks like from outside, headers only."""

import msgspec

from ckptd.worker.context import Context
from ckptd.worker.examine import examine
from ckptd.worker.formats.names import epoch_of, is_step_directory, step_of
from ckptd.worker.parser import Question
from ckptd.worker.protocol import Inspect, Inspected


def run(request: Inspect, context: Context) -> Inspected:
    """Describe the file or directory checkpoint `request.path`; nothing is executed, no data is read.

    A broken or unfinished one is an answer (`problem`), not an error. OSError when it is gone or
    can't be read, BadPath for links, TimedOut when the disk does not answer.
    """
    found = examine(Question(request.root, request.path, request.tensors_max), context)
    return with_names(found, request.path)


def with_names(found: Inspected, path: str) -> Inspected:
    """Let the path's own name tell step and epoch first, then the state inside, then a step directory around."""
    above, _, name = path.rstrip("/").rpartition("/")
    step, epoch = step_of(name), epoch_of(name)
    step = found.step if step is None else step
    around = above.rpartition("/")[2]
    if step is None and is_step_directory(around):
        step = step_of(around)
    return msgspec.structs.replace(found, step=step, epoch=found.epoch if epoch is None else epoch)
