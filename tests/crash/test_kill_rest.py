"""The daemon is killed while the rest of a large plan is carried out: it goes on by itself, and nothing goes that was kept."""

import zlib
from collections.abc import Iterator

import pytest

from tests.support import invariants, tally
from tests.support.node import eventually
from tests.support.onlooker import Onlooker, end, make
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("kill_rest")]

SAVES = 46  # a save's job retires 20 of them, its rest 25 in two transactions
RULES = """
[retention]
keep_last = 1
brake_count_min = 1000
"""


def follow(node: Onlooker, rules: str) -> None:
    node.configure(more=rules)
    assert node.ask("reload")["ok"]


@pytest.fixture(scope="module")
def node() -> Iterator[Onlooker]:
    made = make().start()
    yield made
    end(made)


# Counted from the save that makes the plan: each of the first three is reached by its own job once, then by the rest.
@pytest.mark.parametrize(
    ("point", "action"),
    [
        ("retain.tombstone:2", "kill"),
        ("catalog.committed:20", "kill"),
        pytest.param("retain.planned:2", "kill", marks=pytest.mark.faults),
        pytest.param("retain.moved:24", "kill", marks=pytest.mark.faults),
        pytest.param("retain.trashed:24", "kill", marks=pytest.mark.faults),
        pytest.param("retain.trashed:30", "kill-parent", marks=pytest.mark.faults),
        *(pytest.param(f"catalog.committed:{n}", "kill", marks=pytest.mark.faults) for n in (14, 16, 18, 22, 24)),
    ],
)
def test_a_large_plan_whose_daemon_dies_is_carried_out_to_its_end_without_another_save(
    node: Onlooker, nursery: Nursery, request: pytest.FixtureRequest, point: str, action: str
) -> None:
    """M097, I4: what was pinned when the plan was made stays, whole; everything else goes, once."""
    node.disarm()
    trainer = nursery.trainer(node.environ)
    trainer.open(name=f"e-{zlib.crc32(request.node.name.encode()):08x}", project="many", dir=str(node.runs))
    follow(node, "")
    ids = [str(trainer.save(seed=step, step=step)["id"]) for step in range(SAVES)]
    for one in ids:
        node.wait_level(one)
    assert node.ask("pin", selector=ids[0])["ok"]
    eventually(lambda: not node.status()["jobs"]["queued"] + node.status()["jobs"]["running"], "the queue to be empty")
    follow(node, RULES)
    node.arm(point, action)
    ids.append(str(trainer.save(seed=SAVES, step=SAVES)["id"]))
    node.wait_fired()
    states: dict[str, str] = {}

    def carried_out() -> bool:
        states.update({one: str((node.row(one) or {}).get("state")) for one in ids if states.get(one) != "dropped"})
        return sum(state in {"trashed", "dropped"} for state in states.values()) == SAVES - 1

    eventually(carried_out, "the plan to be carried out to its end")
    eventually(lambda: not node.status()["jobs"]["queued"] + node.status()["jobs"]["running"], "the queue to be empty")
    assert [one for one in ids if states[one] == "live"] == [ids[0], ids[-1]]
    assert invariants.violations(node) == []
    tally.add("kills")
