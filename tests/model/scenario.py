"""One protocol: how it starts, what it does, who goes on when its process is killed, what must hold."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import CkptdError
from tests.model.explore import Check
from tests.model.log import Log
from tests.model.recorder import Killed, Recorder

STEPS_MAX = 500  # changes of one run; a run that makes more is not the protocol it was
FAST = Path("/dev/shm")


def nothing(_: object) -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True)
class Edge:
    """An order that a protocol's proof needs: `first` returns before `then` begins.

    Each is "says <what>", "fsync <part of its site>", a call ("Move", "Drop") or a call with a name.
    """

    first: str
    then: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """A protocol.

    again    what the next process does after a kill; `run` itself unless it is given
    edges    the orders that its proof needs
    fails    each of its fsyncs is made to fail as well
    clean    asked again, it leaves no temporary name
    """

    name: str
    run: Callable[[Recorder], None]
    check: Check
    prepare: Callable[[Path], None] = nothing
    again: Callable[[Recorder], None] | None = None
    edges: tuple[Edge, ...] = ()
    fails: bool = True
    clean: bool = False


@contextmanager
def place() -> Iterator[Path]:
    """Lend an empty directory whose fsync costs nothing."""
    made = Path(tempfile.mkdtemp(prefix="ckm", dir=FAST if FAST.is_dir() else None))
    try:
        yield made
    finally:
        shutil.rmtree(made)
        shutil.rmtree(f"{made}.aside", ignore_errors=True)


def plain_log(scenario: Scenario) -> Log:
    """Run it once, undisturbed."""
    with place() as root:
        scenario.prepare(root)
        recorder = Recorder(root)
        recorder.next_life()
        with recorder.recording():
            scenario.run(recorder)
        return recorder.log()


def killed_logs(scenario: Scenario, first: int = 1, step: int = 1) -> Iterator[Log]:
    """Kill it before each of its changes in turn, or of every `step`-th, and let the next process go on."""
    for kill_at in range(first, STEPS_MAX, step):
        with place() as root:
            scenario.prepare(root)
            recorder = Recorder(root)
            recorder.next_life()
            with recorder.recording():
                recorder.kill_at = kill_at
                try:
                    scenario.run(recorder)
                except Killed:
                    first_life = len(recorder.ops)
                else:
                    return
                recorder.next_life()
                (scenario.again or scenario.run)(recorder)
            yield recorder.log(cuts_from=first_life)
    raise AssertionError(f"{scenario.name} makes more than {STEPS_MAX} changes")


def failed_logs(scenario: Scenario) -> Iterator[Log]:
    """Let each of its fsyncs fail in turn; it answers with an error, or goes on, and is then asked again."""
    for fail_at in range(STEPS_MAX if scenario.fails else 0):
        with place() as root:
            scenario.prepare(root)
            recorder = Recorder(root)
            recorder.next_life()
            with recorder.recording():
                recorder.fail_at = fail_at
                with suppress(CkptdError, OSError):
                    scenario.run(recorder)
                if recorder.fail_at is not None:
                    return
                recorder.same_life()
                with suppress(CkptdError, OSError):
                    (scenario.again or scenario.run)(recorder)
            yield recorder.log()


def logs(scenario: Scenario) -> list[Log]:
    """All of them."""
    return [plain_log(scenario), *killed_logs(scenario), *failed_logs(scenario)]
