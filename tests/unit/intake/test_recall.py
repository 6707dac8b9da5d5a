"""Answers that are remembered are those that would be read now, whatever was written in between (M086, M133)."""

import os
import random
from datetime import timedelta
from types import SimpleNamespace

from ckptd.catalog import checkpoints, experiments, holds, metrics
from ckptd.catalog.metrics import Point
from ckptd.config import Catalog, Settings
from ckptd.intake import requests as ask
from ckptd.intake.control import Control
from ckptd.intake.recall import Recall
from tests.support.catalog import StillClock, a_checkpoint, climb, experiment, opened

PEER = SimpleNamespace(uid=os.getuid(), pid=1)
OPERATIONS = 120
HOT: set[str] = set()


def controls(catalog, clock) -> tuple[Control, Control]:
    """One that remembers, and one that reads each time."""
    pool = SimpleNamespace(of_checkpoint=lambda one: object() if one in HOT else None)
    front = SimpleNamespace(catalog=catalog, clock=clock, pool=pool, settings=Settings, followers=None)
    remembering, reading = Control(front), Control(front)
    reading.recall = Recall(catalog, clock, Catalog(answers_bytes_max=0))
    return remembering, reading


REQUESTS = (
    ask.List(id=1),
    ask.List(id=2, sort="step", limit=3),
    ask.List(id=3, state="all", project="demo"),
    ask.Experiments(id=4),
    ask.Summary(id=5),
    ask.Show(id=6, project="demo", name="run0"),
)


async def answer(control: Control, request):
    return await control.handlers[type(request)](PEER, request)


async def test_no_answer_is_older_than_the_last_write(tmp_path):
    """M086: every write there is, in random order, and after each of them every answer is that of a fresh read."""
    HOT.clear()
    dice, clock = random.Random(8), StillClock()
    async with opened(tmp_path / "catalog.sqlite", clock=clock) as catalog:
        runs = [await experiment(catalog, f"run{n}") for n in range(3)]
        known = [(await catalog.write(lambda tx: climb(tx, a_checkpoint(runs[0], 0)))).id]
        remembering, reading = controls(catalog, clock)

        async def add(tx):
            known.append((await climb(tx, a_checkpoint(dice.choice(runs), len(known)))).id)

        async def log_points(tx):
            await metrics.append(tx, runs[0], 1, [Point("loss", clock.mono_s.__int__(), 0.5, clock.now())])

        writes = [
            add,
            log_points,
            lambda tx: holds.pin(tx, dice.choice(known), 1, f"note {dice.random()}"),
            lambda tx: holds.unpin(tx, dice.choice(known), 1),
            lambda tx: holds.lease(tx, dice.choice(known), "pid 1", dice.choice((5.0, 500.0))),
            lambda tx: experiments.heartbeat(tx, dice.choice(runs), dice.randrange(1000)),
            lambda tx: experiments.change_tags(tx, dice.choice(runs), [f"tag{dice.randrange(9)}"], []),
            lambda tx: checkpoints.add_metrics(tx, dice.choice(known), {"loss": dice.random()}),
        ]
        for _ in range(OPERATIONS):
            clock.pass_s(dice.choice((0.0, 1.0, 10.0)))
            if dice.random() < 0.3:
                await catalog.write(dice.choice(writes))
            one = dice.choice(known)
            HOT.symmetric_difference_update({one} if dice.random() < 0.2 else ())
            request = dice.choice(REQUESTS)
            assert await answer(remembering, request) == await answer(reading, request)
        kept = remembering.recall.answers
        assert kept.hits > OPERATIONS / 10
        assert reading.recall.answers.hits == 0


async def test_what_trainers_log_all_the_time_ends_no_list(tmp_path):
    """A metric point and a heartbeat change nothing that a list of checkpoints shows; a pin does."""
    clock = StillClock()
    async with opened(tmp_path / "catalog.sqlite", clock=clock) as catalog:
        run = await experiment(catalog)
        row = await catalog.write(lambda tx: climb(tx, a_checkpoint(run, 1)))
        control, _ = controls(catalog, clock)
        await answer(control, REQUESTS[0])
        await catalog.write(lambda tx: metrics.append(tx, run, 1, [Point("loss", 1, 0.5, clock.now())]))
        await catalog.write(lambda tx: experiments.heartbeat(tx, run, 5))
        await answer(control, REQUESTS[0])
        assert (control.recall.answers.hits, control.recall.answers.misses) == (1, 1)
        await catalog.write(lambda tx: holds.pin(tx, row.id, 1))
        assert (await answer(control, REQUESTS[0]))["checkpoints"][0]["holds"] == ["latest", "pin"]


async def test_a_readers_hold_ends_in_answers_when_it_ends(tmp_path):
    """Nothing is written when a lease expires: the answer that shows it must not outlive it."""
    clock = StillClock()
    async with opened(tmp_path / "catalog.sqlite", clock=clock) as catalog:
        run = await experiment(catalog)
        row = await catalog.write(lambda tx: climb(tx, a_checkpoint(run, 1)))
        await catalog.write(lambda tx: holds.lease(tx, row.id, "pid 1", 20.0))
        control, _ = controls(catalog, clock)
        shown = [await answer(control, REQUESTS[0]) for _ in range(2)]
        assert [one["checkpoints"][0]["holds"] for one in shown] == [["latest", "lease"]] * 2
        assert control.recall.answers.hits == 1
        clock.pass_s(20.0)
        assert (await answer(control, REQUESTS[0]))["checkpoints"][0]["holds"] == ["latest"]


async def test_an_answer_may_be_changed_by_whoever_got_it(tmp_path):
    clock = StillClock()
    async with opened(tmp_path / "catalog.sqlite", clock=clock) as catalog:
        await experiment(catalog)
        control, _ = controls(catalog, clock)
        first = await answer(control, ask.Experiments(id=1))
        first["experiments"].clear()
        assert len((await answer(control, ask.Experiments(id=2)))["experiments"]) == 1


async def test_one_users_answer_is_not_anothers(tmp_path, monkeypatch):
    clock = StillClock()
    monkeypatch.setattr("ckptd.intake.follow.os.getuid", lambda: 0)
    async with opened(tmp_path / "catalog.sqlite", clock=clock) as catalog:
        await experiment(catalog, uid=1000)
        control, _ = controls(catalog, clock)
        all_of_them = ask.Experiments(id=1)
        for uid, count in ((1000, 1), (1001, 0), (0, 1), (1001, 0)):
            peer = SimpleNamespace(uid=uid, pid=1)
            assert len((await control.page_experiments(peer, all_of_them))["experiments"]) == count


def test_an_answers_own_end_is_the_first_of_what_it_shows():
    from ckptd.intake.recall import Expiry

    now, expiry = StillClock().now(), Expiry()
    expiry.add([None, now + timedelta(seconds=9)])
    expiry.add([])
    expiry.add([now + timedelta(seconds=4), None])
    assert expiry.until == now + timedelta(seconds=4)
