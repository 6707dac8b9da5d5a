"""The checker that every crash test trusts finds each kind of violation, and nothing where nothing is wrong."""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd_client import control
from tests.support import invariants
from tests.support.invariants import Arena, View
from tests.support.node import Node
from tests.support.trainer import Nursery, Trainer

pytestmark = pytest.mark.slow

DEAD = 2**22 - 1  # no process has it: pid_max is at most 2^22


@pytest.fixture(scope="module")
def kept() -> Iterator[tuple[Node, View]]:
    """A node that saved three times and ended, and what its disk says."""
    directory = Path(tempfile.mkdtemp(prefix="ck"))
    node = Node(directory)
    try:
        node.start()
        with Nursery(directory) as nursery:
            three_saves(node, nursery.trainer(node.environ))
        assert invariants.violations(node) == []
    finally:
        node.clean_up()
    yield node, invariants.of_disk(node.state, grace_s=0.0)
    node.remove()


def three_saves(node: Node, trainer: Trainer) -> None:
    trainer.open(name="run", project="p", dir=str(node.runs))
    for number in (1, 2, 3):
        node.wait_level(trainer.save(seed=number, step=number)["id"])
    trainer.end()
    node.wait_idle()


def newest(view: View) -> dict[str, Any]:
    """The row of the last save."""
    return list(view.rows.values())[-1]


def step(node: Node, number: int) -> Path:
    return node.runs / "p" / "run" / f"step_{number:010d}"


# Each spoils a copy of the view; what was wrong must be named by the invariant.
def retire_all(view: View) -> None:
    for row in view.rows.values():
        row.update(state="trashed", trashed_at=1)


def retire_the_newest(view: View) -> None:
    newest(view).update(state="trashed", trashed_at=1)


def retire_a_pinned_one(view: View) -> None:
    row = next(iter(view.rows.values()))
    row.update(state="trashed", trashed_at=1)
    view.held[row["sequence"]] = "pin"


def take_a_level_back(view: View) -> None:
    newest(view).update(level="durable")


def forget_a_job(view: View) -> None:
    newest(view).update(state="pending")
    view.jobs[newest(view)["id"]] = ["done"]


def lose_the_memory(view: View) -> None:
    newest(view).update(state="pending")
    view.jobs[newest(view)["id"]] = ["queued"]
    object.__setattr__(view, "arenas", [])


def tell_twice(view: View) -> None:
    view.events[newest(view)["id"]].append("checkpoint.published")


def say_another_step(view: View) -> None:
    newest(view)["step"] = 17


def forget_a_row(view: View) -> None:
    del view.rows[newest(view)["id"]]


def lend_to_the_dead(view: View) -> None:
    object.__setattr__(view, "arenas", [Arena(1, control.LEASED, DEAD, 1, "")])


def keep_memory_apart(view: View) -> None:
    view.unowned.add(7)


@pytest.mark.parametrize(
    ("spoil", "invariant"),
    [
        (take_a_level_back, "I1"), (forget_a_job, "I1"), (lose_the_memory, "I1"), (tell_twice, "I1"),
        (retire_all, "I3"), (retire_the_newest, "I4"), (retire_a_pinned_one, "I4"),
        (say_another_step, "I5"), (forget_a_row, "I5"), (lend_to_the_dead, "I11"), (keep_memory_apart, "I11"),
    ],
)  # fmt: skip
def test_a_row_or_an_arena_that_breaks_a_promise_is_named(
    kept: tuple[Node, View], spoil: Callable[[View], None], invariant: str
) -> None:
    view = dataclasses.replace(copy.deepcopy(kept[1]))
    assert invariants.examine(view) == []
    spoil(view)
    assert any(each.startswith(f"{invariant}:") for each in invariants.examine(view)), invariants.examine(view)


def test_a_rung_that_was_told_and_is_not_there_is_named(kept: tuple[Node, View]) -> None:
    node, view = kept
    known = newest(view)["id"]
    assert invariants.examine(view, {known: "verified"}) == []
    assert invariants.examine(view, {known: "tiered"})
    assert invariants.examine(view, {"f" * 32: "staged"})
    assert node.state.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no manifest"])
def test_a_damaged_file_under_a_final_name_is_named(kept: tuple[Node, View], damage: str) -> None:
    node, view = kept
    path = step(node, 2) / ("manifest.json" if damage == "no manifest" else "model.safetensors")
    before = path.read_bytes()
    if damage == "flip":
        path.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
    elif damage == "cut":
        path.write_bytes(before[:-1])
    else:
        path.unlink()
    found = invariants.examine(view)
    path.write_bytes(before)
    invariants.digest.cache_clear()  # by size and times, whose ticks are milliseconds on older kernels
    assert any(each.startswith("I2:") for each in found)
    assert damage == "no manifest" or any(each.startswith("I1:") for each in found)
    assert invariants.examine(view) == []


@pytest.mark.parametrize(
    ("name", "invariant"),
    [("p/run/step_0000000009", "I2"), ("p/run/.x.ckptd-tmp-1", "I11"), (".ckptd-trash/" + "f" * 32, "I4")],
)
def test_a_directory_that_nobody_answers_for_is_named(kept: tuple[Node, View], name: str, invariant: str) -> None:
    node, view = kept
    (node.runs / name).mkdir(parents=True)
    found = invariants.examine(view)
    (node.runs / name).rmdir()
    assert any(each.startswith(f"{invariant}:") for each in found), found


def test_a_half_image_of_a_dead_process_is_named(kept: tuple[Node, View]) -> None:
    node, view = kept
    left = node.spool / f"{'a' * 32}.arena.tmp-{DEAD}"
    left.write_bytes(b"")
    found = invariants.examine(view)
    left.unlink()
    assert any(each.startswith("I11:") for each in found)
