"""The rest of a large plan: carried out beside the saves, once begun to its end, whatever comes meanwhile."""

from typing import Any

import pytest

from ckptd.catalog import checkpoints, eventlog, queue
from ckptd.errors import RootDegraded
from ckptd.model import JobState, State
from ckptd.pipeline import link, rest, retain
from tests.support.in_process import Training, daemon, eventually

GONE = {State.TRASHED, State.DROPPED}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(retain, "TOMBSTONES_MAX", 2)
    monkeypatch.setattr(rest, "AT_ONCE", 3)
    monkeypatch.setattr(rest, "LOOK_S", 0.1)


def follow(node, **rules: Any) -> None:
    """Have these rules hold from now on, unbraked."""
    found = type(node.parts.settings.retention)(brake_count_min=1000, **rules)
    node.parts.admission.current = node.parts.settings.model_copy(update={"retention": found})


async def stay(node, ids: list[str]) -> list[int]:
    """Return the steps of those that are neither in the trash nor gone."""
    rows = await node.read(lambda conn: checkpoints.get_many(conn, ids))
    return [rows[one].step for one in ids if rows[one].state not in GONE]


async def ended(node) -> None:
    async def done() -> bool:
        return not await node.parts.jobs.unfinished()

    await eventually(done)


async def saves(node, line, count: int, name: str = "run", **more: Any) -> tuple[Training, list[str]]:
    """Open an experiment, save in it under rules that keep all, and wait until nothing is left to do."""
    follow(node)
    training = await Training(line, str(node.runs), name=name).open()
    ids = [await training.saved(step, **more) for step in range(1, count + 1)]
    await ended(node)
    return training, ids


async def retired(node) -> list[int]:
    """Return how many each part of a plan retired, in order."""
    logged = await node.read(eventlog.page)
    return [one.event.data["retired"] for one in logged if one.event.name == "retention.applied"]


async def test_what_a_save_leaves_over_of_a_large_plan_is_retired_in_parts_beside_the_saves(short_dir):
    """M097: the save's own job retires the oldest only, so the next save waits for no more than that."""
    async with daemon(short_dir) as node, node.connect() as line:
        training, ids = await saves(node, line, 9)
        follow(node, keep_last=2)
        ids.append(await training.saved(10))
        await ended(node)
        assert (await stay(node, ids), await retired(node)) == ([9, 10], [2, 3, 3])


async def test_an_objection_to_the_oldest_keeps_nothing_behind_them_and_is_asked_for_once(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        training, ids = await saves(node, line, 10)
        asked = []

        async def objects(_tools, rows, _why):
            asked.append([row.step for row in rows])
            return {row.id: "a hook wants it" for row in rows if row.step in {1, 2, 3, 4, 7}}

        monkeypatch.setattr(retain.asking, "about_each", objects)
        follow(node, keep_last=1)
        ids.append(await training.saved(11))
        await ended(node)
        assert await stay(node, ids) == [1, 2, 3, 4, 7, 11]
        assert asked == [[2, 1], [3, 2, 1], [6, 5, 4], [9, 8, 7], [10]]


async def test_a_save_while_the_rest_is_on_its_way_makes_no_plan_of_its_own_and_is_seen_to_afterwards(
    short_dir, monkeypatch
):
    async with daemon(short_dir) as node, node.connect() as line:
        training, ids = await saves(node, line, 9)
        real, by, holding = retain.carry_out, [], True

        async def told(tools, experiment, rules, wanted):
            by.append("rest" if wanted.at_once == rest.AT_ONCE else "save")
            if by[-1] == "rest" and holding:
                raise RootDegraded("hangs")
            return await real(tools, experiment, rules, wanted)

        monkeypatch.setattr(retain, "carry_out", told)
        follow(node, keep_last=2)
        ids.append(await training.saved(10))
        await eventually(lambda: "rest" in by)
        ids += [await training.saved(step) for step in (11, 12)]

        async def only_rests() -> bool:
            return {job.stage for job in await node.parts.jobs.unfinished()} == {"rest"}

        await eventually(only_rests)
        assert (by.count("save"), await stay(node, ids)) == (1, list(range(3, 13)))
        holding = False
        lane = retain.rest_lane((await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id)
        await node.parts.catalog.write(lambda tx: node.parts.jobs.wake(tx, lane=lane))
        await ended(node)
        assert (by.count("save"), await stay(node, ids)) == (1, [11, 12])


async def test_a_rest_that_was_parked_gives_way_to_the_next_one(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        training, ids = await saves(node, line, 6)
        real = rest._carry_on

        async def breaks(*_given):
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(rest, "_carry_on", breaks)
        follow(node, keep_last=1)
        ids.append(await training.saved(7))

        async def parked() -> bool:
            return [job.state for job in await node.parts.jobs.unfinished()] == [JobState.PARKED]

        await eventually(parked)
        monkeypatch.setattr(rest, "_carry_on", real)
        ids.append(await training.saved(8))
        await ended(node)
        assert await stay(node, ids) == [8]


async def test_rests_of_two_experiments_come_one_after_the_other_and_both_to_their_end(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        one, first = await saves(node, line, 8, name="one")
        two, second = await saves(node, line, 8, name="two")
        real, side_by_side, at_once = rest._carry_on, 0, []

        async def counted(*given):
            nonlocal side_by_side
            side_by_side += 1
            at_once.append(side_by_side)
            try:
                return await real(*given)
            finally:
                side_by_side -= 1

        monkeypatch.setattr(rest, "_carry_on", counted)
        follow(node, keep_last=1)
        first.append(await one.saved(9))
        second.append(await two.saved(9))
        await ended(node)
        assert (await stay(node, first), await stay(node, second), set(at_once)) == ([9], [9], {1})


async def test_links_are_brought_up_to_date_before_the_rest_retires_what_they_led_to(short_dir, monkeypatch):
    """A metric may have come between the save and its plan's rest: no link may be left dangling."""
    async with daemon(short_dir) as node, node.connect() as line:
        training, ids = await saves(node, line, 8, metrics={"loss": 1.0})
        order, placing, carrying = [], link.place, retain.carry_out

        async def placed(*given):
            order.append("placed")
            return await placing(*given)

        async def carried(tools, experiment, rules, wanted):
            order.append(("carried", tuple(wanted.linked)))
            return await carrying(tools, experiment, rules, wanted)

        monkeypatch.setattr(link, "place", placed)
        monkeypatch.setattr(retain, "carry_out", carried)
        follow(node, keep_last=2, keep_best={"metric": "loss", "mode": "min"})
        ids.append(await training.saved(9, metrics={"loss": 0.5}))
        await ended(node)
        assert await stay(node, ids) == [8, 9]
        assert [one if one == "placed" else one[0] for one in order[-4:]] == ["placed", "carried"] * 2
        assert all(ids[8] in one[1] for one in order[-4:] if one != "placed")


async def test_a_rest_that_waits_for_another_takes_no_slot_and_ends_when_the_rules_delete_nothing_any_more(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        training, ids = await saves(node, line, 8)
        await node.parts.tools.resting.acquire()
        follow(node, keep_last=1)
        ids.append(await training.saved(9))

        async def comes_back() -> bool:
            lane = retain.rest_lane((await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id)
            jobs = await node.read(lambda conn: queue.in_lane(conn, lane))
            assert not any(job.can_wait for job in jobs), "files must not stand before it: no save plans meanwhile"
            return any(job.claim > 1 for job in jobs)

        await eventually(comes_back)
        follow(node)
        node.parts.tools.resting.release()
        await ended(node)
        assert await stay(node, ids) == [3, 4, 5, 6, 7, 8, 9]
