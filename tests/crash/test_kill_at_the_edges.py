"""Deaths outside of a save's way: at the start, at a reload, at the stop, and while foreign files are taken in."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import invariants, payload, tally
from tests.support.battlefield import PROJECT, Battlefield
from tests.support.node import Node, eventually
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

START = ["start.adopted", "start.recovered"]
HOOKS = ["hook.delivered", "hook.recorded"]
LEDGER = """\
#!/bin/sh
body=$(tr -d '\\n')
printf '%s\\n' "$body" >> '{path}'
"""
POINTS = (*START, *HOOKS, "reload.applied", "digest.fsynced", "stop.draining", "stop.spilled")


@pytest.fixture(scope="module")
def shared(nurseries: dict[bool, Nursery]) -> Iterator[list[Battlefield]]:
    made: list[Battlefield] = []
    yield made
    for field in made:
        field.__exit__(None, None, None)


@pytest.fixture
def field(shared: list[Battlefield], nursery: Nursery) -> Iterator[Battlefield]:
    if not shared:
        shared.append(Battlefield(nursery).__enter__())
    yield shared[0]
    print(shared[0].node.tail())
    shared[0].assert_promises()


@pytest.mark.parametrize("point", START)
def test_a_daemon_killed_while_it_starts_leaves_everything_to_the_next(field: Battlefield, point: str) -> None:
    """F1, I1: the first dies with a save in its arena, the second while it takes it over, the third publishes it."""
    trainer, name = field.ready_trainer("start")
    field.node.arm(f"catalog.durable=kill,{point}")
    saved = field.save(trainer)
    field.node.wait_fired()
    field.kills["daemon"] += 2
    field.assert_arrived(name, saved)
    trainer.quit()
    field.assert_memory_returned()


def test_a_daemon_killed_while_it_takes_a_new_configuration_starts_with_it(field: Battlefield) -> None:
    """F1, F28."""
    trainer, name = field.ready_trainer("reload")
    field.node.arm("reload.applied")
    field.node.configure()
    field.node.signal(signal.SIGHUP)
    field.node.wait_fired()
    field.kills["daemon"] += 1
    field.assert_arrived(name, field.save(trainer))
    trainer.quit()


@pytest.mark.parametrize("action", ["kill", "kill-parent"])
def test_foreign_files_are_taken_in_once_whoever_dies_over_them(field: Battlefield, action: str) -> None:
    """F1: the worker, or its daemon, dies with some of them fsynced."""
    place = field.dir / f"foreign-{action}"
    place.mkdir()
    target = place / "model.safetensors"
    target.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    field.node.arm("digest.fsynced", action)
    field.node.ckpt("submit", str(target), "--project", PROJECT, "--experiment", f"foreign-{action}")
    field.node.wait_fired()
    field.kills["worker" if action == "kill" else "daemon"] += 1
    row = field.only_row(f"foreign-{action}")
    field.node.wait_level(row["checkpoint"])
    field.acknowledged[row["checkpoint"]] = "verified"
    assert len(field.node.rows(PROJECT, f"foreign-{action}")) == 1


def saved_and_stopped(node: Node, nursery: Nursery, points: str) -> tuple[dict[str, str], str]:
    """Save one that is durable and one on its way, and stop a daemon that dies of `points`; return what was told."""
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="edge", dir=str(node.runs))
    first = trainer.save(seed=1, step=1)["id"]
    node.wait_level(first)
    node.wait_idle()
    assert trainer.prepare(seed=1)["ready"]
    node.arm(points)
    second = trainer.save(seed=2, step=2)["id"]
    eventually(lambda: node.row(second), "the second to be staged")
    node.stop()
    # The worker may not have come to where it would be held up: then the memory was spilled all the sooner.
    eventually(lambda: re.fullmatch(r"\s*([^,]*=delay:[^,]*)?\s*", node.plan.read_text()), "the daemon to die of it")
    node.disarm()  # else the next daemon's worker would be held up there
    tally.add("kills", 1)
    trainer.end()
    node.start()
    return {first: "verified"}, second


def test_a_daemon_killed_as_it_begins_to_stop_loses_nothing_that_was_staged(node: Node, nursery: Nursery) -> None:
    """F28, I1, I2. The service manager brings what it holds to the spool."""
    told, second = saved_and_stopped(node.start(), nursery, "stop.draining")
    node.wait_level(second)
    assert invariants.violations(node, {**told, second: "verified"}) == []


def test_a_daemon_killed_while_it_spills_leaves_whole_images_to_the_next(short_dir: Path, nursery: Nursery) -> None:
    """F28, I1: what lies in the spool then arrives once, although its memory is gone."""
    node = Node(short_dir, drain_s=0.05, request_s=60.0)
    try:
        told, second = saved_and_stopped(node.start(), nursery, "copy.chunk=delay:60,stop.spilled")
        row = node.wait_level(second)
        payload.check_saved(Path(row["path"]), 2)
        assert invariants.violations(node, {**told, second: "verified"}) == []
        eventually(lambda: not list(node.spool.iterdir()), "the image to go")
    finally:
        print(node.tail())
        node.clean_up()


@pytest.mark.parametrize("point", ["ack.durable", *HOOKS])
def test_a_fact_reaches_its_hook_over_the_death_of_the_daemon(node: Node, nursery: Nursery, point: str) -> None:
    """F1: killed before the delivery it comes after the restart; between delivery and commit it comes again under the
    same key; after the commit it does not.
    """
    told, script = node.dir / "told", node.dir / "ledger"
    script.write_text(LEDGER.format(path=told))
    script.chmod(0o755)
    node.more = f'[[hooks]]\nname = "ledger"\nexec = ["{script}"]\ntimeout_s = 60\nevents = ["checkpoint.published"]\n'
    node.configure()
    node.start()
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="edge", dir=str(node.runs))
    node.arm(point)
    saved = trainer.save(seed=1, step=1)["id"]
    node.wait_fired()
    tally.add("kills", 1)
    node.wait_level(saved)

    def facts() -> list[dict[str, Any]]:
        lines = told.read_text().splitlines(keepends=True) if told.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written

    wanted = 2 if point == "hook.delivered" else 1
    eventually(lambda: len(facts()) >= wanted, f"{wanted} deliveries")
    second = trainer.save(seed=2, step=2)["id"]  # what comes after it is the end of the first's
    eventually(lambda: any(fact["checkpoint_id"] == second for fact in facts()), "the second to be told")
    keys = [fact["key"] for fact in facts() if fact["checkpoint_id"] == saved]
    assert (len(keys), len(set(keys))) == (wanted, 1)
    trainer.end()
