"""What tests with a daemon of their own ask for."""

import pytest

from ckptd import pipeline
from ckptd.pipeline import upkeep


@pytest.fixture
def still_upkeep(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its first look the daemon moves, purges and tries nothing by itself: what is seen is the test's own doing.

    On a slow machine a test lasts as long as the pauses between those looks.
    """
    for module, pause in ((upkeep, "MOVE_S"), (upkeep, "PURGE_S"), (pipeline, "PARKED_FIRST_S")):
        monkeypatch.setattr(module, pause, 3600.0)
