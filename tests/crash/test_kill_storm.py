"""Deaths one upon the other, in any order, while several trainers save: nothing is lost, doubled or left in half.

Long forms only. Each prints its seed; the same seed deals the same points, victims and moments.
"""

import os
import random
import time

import pytest

from tests.crash.test_kill_everywhere import AFTER_COMMIT, DAEMON, DROP, EARLY, RETIRE, SPOOLED, WORKER
from tests.support.battlefield import PROJECT, Battlefield, Saved
from tests.support.node import eventually
from tests.support.trainer import Nursery, Trainer

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(3600)]

SEEDS = range(int(os.environ.get("CKPTD_FAULT_SEEDS", "2")))
STORM_S = float(os.environ.get("CKPTD_FAULT_STORM_S", "75"))  # of each seed
ROUNDS = int(os.environ.get("CKPTD_FAULT_KILL_DEATHS", "20"))
IN_WORKER = {point.partition(":")[0] for point in (*WORKER, "retain.trashed", "retain.trash_fsynced", "retain.unlink")}
DECK = sorted({point.partition(":")[0] for point in (*DAEMON, *WORKER, *RETIRE, *DROP, *EARLY, *SPOOLED)})
DECK += ["start.adopted", "start.recovered"]
ARMED = 6  # points at once: a save whose daemon dies more often than that is set aside, and that is right
TRAINERS = 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_storm_of_deaths_leaves_every_save_where_it_belongs(nursery: Nursery, seed: int) -> None:
    """F1, F24, I1-I5, I11: several points are armed at once, so that recoveries are killed as well."""
    dice = random.Random(seed)
    with Battlefield(nursery) as field:
        rounds, begun_s = 0, time.monotonic()
        while time.monotonic() - begun_s < STORM_S:
            one_storm(field, dice)
            field.assert_promises()
            rounds += 1
        print(f"seed {seed}: {rounds} rounds, {dict(field.kills)} in {time.monotonic() - begun_s:.0f} s")


def one_storm(field: Battlefield, dice: random.Random) -> None:
    """Arm a handful of points, let a few trainers save under them, and see everything arrive."""
    kinds = [dice.choice(["plain", "retired", "dropped"]) for _ in range(TRAINERS)]
    trainers = [field.ready_trainer(kind) if dice.random() < 0.7 else field.trainer(kind) for kind in kinds]
    armed = dict.fromkeys(dice.sample(DECK, ARMED), "")
    for point in armed:
        armed[point] = dice.choice(["kill", "kill-parent"]) if point in IN_WORKER else "kill"
    entries = [f"{point}:{dice.randint(1, 3)}={action}" for point, action in armed.items()]
    field.plan_deaths(entries)
    saves: dict[str, list[Saved]] = {name: [] for _, name in trainers}
    for step in range(1, dice.randint(2, 4)):
        for trainer, name in trainers:
            how = {"on_overlap": "spool"} if dice.random() < 0.2 else {}
            saves[name].append(field.save(trainer, step, **how))
    for trainer, name in trainers:
        trainer.flush()
        for saved in saves[name]:
            eventually(lambda of=saved.id: reached(field, of), f"{saved.id} of {name} to be verified")  # type: ignore[misc]
    for point in armed.keys() - field.still_planned():
        field.kills["worker" if point in IN_WORKER and armed[point] == "kill" else "daemon"] += 1
    field.plan_deaths([])
    field.node.wait_idle()
    for trainer, name in trainers:
        last = saves[name][-1]
        assert trainer.load(selector="latest", seed=last.seed)["same"]
        trainer.end()
        for saved in saves[name]:
            field.acknowledged[saved.id] = "verified"
    field.assert_memory_returned()


def reached(field: Battlefield, checkpoint: str) -> bool:
    """Whether a save was verified, also when it has been retired since. AssertionError when it failed."""
    row = field.node.row(checkpoint)
    if row is None:
        return False
    assert row["state"] in {"pending", "live", "trashed", "dropped"}, row
    return bool(row["level"] == "verified")


@pytest.mark.parametrize("seed", SEEDS)
def test_random_deaths_in_any_order_lose_and_double_nothing(nursery: Nursery, seed: int) -> None:
    """F1, F2: each round arms a point or picks a moment, kills one or several, and saves under it."""
    dice = random.Random(seed)
    points = [point.partition(":")[0] for point in (*DAEMON, *WORKER)]
    print(f"seed {seed}, {ROUNDS} rounds")
    with Battlefield(nursery) as field:
        for _ in range(ROUNDS):
            one_random_death(field, dice, points)
            field.assert_promises()


def last_save(field: Battlefield, trainer: Trainer, name: str, step: int, moment: str) -> Saved | None:
    """Let a trainer die of a save; None when it had no arena, and so nobody to leave it to (P1)."""
    seed = field.seed()
    trainer.begin("save", seed=seed, step=step, die=moment)
    words = trainer.answer()
    trainer.wait_dead()
    field.kills["trainer"] += 1
    if not words["in_arena"]:
        return None
    rows = eventually(
        lambda: [r for r in field.node.rows(PROJECT, name) if r["step"] == step], f"step {step} of {name}"
    )
    return Saved(rows[0]["checkpoint"], seed, step)


def one_random_death(field: Battlefield, dice: random.Random, points: list[str]) -> None:
    """One round of the long form, in an experiment of its own."""
    trainer, name = field.ready_trainer("random") if dice.random() < 0.8 else field.trainer("random")
    point = f"{dice.choice(points)}:{dice.randint(1, 4)}"
    action = dice.choice(["kill", "kill", "kill-parent" if point.partition(":")[0] in IN_WORKER else "kill"])
    field.node.arm(point, action)
    saves = []
    for step in range(1, dice.randint(1, 3)):
        saves.append(field.save(trainer, step))
        if dice.random() < 0.3:
            time.sleep(dice.random() * 0.1)
            field.node.kill_daemon()
            field.kills["daemon"] += 1
    perhaps_step = None
    if dice.random() < 0.5:
        last = last_save(field, trainer, name, len(saves) + 1, dice.choice(AFTER_COMMIT))
        if last is None:
            perhaps_step = len(saves) + 1
        else:
            saves.append(last)
    else:
        trainer.flush()
    for saved in saves:
        field.node.wait_level(saved.id)
    if field.node.disarm():
        field.kills["daemon" if action == "kill-parent" or point.partition(":")[0] not in IN_WORKER else "worker"] += 1
    field.assert_arrived(name, *saves, perhaps_step=perhaps_step)
    trainer.end()
    field.assert_memory_returned()
