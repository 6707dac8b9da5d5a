"""Every file of a directory checkpoint, each by its own reader: no torn file hides in a whole directory."""

from dataclasses import dataclass, field

from ckptd.errors import InvalidFormat
from ckptd.worker import formats
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.source import Folder
from ckptd.worker.protocol import TensorRecord


@dataclass(slots=True)
class Contents:
    """What the files of a directory tell together.

    problem  the first torn file's, with its name; "" when there is none
    proven   paths whose own structure is whole
    """

    problem: str = ""
    proven: set[str] = field(default_factory=set)
    tensors: list[TensorRecord] = field(default_factory=list)
    tensors_total: int = 0
    step: int | None = None
    epoch: float | None = None


def check(folder: Folder, ask: Ask) -> Contents:
    """Read every member that has a format of its own; stops at the first torn one."""
    contents = Contents()
    for member in folder.members:
        if formats.detect_file(member.path.rpartition("/")[2]) is None:
            continue
        rest = Ask(max(0, ask.tensors_max - len(contents.tensors)), ask.crc, ask.header_bytes_max)
        try:
            with folder.opened(member.path) as source:
                found = formats.read_file(source, member.path, rest)
        except InvalidFormat as error:
            contents.problem = f"{error.message} (file {member.path!r})"
            return contents
        if found.complete is False:
            contents.problem = f"{found.problem} (file {member.path!r})"
            return contents
        if found.complete:
            contents.proven.add(member.path)
        contents.tensors.extend(found.tensors)
        contents.tensors_total += found.tensors_total
        contents.step = contents.step if contents.step is not None else found.step
        contents.epoch = contents.epoch if contents.epoch is not None else found.epoch
    return contents
