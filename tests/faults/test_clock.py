"""A wall clock that is set while a node runs: nothing is deleted early or kept for ever, and order is by sequence. F11"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node import Node, eventually
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(180)]
LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
)
RULES = """
[[experiments]]
project = "clock"
keep_last = 2
trash_grace_s = 3600
"""


@pytest.fixture
def wall(node: Node, short_dir: Path) -> Iterator[Path]:
    """The file that says what the node's wall clock shows; its monotonic clock and its files' times are the kernel's."""
    library = next((path for path in LIBRARIES if Path(path).exists()), None)
    if library is None:
        pytest.skip("no libfaketime")
    told = short_dir / "wall"
    told.write_text("+0")
    settings = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(told),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }
    node.prefix = ("env", *(f"{name}={value}" for name, value in settings.items()))
    node.more = RULES
    yield told
    node.clean_up()


@pytest.mark.parametrize(
    "setting",
    ["+86400", "-3600", "1970"],
)
def test_a_clock_that_is_set_deletes_nothing_early_and_keeps_the_order(
    node: Node, plain_nursery: Nursery, wall: Path, setting: str
) -> None:
    """F11. The trash keeps its hour, a restart with the new clock included; steps stay in their order; saves go on.

    The trainer's own clock goes on as it was. So for a daemon whose clock was set back all of them were saved in
    the future: they stay until that time has come.
    """
    future = () if setting.startswith("+") else (2, 3, 4)
    node.start()
    trainer = plain_nursery.trainer(node.environ)
    trainer.open(name="run", project="clock", dir=str(node.runs))
    for step in range(1, 4):
        node.wait_level(trainer.save(seed=step, step=step)["id"])
    eventually(lambda: len(trash(node)) == 1, "the first to be retired")
    (kept,) = trash(node)
    year_s = 365.25 * 86_400
    wall.write_text(f"-{56 * year_s:.0f}" if setting == "1970" else setting)
    for step in range(4, 7):
        node.wait_level(trainer.save(seed=step, step=step)["id"])
    eventually(lambda: node.said("clock.stepped"), "the step to be noticed")
    eventually(
        lambda: len(trash(node)) == 4 - len(future),
        "every one but the newest two and those of the future to be retired",
    )
    assert kept in trash(node), "unlinked before its hour was over"
    rows = node.rows("clock", "run")
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert [row["step"] for row in rows if row["state"] == "live"] == [*future, 5, 6]
    for step in future:
        said = node.ask("retention.explain", selector=f"clock/run@step:{step}")
        assert (said["verdict"], said["why"]) == ("keep", ["saved in the future: a clock is wrong"])
    assert node.ask("show", selector="clock/run")["checkpoint"]["step"] == 6
    assert node.stop() == 0
    node.start()
    eventually(lambda: node.said("daemon.ready")[1:], "the next daemon")
    node.wait_idle()
    assert kept in trash(node), "unlinked by the next daemon"


def trash(node: Node) -> list[str]:
    """What lies in the trash of the trainer's root."""
    return sorted(path.name for path in (node.runs / ".ckptd-trash").glob("*"))
