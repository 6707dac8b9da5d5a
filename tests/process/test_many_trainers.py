"""32 trainers at once on one node: no row lost, doubled or out of order, no lease forgotten, and the loop never hangs.

A trainer is an Experiment with a connection, arenas and threads of its own; four of them share a process
(8 processes x 4 threads), for 32 Python interpreters would measure this machine's memory, not ckptd.
"""

import os
import threading
import time
from collections import Counter
from typing import Any

import pytest

from tests.support.node import Node, eventually
from tests.support.trainer import Nursery

PROJECT = "many"
PROCESSES, THREADS = 8, 4
LAG_S_MAX = 5.0


def stream(
    node: Node, nursery: Nursery, saves: int, patience_s: float
) -> tuple[dict[str, list[list[Any]]], list[float]]:
    """Let every trainer save `saves` times as fast as it is let; return what each was told, and how long answers took."""
    trainers = [nursery.trainer(node.environ) for _ in range(PROCESSES)]
    over = threading.Event()
    asked = [0.0]

    def ask() -> None:
        while not over.wait(0.5):
            begun_s = time.monotonic()
            node.ask("list", project=PROJECT, limit=1)
            asked.append(time.monotonic() - begun_s)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for number, trainer in enumerate(trainers):
            places = {"project": PROJECT, "directory": str(node.runs), "first": THREADS * number}
            trainer.begin("stream", threads=THREADS, saves=saves, **places)
        made: dict[str, list[list[Any]]] = {}
        for trainer in trainers:
            made.update(trainer.answer(patience_s)["saves"])
    finally:
        over.set()
        asking.join()
    for trainer in trainers:
        trainer.quit()
    return made, sorted(asked)


def assert_all_there(node: Node, made: dict[str, list[list[Any]]], saves: int) -> None:
    """Each save is one row, verified, under its own name, in the order in which its trainer made them."""
    rows = node.rows(PROJECT)
    assert len(rows) == len(made) * saves
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["sequence"]):
        by_name.setdefault(row["name"], []).append(row)
    assert by_name.keys() == made.keys()
    for name, told in made.items():
        mine = by_name[name]
        assert [[row["checkpoint"], row["step"]] for row in mine] == [[each[0], each[1]] for each in told]
        assert [row["step"] for row in mine] == list(range(saves))
        assert {(row["state"], row["level"]) for row in mine} == {("live", "verified")}
        directory = node.runs / PROJECT / name
        found = sorted(entry.name for entry in directory.iterdir() if not entry.is_symlink())
        assert found == [f"step_{step:010d}" for step in range(saves)]
        assert os.readlink(directory / "latest") == f"step_{saves - 1:010d}"
    events = node.events()
    published: dict[str, list[int]] = {}
    for event in events:
        if event["event"] == "checkpoint.published":
            published.setdefault(event["name"], []).append(event["step"])
    assert published == {name: list(range(saves)) for name in made}, "published out of order"
    told_once = Counter((event["event"], event["checkpoint"]) for event in events if event["checkpoint"])
    for kind in ("checkpoint.staged", "checkpoint.published", "checkpoint.verified"):
        assert [told_once[kind, row["checkpoint"]] for row in rows] == [1] * len(rows), kind


def train(node: Node, nursery: Nursery, saves: int, patience_s: float) -> None:
    """The whole test, for so many saves each."""
    node.start()
    begun_s = time.monotonic()
    made, answers_s = stream(node, nursery, saves, patience_s)
    streamed_s = time.monotonic() - begun_s
    eventually(lambda: not any(node.status()["jobs"].values()), "every job to end", patience_s)
    total_s = time.monotonic() - begun_s
    count = len(made) * saves
    print(
        f"{len(made)} trainers x {saves} saves: {streamed_s:.1f} s to hand off, {total_s:.1f} s until all are verified"
    )
    print(f"{count / total_s:.0f} checkpoints per second; slowest answer beside them {answers_s[-1] * 1e3:.0f} ms")
    assert len(made) == PROCESSES * THREADS
    assert answers_s[-1 - len(answers_s) // 10] < LAG_S_MAX, answers_s  # a busy machine may hold up one of ten
    assert_all_there(node, made, saves)
    now = node.wait_idle()
    assert now["arenas"]["leased"] == 0
    assert {e["status"] for e in node.ask("experiments", project=PROJECT, limit=100)["experiments"]} == {"completed"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("alone-many")
def test_thirty_two_trainers_lose_double_and_misorder_nothing(node: Node, plain_nursery: Nursery) -> None:
    """M017, with a twentieth of its saves: what fits into every commit's minutes."""
    train(node, plain_nursery, saves=5, patience_s=400.0)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_thirty_two_trainers_and_a_hundred_saves_each(node: Node, plain_nursery: Nursery) -> None:
    """M017 in full."""
    train(node, plain_nursery, saves=100, patience_s=600.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_trainers_and_a_daemon_that_dies_under_them(node: Node, plain_nursery: Nursery) -> None:
    """M017 and F1 together: three daemons die by SIGKILL while 32 trainers save; every save is there once, in order."""
    node.start()
    saves = 4
    over = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while len(killed) < 3 and not over.wait(1.0):
            killed.append(node.kill_daemon())

    killing = threading.Thread(target=kill)
    killing.start()
    try:
        trainers = [plain_nursery.trainer(node.environ) for _ in range(PROCESSES)]
        for number, trainer in enumerate(trainers):
            places = {"project": PROJECT, "directory": str(node.runs), "first": THREADS * number}
            trainer.begin("stream", threads=THREADS, saves=saves, **places)
        made: dict[str, list[list[Any]]] = {}
        for trainer in trainers:
            made.update(trainer.answer(400.0)["saves"])
    finally:
        over.set()
        killing.join()
    for trainer in trainers:
        trainer.quit()
    assert killed
    node.wait_idle(patience_s=400.0)
    rows = node.rows(PROJECT)
    assert sorted(row["checkpoint"] for row in rows) == sorted(each[0] for told in made.values() for each in told)
    assert {(row["state"], row["level"]) for row in rows} == {("live", "verified")}
    for name, told in made.items():
        mine = [row for row in rows if row["name"] == name]
        assert [[row["checkpoint"], row["step"]] for row in mine] == [[each[0], each[1]] for each in told]
