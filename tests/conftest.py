"""Fixtures that every suite shares."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import tally
from tests.support.history import History
from tests.support.node import Node
from tests.support.onlooker import Onlooker, end, make
from tests.support.skips import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401  hooks
from tests.support.trainer import Nursery
from tests.support.writer import Writer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell: the programs under test would inherit a deaf ear for Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes says how busy the machine is. With CI set, hypothesis' own profile says the same.
settings.register_profile("ckptd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
if not os.environ.get("CI"):
    settings.load_profile("ckptd")


def pytest_configure(config: pytest.Config) -> None:
    """Counts of the crash suites are printed at the end of the run."""
    config.pluginmanager.register(tally, "ckptd-tally")


WAITING = ("tests/process/", "tests/faults/", "tests/soak/")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mix what mostly waits (for processes, disks, deadlines) with what computes, when several processes share the tests.

    In the order of their files the machine idles for minutes and is overloaded for as many: a fifteenth of the time.
    Both keep their own order, and each worker makes the same of it, as xdist wants.
    """
    if not hasattr(config, "workerinput"):
        return
    waits = [item for item in items if item.nodeid.startswith(WAITING)]
    computes = [item for item in items if not item.nodeid.startswith(WAITING)]
    places = {item: (at + 0.5) / len(some) for some in (waits, computes) for at, item in enumerate(some)}
    items.sort(key=places.__getitem__)


ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def ears() -> Iterator[None]:
    """A test that leaves signals blocked or ignored fails itself, not those whose processes then never end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, []), [signal.getsignal(number) for number in ASKED_TO_END]
    yield
    after = signal.pthread_sigmask(signal.SIG_SETMASK, before[0]), [signal.getsignal(number) for number in ASKED_TO_END]
    assert after == before


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


@pytest.fixture(scope="module")
def onlooker() -> Iterator[Onlooker]:
    """A node that runs, with questions about what lies under its watched roots; one for all tests of a file."""
    made = make().start()
    yield made
    end(made)


@pytest.fixture(scope="module")
def writer() -> Iterator[Writer]:
    """A foreign process that writes checkpoints; one for all tests of a file."""
    with Writer() as made:
        yield made


@pytest.fixture
def root(onlooker: Onlooker, tmp_path: Path) -> Iterator[Path]:
    """A tree that the onlooker watches, under a project named after the test."""
    yield onlooker.watch(tmp_path / "root", tmp_path.name)
    print(onlooker.tail())


@pytest.fixture(scope="module")
def history() -> Iterator[History]:
    """A small real history behind a real daemon; one for all tests of a file."""
    with History() as made:
        yield made


@pytest.fixture
def ckpt(history: History) -> Iterator[Any]:
    """The real command, asked about the history."""
    yield history.node.run
    print(history.node.tail())
