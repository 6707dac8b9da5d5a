"""What the tests of the reading verbs share: a look at bytes, and a writer that does one step at a time."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.errors import InvalidFormat
from ckptd.worker import examine, formats, settle
from ckptd.worker.context import Context, Limits
from ckptd.worker.formats.ask import Ask
from ckptd.worker.formats.source import Folder, Source
from ckptd.worker.members import members
from ckptd.worker.protocol import FileImage, IdentityRecord, Inspected, Settle, Settlement
from tests.support.arena import sealed

EVERYTHING = Ask(tensors_max=10_000, crc=True)


@pytest.fixture(scope="session", autouse=True)
def _no_parser_is_left() -> Iterator[None]:
    """Children of the default limits are shared by all tests and end with them."""
    yield
    examine.parsers(Limits()).close()


@pytest.fixture
def sigio_ignored() -> Iterator[None]:
    """The worker's loop does this before any verb runs."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGIO, before)


@pytest.fixture
def context() -> Context:
    """A request's surroundings that send nowhere."""
    return Context()


def look_at(path: Path, ask: Ask = EVERYTHING) -> Inspected:
    """Read a file or a directory in this process; a broken one is an answer, as the parser child gives it."""
    flags = os.O_RDONLY | (os.O_DIRECTORY if path.is_dir() else 0)
    fd = os.open(path, flags)
    try:
        if path.is_dir():
            return formats.read_folder(Folder(fd, members(fd)), path.name, ask)
        return formats.read_file(Source(fd), path.name, ask)
    except InvalidFormat as error:
        return Inspected(format="?", complete=False, problem=error.message)
    finally:
        os.close(fd)


@pytest.fixture
def look() -> Callable[..., Inspected]:
    """See look_at."""
    return look_at


class Asker:
    """What the daemon does: ask again with the identity seen before and how long it stood still."""

    def __init__(self, path: Path, *, told: bool = False) -> None:
        self.path, self.told = path, told
        self.last: IdentityRecord | None = None

    def ask(self, still_s: float = 0.0) -> Settlement:
        """Settle once, with a quiet time of 5 s."""
        root, path = str(self.path.parent), str(self.path)
        request = Settle(root=root, path=path, quiet_s=5.0, last=self.last, still_s=still_s, told=self.told)
        found = settle.run(request, Context())
        self.last = found.identity
        return found


@pytest.fixture
def asker_of() -> type[Asker]:
    """See Asker."""
    return Asker


@pytest.fixture
def nothing_remembered() -> None:
    """Verdicts of other tests are forgotten."""
    settle._remembered.clear()


class Puppet:
    """Another process that runs one piece of Python at a time and says when it is done: no sleeps."""

    _BODY = textwrap.dedent("""
        import sys
        names = {}
        for line in sys.stdin:
            exec(eval(line), names)
            print("done", flush=True)
    """)

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._BODY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, code: str) -> None:
        """Run `code` there and return when it has run."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(repr(textwrap.dedent(code)) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"

    def end(self) -> None:
        """Let it exit."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    """A fresh process for one test."""
    found = Puppet()
    yield found
    found.end()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A managed root that is not there yet."""
    return tmp_path / "root"


@pytest.fixture
def small() -> Iterator[tuple[int, list[FileImage]]]:
    """A sealed arena with one small file."""
    made = sealed({"f": b"x" * 5000})
    yield made
    os.close(made[0])
