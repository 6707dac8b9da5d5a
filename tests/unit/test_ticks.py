"""All who look as often look at the same moment: a node at rest wakes up once for them."""

import anyio
import pytest

from ckptd.clock import to_tick_s


@pytest.mark.parametrize(
    ("now_s", "left_s"),
    [(100.0, 2.0), (100.5, 1.5), (101.7, 0.3), (101.9, 2.1)],  # the last: its timer ended a little early
)
def test_a_tick_is_the_next_whole_multiple(monkeypatch: pytest.MonkeyPatch, now_s: float, left_s: float) -> None:
    monkeypatch.setattr(anyio, "current_time", lambda: now_s)
    assert to_tick_s(2.0) == pytest.approx(left_s)
