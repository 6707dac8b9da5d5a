"""Counts of what the crash suites tried: one line at the end of a run, whichever process counted.

A suite calls `tally.add("model states", n)`. tests/conftest.py makes the hooks below pytest's own; under
xdist a worker hands its counts to the controller, which prints the sum.
"""

import threading
from collections import Counter

import pytest

# In the order in which they are printed; another name is a slip of the pen and is refused.
NAMES = (
    "kills",
    "power cuts ext4",
    "power cuts xfs",
    "model states",
    "mutants",
    "mutants caught",
    "fuzzed frames",
    "bit flips",
    "bit flips found",
    "retention histories",
    "violations",
)
_WORKERS = "ckptd_tally"  # the key under which a worker of xdist sends its counts

_counts: Counter[str] = Counter()
_lock = threading.Lock()


def add(name: str, count: int = 1) -> None:
    """Count `count` more of `name`, which is one of NAMES. Safe from any thread."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is not counted; NAMES lists what is")
    with _lock:
        _counts[name] += count


def line() -> str:
    """Say all counts in one line; "" when nothing was counted. Violations are named even when there are none."""
    if not any(_counts.values()):
        return ""
    said = [f"{name} {_counts[name]:,}" for name in NAMES if _counts[name] or name == "violations"]
    return ", ".join(said)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of xdist: hand the counts over."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_WORKERS] = dict(_counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """In the controller of xdist: take a worker's counts. A worker that died has none."""
    for name, count in getattr(node, "workeroutput", {}).get(_WORKERS, {}).items():
        add(name, count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the line."""
    if said := line():
        terminalreporter.section("counted")
        terminalreporter.line(said)
