"""What lies in a trash and is known to nobody: named by doctor, and left alone."""

import os
import shutil
from typing import Any

import pytest

from ckptd.catalog import checkpoints
from ckptd.intake import leftovers
from ckptd.model import State
from ckptd.pipeline import retain
from ckptd.rules import Rules
from ckptd.worker.protocol import Usage, Used
from tests.support.in_process import Training, a_tensor, daemon, eventually

FILES = {"model.safetensors": a_tensor(1), "optimizer.safetensors": a_tensor(2)}
WORDS = "in .ckptd-trash, known to nobody"


async def idle(node) -> bool:
    return not await node.parts.jobs.unfinished()


async def saved(node, line, count: int) -> list[str]:
    training = await Training(line, str(node.runs)).open()
    ids = [await training.saved(step + 1, files=FILES) for step in range(count)]
    await eventually(lambda: idle(node))
    return ids


async def said(node, line) -> str:
    """What doctor says of the root."""
    checks = (await line.ask("doctor"))["checks"]
    (root,) = [check for check in checks if check["name"] == f"root {node.runs}"]
    assert root["status"] in {"ok", "warn"}
    return str(root["detail"])


def binned(node) -> list[str]:
    return sorted(os.listdir(node.runs / ".ckptd-trash"))


def lose_catalog(directory) -> None:
    for name in os.listdir(directory / "state"):
        if name.startswith("catalog"):
            os.unlink(directory / "state" / name)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies there has lain there long enough."""
    monkeypatch.setattr(leftovers, "LAIN_S", 0.0)


@pytest.mark.usefixtures("at_once")
async def test_what_was_retired_or_taken_out_is_known_to_the_catalog(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saved(node, line, 3)
        row = await node.read(lambda conn: checkpoints.get(conn, ids[0]))
        rules = Rules(strip_after=1)
        node.parts.admission.current = node.parts.admission.settings().model_copy(update={"retention": rules})
        await retain.apply(node.parts.tools, row.experiment_id, rules)
        await line.ask("remove", selector=ids[0])
        assert {f"{ids[1]}.stripped", ids[0]} <= set(binned(node))
        assert WORDS not in await said(node, line)


@pytest.mark.usefixtures("at_once")
async def test_what_a_lost_catalog_had_retired_is_named_stays_and_can_be_moved_back(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saved(node, line, 2)
        await line.ask("remove", selector=ids[0])
        await eventually(lambda: idle(node))
        assert WORDS not in await said(node, line)
    lose_catalog(short_dir)
    async with daemon(short_dir) as node, node.connect() as line:
        await line.ask("rebuild", root=str(node.runs))
        assert f"{WORDS}: 1, {ids[0]}" in await said(node, line)
        assert binned(node) == [ids[0]]
        shutil.move(node.runs / ".ckptd-trash" / ids[0], node.runs / "demo/run/step_0000000001")
        await line.ask("rebuild", root=str(node.runs))
        assert (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).state is State.LIVE
        assert WORDS not in await said(node, line)


@pytest.mark.usefixtures("at_once")
async def test_what_a_repair_moved_aside_is_known_while_its_job_is_there(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        one = await (await Training(line, str(node.runs)).open()).save(1)
        names = [f"repair-{one}-1", f"repair-{one}-1-undone"]
        for name in names:
            (node.runs / ".ckptd-trash" / name).mkdir(parents=True)
        assert WORDS not in await said(node, line)
        await node.write(lambda tx: checkpoints.mark_failed(tx, one, {"code": "bug", "message": "none"}))
        for job in await node.parts.jobs.claim():
            await node.write(lambda tx, job=job: node.parts.jobs.finish(tx, job))
        assert f"{WORDS}: 2, {names[0]} and others" in await said(node, line)


async def test_only_what_has_lain_there_for_long_is_named(short_dir):
    """What is being unlinked at this moment is nobody's for as long as that takes."""
    async with daemon(short_dir) as node, node.connect() as line:
        await saved(node, line, 1)
        (node.runs / ".ckptd-trash" / "somebody's").mkdir(parents=True)
        assert WORDS not in await said(node, line)


@pytest.mark.usefixtures("at_once")
async def test_what_somebody_put_there_is_named_and_a_trash_that_does_not_answer_hides_nothing_else(
    short_dir, monkeypatch: pytest.MonkeyPatch
):
    async with daemon(short_dir) as node, node.connect() as line:
        await saved(node, line, 1)
        (node.runs / ".ckptd-trash" / "somebody's").mkdir(parents=True)
        call, used = node.parts.workers.call, Used(100, 50, filesystem="x", direct_io=True, leases=True)

        async def answer(request: Any, **more: Any) -> Any:  # how full the disk is changes between the two looks
            return used if isinstance(request, Usage) else await call(request, **more)

        monkeypatch.setattr(node.parts.workers, "call", answer)
        before = await said(node, line)
        assert before.endswith(f"; {WORDS}: 1, somebody's")

        async def hang(*_: Any, **__: Any) -> None:
            await eventually(lambda: False)

        monkeypatch.setattr(leftovers, "ANSWER_S", 0.05)
        monkeypatch.setattr(leftovers, "_unknown", hang)
        assert await said(node, line) == before.removesuffix(f"; {WORDS}: 1, somebody's")
