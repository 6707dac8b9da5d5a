"""Rules for the best hold from the moment they are given, not from the next save on."""

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest

from ckptd import daemon as composition
from ckptd.catalog import bests, checkpoints
from ckptd.errors import WorkerLost
from ckptd.model import State
from ckptd.pipeline import trash, upkeep, winners
from ckptd.worker.protocol import Purge
from tests.support.in_process import Training, daemon, eventually

BEST = [{"metric": "loss", "mode": "min"}]


async def best_of(node, experiment: str) -> list[str]:
    return [one.checkpoint_id for one in await node.read(lambda conn: bests.current(conn, experiment))]


async def three(node, line) -> tuple[str, list[str]]:
    training = await Training(line, str(node.runs)).open()
    ids = [await training.saved(step, metrics={"loss": loss}) for step, loss in ((1, 0.5), (2, 0.1), (3, 0.9))]
    return training.experiment, ids


async def reload(node, monkeypatch, **retention) -> None:
    """What `ckpt reload` does once the file says so."""
    rules = type(node.parts.settings.retention).model_validate(retention)
    new = node.parts.settings.model_copy(update={"retention": rules})
    monkeypatch.setattr(composition, "_load", lambda _: argparse.Namespace(settings=new))
    await composition._reload(node.parts, argparse.Namespace())


async def test_a_rule_added_by_a_reload_has_its_winner_and_its_link_at_once(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        experiment, ids = await three(node, line)
        assert await best_of(node, experiment) == []
        await reload(node, monkeypatch, keep_best=BEST)
        assert await best_of(node, experiment) == [ids[1]]
        link = node.runs / "demo/run/best"
        await eventually(lambda: link.is_symlink() and os.readlink(link) == "step_0000000002")
        told = [event["event"] for event in (await line.ask("events", limit=100))["events"]]
        assert told.count("best.changed") == 1


async def test_a_rule_taken_away_by_a_reload_holds_nothing_any_more(short_dir, monkeypatch):
    async with daemon(short_dir, retention={"keep_best": BEST}) as node, node.connect() as line:
        experiment, ids = await three(node, line)
        assert await best_of(node, experiment) == [ids[1]]
        await reload(node, monkeypatch)
        assert await best_of(node, experiment) == []


async def test_a_reload_that_leaves_the_rules_alone_looks_at_no_experiment(short_dir, monkeypatch):
    async with daemon(short_dir, retention={"keep_best": BEST}) as node, node.connect() as line:
        await three(node, line)
        monkeypatch.setattr(bests, "current", None)
        await reload(node, monkeypatch, keep_best=BEST, keep_last=7)


async def test_rules_that_changed_while_no_daemon_ran_hold_after_the_start(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        experiment, ids = await three(node, line)
    async with daemon(short_dir, retention={"keep_best": [{**BEST[0], "k": 2}]}) as node:

        async def decided() -> bool:
            return await best_of(node, experiment) == [ids[1], ids[0]]

        await eventually(decided)
        real, writers = node.parts.catalog.write, []

        async def counted(fn):
            writers.append(anyio.get_current_task().id)
            return await real(fn)

        monkeypatch.setattr(node.parts.catalog, "write", counted)
        assert await winners.follow_rules(node.parts.tools) == 0
        assert anyio.get_current_task().id not in writers, "what is as it should be costs no transaction"


async def test_the_last_step_is_known_from_saves_alone_and_never_goes_back(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()

        async def last_step() -> int | None:
            [row] = (await line.ask("experiments"))["experiments"]
            return row["last_step"]

        assert await last_step() is None
        await training.save(7)
        assert await last_step() == 7
        await training.save(None)
        await training.save(5)  # from the spool of an hour ago
        assert await last_step() == 7


async def test_a_purge_that_met_a_dead_worker_is_repeated_soon_and_ever_less_often(short_dir, monkeypatch):
    """The trash must not wait its whole round because a worker died in it; and a hung disk is not asked all the time."""
    pauses: list[float] = []
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(node.parts.pipeline.run, node.parts.stop, lambda: False)
                _, ids = await three(node, line)
                scope.cancel()
        await node.write(lambda tx: checkpoints.mark_trashed(tx, ids[0], ids[0], "test"))
        at_once = type(node.parts.settings.retention)(keep_last=1, trash_grace_s=0)
        node.parts.admission.current = node.parts.settings.model_copy(update={"retention": at_once})
        call, deaths = node.parts.workers.call, [True] * 7

        async def dies(request, **more):
            if isinstance(request, Purge) and deaths:
                deaths.pop()
                raise WorkerLost("killed")
            return await call(request, **more)

        real_sleep = anyio.sleep

        async def sleep(pause_s: float) -> None:
            pauses.append(pause_s)
            await real_sleep(0 if len(pauses) < 9 else 60)

        monkeypatch.setattr(node.parts.workers, "call", dies)
        monkeypatch.setattr(upkeep, "anyio", SimpleNamespace(sleep=sleep))  # nobody else's pauses
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(upkeep._purge, node.parts.tools)
                with anyio.fail_after(40):
                    while len(pauses) < 9:
                        await real_sleep(0.01)
                scope.cancel()
        monkeypatch.undo()
        assert await node.read(lambda conn: checkpoints.state_of(conn, ids[0])) is State.DROPPED
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, upkeep.PURGE_S, upkeep.PURGE_S, upkeep.PURGE_S, upkeep.PURGE_S]


@pytest.mark.usefixtures("still_upkeep")  # the daemon's own look must not come first
@pytest.mark.parametrize("healed", [False, True])
async def test_a_tombstone_that_could_not_be_carried_out_is_tried_soon_too(short_dir, monkeypatch, healed):
    async with daemon(short_dir) as node, node.connect() as line:
        _, ids = await three(node, line)
        await node.idle()  # else the last save's own job retires one more by the rules below
        rules = type(node.parts.settings.retention)(keep_last=1, trash_grace_s=0)
        node.parts.admission.current = node.parts.settings.model_copy(update={"retention": rules})
        await node.write(lambda tx: checkpoints.mark_trashed(tx, ids[0], ids[0], "test"))

        async def dies(request, **more):
            raise WorkerLost("killed")

        with monkeypatch.context() as patch:
            patch.setattr(node.parts.workers, "call", dies)
            assert await trash.purge(node.parts.tools) == 0
        assert node.parts.tools.delayed == {ids[0]}
        path = Path((await node.read(lambda conn: checkpoints.get(conn, ids[0]))).path)
        assert path.exists()
        if healed:
            assert await trash.purge(node.parts.tools) == 1
            assert node.parts.tools.delayed == set()


async def test_who_carries_out_tombstones_asks_the_catalog_only_after_something_changed_there(short_dir, monkeypatch):
    """A node at rest has few wake-ups to spend."""
    looks: list[int] = []
    look = trash.resume

    async def looked(tools):
        looks.append(await look(tools))
        return looks[-1]

    async with daemon(short_dir) as node, node.connect() as line:
        _, ids = await three(node, line)
        await node.idle()
        monkeypatch.setattr(trash, "resume", looked)
        monkeypatch.setattr(upkeep, "MOVE_S", 0.01)
        tools = node.parts.tools
        async with anyio.create_task_group() as group:
            group.start_soon(upkeep._move, tools)
            await eventually(lambda: looks[-1:] == [0])
            at_rest, edition = len(looks), tools.catalog.edition()
            await anyio.sleep(0.5)
            commits = tools.catalog.edition() - edition
            assert len(looks) - at_rest <= 2 * (1 + commits), "the daemon's own and this one, once for each"
            row = await node.read(lambda conn: checkpoints.get(conn, ids[0]))
            await node.write(lambda tx: checkpoints.mark_trashed(tx, ids[0], ids[0], "test"))
            await eventually(lambda: not Path(row.path).exists())
            group.cancel_scope.cancel()
