"""A wall clock that is set, with real files in the trash: what is unlinked has lain there for its grace. F11"""

import os
from datetime import datetime, timedelta

import anyio
import pytest

from ckptd.catalog import checkpoints, holds
from ckptd.clock import SystemClock
from ckptd.model import State
from ckptd.pipeline import retain, trash
from ckptd.rules import Rules
from tests.support import in_process
from tests.support.in_process import Training, a_tensor, daemon, eventually

GRACE_S = 3600.0
FILES = {"model.safetensors": a_tensor(1), "optimizer.safetensors": a_tensor(2)}


class Wall(SystemClock):
    """The machine's clock, which a test sets."""

    by = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.by


@pytest.fixture
def wall(monkeypatch) -> type[Wall]:
    class OfThisTest(Wall):
        pass

    monkeypatch.setattr(in_process, "SystemClock", OfThisTest)
    return OfThisTest


async def saved_alone(node, line, count: int) -> list[str]:
    """Save, with the pipeline running only meanwhile: what follows is the test's own doing."""
    async with anyio.create_task_group() as group:
        group.start_soon(node.parts.pipeline.run, node.parts.stop, lambda: False)
        training = await Training(line, str(node.runs)).open()
        ids = [await training.saved(step, files=FILES) for step in range(1, count + 1)]

        async def done() -> bool:
            return not await node.parts.jobs.unfinished()

        await eventually(done)
        group.cancel_scope.cancel()
    return ids


def follow(node, **rules) -> Rules:
    """Have these rules hold from now on."""
    found = Rules(trash_grace_s=GRACE_S, **rules)
    node.parts.admission.current = node.parts.admission.settings().model_copy(update={"retention": found})
    return found


def in_trash(node) -> list[str]:
    return sorted(os.listdir(node.runs / ".ckptd-trash"))


async def row(node, checkpoint: str):
    return await node.read(lambda conn: checkpoints.get(conn, checkpoint))


async def test_what_is_removed_or_read_right_after_a_clock_was_set_back_keeps_its_grace_and_its_reader(short_dir, wall):
    """Upkeep looks at the clock every few seconds; a person and a reader may be faster."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        removed, read, _, _ = await saved_alone(node, line, 4)
        rules = follow(node, keep_last=1)
        await node.parts.catalog.follow_clock()
        wall.by = -timedelta(days=2)
        await retain.remove(node.parts.tools, await row(node, removed), 0, 0)
        await line.ask("attach", selector=read)
        assert await trash.purge(node.parts.tools) == 0
        assert in_trash(node) == [removed]
        now = node.parts.clock.now()
        assert [hold.kind for hold in await node.read(lambda conn: holds.of_checkpoint(conn, read, now))] == ["lease"]
        await retain.apply(node.parts.tools, (await row(node, removed)).experiment_id, rules)
        assert (await row(node, read)).state is State.LIVE


@pytest.mark.parametrize("by_s", [86_400.0, -86_400.0], ids=["on", "back"])
async def test_what_was_stripped_can_come_back_for_its_whole_grace_wherever_the_clock_is_set(short_dir, wall, by_s):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        first, _ = await saved_alone(node, line, 2)
        rules = follow(node, strip_after=1)
        await retain.apply(node.parts.tools, (await row(node, first)).experiment_id, rules)
        assert len(in_trash(node)) == 1
        await node.parts.catalog.follow_clock()
        wall.by = timedelta(seconds=by_s)
        assert await trash.purge(node.parts.tools) == 0
        assert (await line.ask("restore", selector=first))["restored"] == ["optimizer.safetensors"]
        assert in_trash(node) == []


async def test_a_clock_that_is_set_while_the_trash_is_looked_through_makes_nothing_due(short_dir, wall, monkeypatch):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        first, _ = await saved_alone(node, line, 2)
        await retain.remove(node.parts.tools, await row(node, first), 0, 0)
        rules = follow(node)

        def asked(*_: object) -> Rules:
            wall.by = timedelta(days=1)  # after the look at the clock, and before the look at the trash
            return rules

        monkeypatch.setattr(type(node.parts.settings), "rules_for", asked)
        assert await trash.purge(node.parts.tools) == 0
        assert in_trash(node) == [first]


async def test_a_clock_that_is_set_while_what_was_stripped_is_looked_through_makes_nothing_due(
    short_dir, wall, monkeypatch
):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        first, _ = await saved_alone(node, line, 2)
        rules = follow(node, strip_after=1)
        await retain.apply(node.parts.tools, (await row(node, first)).experiment_id, rules)
        await node.parts.catalog.follow_clock()

        def asked(*_: object) -> Rules:
            wall.by = timedelta(days=1)  # after the look at the trash, and before anything of it is unlinked
            return rules

        monkeypatch.setattr(type(node.parts.settings), "rules_for", asked)
        assert await trash.purge(node.parts.tools) == 0
        assert wall.by
        assert len(in_trash(node)) == 1
