"""Who dies at a step of a worker: the worker alone, or its daemon while the worker is there."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

WORKER, DAEMON = "kill", "kill-parent"  # the parent of a worker is the daemon


def by_turns(points: Iterable[str], in_daemon: Collection[str] = ()) -> list[Any]:
    """Pairs of point and action: `make test` kills at every point, one way or the other; `make test-faults` the rest.

    At a point that the daemon reaches only it can die: its own parent is the supervisor, another test's matter.
    """
    found: list[Any] = []
    turn = 0
    for point in points:
        if point in in_daemon:
            found.append((point, "kill"))
            continue
        now, later = (WORKER, DAEMON) if turn % 2 == 0 else (DAEMON, WORKER)
        found += [(point, now), pytest.param(point, later, marks=pytest.mark.faults)]
        turn += 1
    return found
