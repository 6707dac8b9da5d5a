"""One catalog per test, on a real file."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ckptd.catalog import Catalog
from tests.support.catalog import StillClock, Told, opened


@pytest.fixture
def clock() -> StillClock:
    return StillClock()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def catalog(tmp_path: Path, told: Told, clock: StillClock) -> AsyncIterator[Catalog]:
    async with opened(tmp_path / "catalog.sqlite", told, clock) as found:
        yield found
