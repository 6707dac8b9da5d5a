"""Disks that the crash suites share: making one costs more than cutting its power ten times."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.disk import Disk


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Disk]]:
    """Return the module's disk of a kind: disks("xfs"). Skips where there can be none."""
    made: dict[str, Disk] = {}
    home: Path = tmp_path_factory.mktemp("disks")

    def disk(kind: str) -> Disk:
        if kind not in made:
            made[kind] = Disk(home / kind, kind)
        return made[kind]

    yield disk
    for each in made.values():
        each.give_back()
