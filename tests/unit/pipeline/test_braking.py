"""The brake at work: what the rules would do by themselves waits for a person, is told once, and is over when it is over. S15"""

import argparse
import os
from datetime import UTC, datetime
from typing import Any

import anyio

from ckptd import daemon as composition
from ckptd.catalog import audits, checkpoints, eventlog
from ckptd.pipeline import braking, relieve, retain, trash
from ckptd.rules import Rules
from ckptd.worker.protocol import Usage, Used
from tests.support.in_process import Training, a_tensor, daemon, eventually

LOOSE = {"brake_count_min": 2, "brake_share": 0.5}
FILES = {"model.safetensors": a_tensor(1), "optimizer.safetensors": a_tensor(2), "state.json": b'{"v":1}'}


async def idle(node) -> None:
    async def done() -> bool:
        return not await node.parts.jobs.unfinished()

    await eventually(done)


def follow(node, **rules: Any) -> Rules:
    """Have these rules hold from now on."""
    found = Rules(**{**LOOSE, **rules})
    node.parts.admission.current = node.parts.admission.settings().model_copy(update={"retention": found})
    return found


async def states(node, ids: list[str]) -> str:
    """One letter each: what became of them."""
    rows = await node.read(lambda conn: checkpoints.get_many(conn, ids))
    return "".join(str(rows[one].state)[0] for one in ids)


async def told(node, name: str = "retention.held") -> list[dict[str, Any]]:
    return [dict(one.event.data) for one in await node.read(eventlog.page) if one.event.name == name]


async def named(line) -> list[dict[str, Any]]:
    """What `ckpt status` and `ckpt doctor` say of retention; they say the same."""
    found = [one for one in (await line.ask("status"))["daemon"]["degraded"] if one["what"].startswith("retention")]
    checks = [one for one in (await line.ask("doctor"))["checks"] if one["name"].startswith("retention")]
    assert [(c["name"], c["status"], c["detail"], c["hint"]) for c in checks] == [
        (one["what"], "warn", one["why"], one["do"]) for one in found
    ]
    return found


async def saves(node, training: Training, steps: range, **more: Any) -> list[str]:
    ids = [await training.saved(step, **more) for step in steps]
    await idle(node)
    return ids


async def test_a_mistyped_rule_is_held_and_told_once_until_a_person_carries_it_out(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        ids = await saves(node, training, range(1, 6))
        follow(node, keep_last=1)
        assert (await named(line), await told(node)) == ([], [])
        ids += await saves(node, training, range(6, 7))
        ids += await saves(node, training, range(7, 9))
        assert await states(node, ids) == "llllllll"
        [event] = await told(node)
        size_bytes = event.pop("size_bytes")
        facts = {"project": "demo", "name": "run", "drops": 5, "strips": 0, "live": 6}
        assert event == {**facts, "why": "the rules keep last 1"}
        assert size_bytes > 5 * 4096
        [said] = await named(line)
        assert (said["what"], said["grave"]) == ("retention demo/run", False)
        assert "it would drop 7 of 8 live checkpoints at once" in said["why"]
        assert "`ckpt retention plan demo/run` shows it, then `ckpt retention apply demo/run`" in said["do"]
        [plan] = (await line.ask("retention"))["plans"]
        assert (plan["held"]["drops"], plan["held"]["why"]) == (7, ["the rules keep last 1"])
        assert plan["held"]["words"].startswith("it would drop 7 of 8 live checkpoints at once, more than 2 and more")

        only = [one["checkpoint"] for one in plan["drop"]]
        done = await line.ask("retention", apply=True, only=only, project="demo", name="run")
        assert (len(done["plans"][0]["drop"]), await states(node, ids)) == (7, "tttttttl")
        assert await named(line) == []
        [entry], _ = await node.read(lambda conn: audits.page(conn, subject="run"))
        assert (entry.deed.verb, entry.deed.uid, entry.deed.pid) == ("retention.apply", os.getuid(), os.getpid())
        assert entry.deed.after == {"dropped": 7, "stripped": 0}

        ids += await saves(node, training, range(9, 11))
        assert await states(node, ids) == "tttttttttl", "a few at a time go by themselves"
        follow(node, keep_last=50)
        await saves(node, training, range(11, 14))
        follow(node, keep_last=1)
        await saves(node, training, range(14, 15))
        assert len(await told(node)) == 2, "it is another one now"


async def test_a_plan_at_the_limit_goes_by_itself(short_dir):
    """Four of eight are half, and half is not more than half."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        ids = await saves(node, training, range(1, 8))
        follow(node, keep_last=4)
        ids += await saves(node, training, range(8, 9))
        assert (await states(node, ids), await told(node)) == ("ttttllll", [])
        follow(node, keep_last=1, brake_share=1)
        ids += await saves(node, training, range(9, 10))
        assert (await states(node, ids), await told(node)) == ("ttttttttl", []), "a share of 1 holds nothing"


async def test_what_is_held_is_released_when_the_rules_are_put_right(short_dir, monkeypatch):
    """At a reload, for experiments that have ended; else with the next save at the latest."""
    async with daemon(short_dir) as node, node.connect() as line:

        async def reloaded(**rules: Any) -> list[dict[str, Any]]:
            before = node.parts.admission.settings()
            follow(node, **rules)
            after, node.parts.admission.current = node.parts.admission.settings(), before
            monkeypatch.setattr(composition, "_load", lambda _: argparse.Namespace(settings=after))
            await composition._reload(node.parts, argparse.Namespace())
            return await named(line)

        training = await Training(line, str(node.runs)).open()
        ids = await saves(node, training, range(1, 6))
        await reloaded(keep_last=1)
        ids += await saves(node, training, range(6, 7))
        [said] = await reloaded(keep_last=2)
        assert "drop 4 of 6" in said["why"], "it is wrong still, in another way"
        assert await reloaded(keep_last=50) == []
        follow(node, keep_last=1)
        ids += await saves(node, training, range(7, 8))
        assert len(await named(line)) == 1
        follow(node, keep_last=5)
        ids += await saves(node, training, range(8, 9))
        assert (await named(line), await states(node, ids)) == ([], "tttlllll")
        follow(node, keep_last=1)
        ids += await saves(node, training, range(9, 10))
        assert (len(await named(line)), len(await told(node))) == (1, 3)
        follow(node)
        ids += await saves(node, training, range(10, 11))
        assert (await named(line), await states(node, ids)) == ([], "tttlllllll")


async def test_strips_of_many_at_once_are_held_as_well(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await saves(node, training, range(1, 5), files=FILES)
        follow(node, strip_after=1)
        await saves(node, training, range(5, 6), files=FILES)
        stripped = list(node.runs.glob("demo/run/step_*/stripped.json"))
        assert (stripped, (await told(node))[0]["strips"]) == ([], 4)
        [plan] = (await line.ask("retention", apply=True))["plans"]
        assert (len(plan["strip"]), await named(line)) == (4, [])


async def test_no_hook_is_asked_about_a_plan_that_is_held(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await saves(node, training, range(1, 6))
        follow(node, keep_last=1)

        async def asked(*_):
            raise AssertionError("it is not carried out")

        monkeypatch.setattr(retain, "_allowed", asked)
        await saves(node, training, range(6, 7))
        assert len(await told(node)) == 1


async def test_a_daemon_that_starts_names_what_is_still_held_and_does_not_tell_it_again(short_dir):
    rules = {**LOOSE, "keep_last": 1}
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await saves(node, training, range(1, 6))
        follow(node, keep_last=1)
        await saves(node, training, range(6, 7))
        other = await Training(line, str(node.runs), name="other").open()
        await saves(node, other, range(1, 2))
        [before] = await named(line)
    stopped = datetime.now(UTC)
    async with daemon(short_dir, retention=rules) as node, node.connect() as line:
        await eventually(lambda: node.parts.tools.on_hold)
        [after] = await named(line)
        since = [datetime.fromisoformat(one.pop("since")) for one in (before, after)]
        assert after == before
        assert since[1] <= since[0] < stopped, "since it was told"
        training.line = line
        await training.open()
        await saves(node, training, range(7, 8))
        assert len(await told(node)) == 1
    async with daemon(short_dir, retention={"keep_last": 50}, front=False) as node, node.connect() as line:
        await braking.recall(node.parts.tools)
        assert await named(line) == []


async def test_a_full_disk_takes_no_more_of_what_is_held_than_it_needs(short_dir, monkeypatch):
    """The floor is an alarm of its own; the oldest go, and what the rules keep stays."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        async with anyio.create_task_group() as group:
            group.start_soon(node.parts.pipeline.run, node.parts.stop, lambda: False)
            training = await Training(line, str(node.runs)).open()
            ids = await saves(node, training, range(1, 6))
            follow(node, keep_last=1)
            ids += await saves(node, training, range(6, 7))
            group.cancel_scope.cancel()
        settings, tools = node.parts.admission.settings(), node.parts.tools
        size = (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).size_bytes
        disk = settings.disk.model_copy(update={"free_bytes_min": 1 << 30})
        node.parts.admission.current = settings.model_copy(update={"disk": disk})
        call = node.parts.workers.call

        async def said(request, **more):
            if isinstance(request, Usage):
                free = (1 << 30) - 2 * size
                return Used(total_bytes=1 << 40, free_bytes=free, filesystem="ext4", direct_io=True, leases=True)
            return await call(request, **more)

        monkeypatch.setattr(node.parts.workers, "call", said)
        [relief] = await relieve.run(tools)
        assert (await states(node, ids), relief.freed_bytes) == ("ddllll", 2 * size)
        assert await trash.purge(tools) == 0
