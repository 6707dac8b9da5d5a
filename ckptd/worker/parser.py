"""The child that parses foreign bytes: `python -m ckptd.worker.parser BYTES_MAX CPU_S`.

One question a line on stdin, one answer a line on stdout; it ends with its stdin, after IDLE_S
without a question, after QUESTIONS_MAX, and whenever its memory ran out. It holds no secret, may
write no file and executes nothing of what it reads: the worst that bytes can do is to end it.
"""

import math
import os
import resource
import select
import stat
import sys
import time
from dataclasses import dataclass, field
from typing import BinaryIO

import msgspec

from ckptd.errors import BadPath, CkptdError, InvalidFormat
from ckptd.worker import beneath, formats
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.source import Folder, Source
from ckptd.worker.members import members
from ckptd.worker.protocol import Inspected, TensorRecord

IDLE_S = 30.0
QUESTIONS_MAX = 20_000  # then a fresh process, so that nothing piles up
BEAT_S = 1.0
ANSWER_BYTES_MAX = 16 << 20
_TENSOR_BYTES_MAX = 6 << 20  # names and shapes of one answer, as text; more tensors are counted only
_OPEN_FILES_MAX = 64
_CRC_BYTES_PER_S = 128 << 20  # CPU time allowed for checksums: a tenth of what a slow core does


class Question(msgspec.Struct, frozen=True):
    """Look at `path` (a file or a directory checkpoint) below `root`."""

    root: str
    path: str
    tensors_max: int = 0
    crc: bool = False


class Answer(msgspec.Struct, frozen=True):
    """Exactly one of the first three; `beat` lines may come before it.

    failed  [errno, text]: the file system's answer
    error   a coded error of ours
    """

    found: Inspected | None = None
    failed: tuple[int, str] | None = None
    error: dict[str, str] | None = None
    beat: bool = False
    read_bytes: int = 0


@dataclass
class _Child:
    """One parser process from the inside."""

    bytes_max: int
    cpu_s: float
    out: BinaryIO
    spent: bool = False
    _beat_s: float = field(default_factory=time.monotonic)

    def serve(self, questions: BinaryIO) -> None:
        """Answer until there is a reason to end. The first beat says that whatever ends it from here on is its file."""
        self._say(Answer(beat=True))
        for _ in range(QUESTIONS_MAX):
            if self.spent or not select.select([questions], [], [], IDLE_S)[0]:
                return
            line = questions.readline()
            if not line:
                return
            self._say(self.answer(msgspec.json.decode(line, type=Question)))

    def answer(self, question: Question) -> Answer:
        """Look, and put whatever comes of it into an answer."""
        self._allow(0)
        try:
            return self._look(question)
        except InvalidFormat as error:
            return Answer(found=self._broken(question, error.message))
        except RecursionError:
            return Answer(found=self._broken(question, "invalid_format: nested too deep to be read"))
        except MemoryError:
            self.spent = True
            return Answer(found=self._broken(question, f"invalid_format: takes over {self.bytes_max} bytes to read"))
        except OSError as error:
            return Answer(failed=(error.errno or 0, error.strerror or str(error)))
        except CkptdError as error:
            return Answer(error={"code": error.code, "message": error.message})

    def _look(self, question: Question) -> Answer:
        ask = Ask(question.tensors_max, question.crc)
        name = question.path.rpartition("/")[2]
        parts = beneath.parts_below(question.root, question.path)
        root_fd = beneath.open_root(question.root)
        try:
            fd = beneath.open_beneath(root_fd, parts, beneath.READ)
        finally:
            os.close(root_fd)
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                folder = Folder(fd, members(fd), beat=self._beat)
                self._allow(sum(folder.sizes.values()) if ask.crc else 0)
                return Answer(found=_bounded(formats.read_folder(folder, name, ask)), read_bytes=folder.read_bytes)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadPath(f"{question.path!r} is neither a file nor a directory")
            source = Source(fd, beat=self._beat)
            self._allow(source.size_bytes if ask.crc else 0)
            return Answer(found=_bounded(formats.read_file(source, name, ask)), read_bytes=source.read_bytes)
        finally:
            os.close(fd)

    def _broken(self, question: Question, problem: str) -> Inspected:
        name = question.path.rpartition("/")[2]
        return Inspected(format=formats.detect_file(name) or "opaque", complete=False, problem=problem)

    def _allow(self, crc_bytes: int) -> None:
        """Allow the CPU time of one question from now on. Raising a soft limit takes no privilege."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = used.ru_utime + used.ru_stime + self.cpu_s + crc_bytes / _CRC_BYTES_PER_S
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), resource.RLIM_INFINITY))

    def _beat(self) -> None:
        now_s = time.monotonic()
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            self._say(Answer(beat=True))

    def _say(self, answer: Answer) -> None:
        self.out.write(msgspec.json.encode(answer) + b"\n")
        self.out.flush()


def _bounded(found: Inspected) -> Inspected:
    room = _TENSOR_BYTES_MAX
    for kept, tensor in enumerate(found.tensors):
        room -= _text_bytes(tensor)
        if room < 0:
            return msgspec.structs.replace(found, tensors=found.tensors[:kept])
    return found


def _text_bytes(tensor: TensorRecord) -> int:
    return 200 + 6 * (len(tensor.name) + len(tensor.file) + len(tensor.dtype)) + 20 * len(tensor.shape)


def main() -> None:
    """Take the limits, then serve."""
    bytes_max, cpu_s = int(sys.argv[1]), float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (bytes_max, bytes_max))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES_MAX, _OPEN_FILES_MAX))
    formats.load_readers()
    with open(0, "rb", buffering=0, closefd=False) as questions:
        _Child(bytes_max, cpu_s, sys.stdout.buffer).serve(questions)


if __name__ == "__main__":
    main()
