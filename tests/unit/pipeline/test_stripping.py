"""What was taken out of checkpoints that stay, with real files in the trash: unlinked after the grace, each by itself."""

import os

import anyio

from ckptd.errors import RootDegraded
from ckptd.pipeline import retain, strip, trash
from ckptd.rules import Rules
from ckptd.worker.protocol import Purge
from tests.support.in_process import Training, a_tensor, daemon, eventually

FILES = {"model.safetensors": a_tensor(1), "optimizer.safetensors": a_tensor(2)}
GRACES_S = {"long": 3600.0, "short": 0.0}


def rules_of(_settings: object, _project: str, experiment: str) -> Rules:
    return Rules(strip_after=1, trash_grace_s=GRACES_S[experiment])


async def stripped(node, line, name: str, count: int) -> list[str]:
    """Save one more than so many, and take the optimizer states out of all but the last; nothing runs afterwards."""
    async with anyio.create_task_group() as group:
        group.start_soon(node.parts.pipeline.run, node.parts.stop, lambda: False)
        training = await Training(line, str(node.runs), name=name).open()
        ids = [await training.saved(step, files=FILES) for step in range(1, count + 2)]

        async def done() -> bool:
            return not await node.parts.jobs.unfinished()

        await eventually(done)
        group.cancel_scope.cancel()
    await retain.apply(node.parts.tools, training.experiment, rules_of(None, "demo", name))
    while await strip.resume(node.parts.tools):
        pass
    return ids[:count]


def binned(node) -> list[str]:
    return sorted(name.partition(".")[0] for name in os.listdir(node.runs / ".ckptd-trash"))


async def test_what_has_a_longer_grace_stands_before_nothing_that_is_due(short_dir, monkeypatch):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        monkeypatch.setattr(type(node.parts.settings), "rules_for", rules_of)
        kept = await stripped(node, line, "long", 2)
        due = await stripped(node, line, "short", 2)
        assert binned(node) == sorted(kept + due)
        assert await trash.purge(node.parts.tools) == 2
        assert binned(node) == sorted(kept)


async def test_a_round_unlinks_more_than_one_commit_notes_and_no_more_than_it_may(short_dir, monkeypatch):
    monkeypatch.setattr(strip, "STRIPS_MAX", 2)
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        monkeypatch.setattr(type(node.parts.settings), "rules_for", rules_of)
        await stripped(node, line, "short", 6)
        monkeypatch.setattr(trash, "PURGES_MAX", 5)
        assert await trash.purge(node.parts.tools) == 5
        assert len(binned(node)) == 1
        assert await trash.purge(node.parts.tools) == 1


async def test_one_that_can_not_be_unlinked_holds_up_no_other_and_is_tried_again(short_dir, monkeypatch):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        monkeypatch.setattr(type(node.parts.settings), "rules_for", rules_of)
        ids = await stripped(node, line, "short", 3)
        call = node.parts.workers.call

        async def flaky(request, **more):
            if isinstance(request, Purge) and request.trash == strip.bin_of(ids[0]):
                raise RootDegraded("hangs")
            return await call(request, **more)

        with monkeypatch.context() as patch:
            patch.setattr(node.parts.workers, "call", flaky)
            patch.setattr(strip, "STRIPS_MAX", 1)
            assert await trash.purge(node.parts.tools) == 2
        assert (binned(node), node.parts.tools.delayed) == ([ids[0]], {ids[0]})
        assert await trash.purge(node.parts.tools) == 1


async def test_what_is_half_unlinked_does_not_wait_for_a_grace_that_was_made_longer(short_dir, monkeypatch):
    """Longer than there were years: what can't be subtracted from any time."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        monkeypatch.setattr(type(node.parts.settings), "rules_for", rules_of)
        await stripped(node, line, "short", 1)
        call = node.parts.workers.call

        async def flaky(request, **more):
            if isinstance(request, Purge):
                raise RootDegraded("hangs")
            return await call(request, **more)

        with monkeypatch.context() as patch:
            patch.setattr(node.parts.workers, "call", flaky)
            assert await trash.purge(node.parts.tools) == 0
        monkeypatch.setitem(GRACES_S, "short", 1e18)
        assert await trash.purge(node.parts.tools) == 1
        assert binned(node) == []
