"""Fixtures that every suite shares."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node import Node
from tests.support.skips import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401  hooks
from tests.support.trainer import Nursery

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell: the programs under test would inherit a deaf ear for Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    """The daemon ships on asyncio, so that is what the tests run on."""
    return "asyncio"


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for a Unix socket's name (107 bytes in all)."""
    path = Path(tempfile.mkdtemp(prefix="ck"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def node(short_dir: Path) -> Iterator[Node]:
    """A node that is not started yet; when the test fails, the end of its log is shown."""
    made = Node(short_dir)
    yield made
    print(made.tail())
    made.clean_up()


@pytest.fixture(scope="session")
def nurseries() -> Iterator[dict[bool, Nursery]]:
    """Nurseries made so far: with torch (False) and without (True)."""
    made: dict[bool, Nursery] = {}
    directory = Path(tempfile.mkdtemp(prefix="ck"))
    made_in.append(directory)
    yield made
    for nursery in made.values():
        nursery.__exit__(None, None, None)
    shutil.rmtree(directory, ignore_errors=True)


made_in: list[Path] = []


@pytest.fixture
def nursery(nurseries: dict[bool, Nursery]) -> Iterator[Nursery]:
    """Starts trainers that have torch; they end with the test."""
    if False not in nurseries:
        nurseries[False] = Nursery(made_in[-1])
    yield nurseries[False]
    nurseries[False].clear()


@pytest.fixture
def plain_nursery(nurseries: dict[bool, Nursery]) -> Iterator[Nursery]:
    """Starts trainers without torch and numpy; they end with the test."""
    if True not in nurseries:
        nurseries[True] = Nursery(made_in[-1], plain=True)
    yield nurseries[True]
    nurseries[True].clear()
