"""Every event that is declared is told by what really happens, and so is every key of its data."""

import argparse
import os
import signal
import subprocess
import sys
from collections import defaultdict

import anyio
import pytest

from ckptd import daemon as composition
from ckptd import pipeline
from ckptd.catalog import checkpoints, eventlog
from ckptd.config import Root
from ckptd.errors import Bug, WorkerLost
from ckptd.events import EVENTS, MISSED
from ckptd.intake import presence
from ckptd.model import State, new_id
from ckptd.pipeline import relieve, retain, trash
from ckptd.rules import ExperimentRules, Rules
from tests.support.in_process import Training, a_tensor, daemon, eventually
from tests.support.watched import a_watched

# Told where a mount really hangs (test_handle.py), by queues that really overflow (test_events.py, test_delivery.py),
# by limits that are really passed (test_alerts.py), by a database that really refuses (test_faults.py) and one that is really older (test_schema.py).
ELSEWHERE = {
    "alert.raised", "alert.cleared", "root.degraded", "root.recovered", MISSED, "hook.missed",
    "catalog.failed", "catalog.migrated",
}  # fmt: skip
RULES = {"keep_last": 9, "keep_best": [{"metric": "loss", "mode": "min"}], "trash_grace_s": 0}
HOOKS = """
from ckptd.hooks import Finding, Level, hook

@hook(events=["checkpoint.pinned"])
def look(context):
    return Finding(Level.INFO, "it is pinned", {"note": context.data.get("note")})
"""
VETO_99 = {"events": ["checkpoint.before_save"], "when": "data.step == 99"}
pytestmark = pytest.mark.usefixtures("still_upkeep")

GATE = {"name": "gate", "exec": ["/bin/sh", "-c", "exit 10"], **VETO_99}


async def whole_life(node, line) -> str:
    """Staged to dropped, held and let go of, described and found missing and back."""
    training = await Training(line, str(node.runs)).open()
    first = await training.saved(1, metrics={"loss": 1.0})
    second = await training.saved(2, metrics={"loss": 0.5})
    await training.saved(3, metrics={"loss": 0.1})
    await line.ask("pin", selector=first, note="mine")
    await line.ask("unpin", selector=first)
    await line.ask("remove", selector=first)
    await line.ask("restore", selector=first)
    await line.ask("unpin", selector=first)
    await line.ask("remove", selector=first)
    await trash.purge(node.parts.tools)
    assert await node.read(lambda conn: checkpoints.state_of(conn, first)) is State.DROPPED
    await line.ask("checkpoint.tag", selector=second, add=["paper"])
    path = node.runs / "demo/run/step_0000000002"
    path.rename(node.directory / "aside")
    await line.ask("verify", selector=second)
    (node.directory / "aside").rename(path)
    await line.ask("verify", selector=second)
    node.parts.pool.free_checkpoint(second)
    with open(path / "model.safetensors", "r+b") as file:
        file.write(b"\xff")
    await line.ask("verify", selector=second)
    return second


async def three_ends(node, line) -> None:
    """Complete, failed, and gone without a word; each in an experiment of its own."""
    ended = await Training(line, str(node.runs), name="ended").open()
    await line.ask("experiment.close", experiment=ended.experiment, status="completed")
    await line.ask("experiment.open", **ended.facts(), facts={"pid": os.getpid()})
    await line.ask("experiment.close", experiment=ended.experiment, status="failed", error="out of memory")
    gone = await Training(line, str(node.runs), name="gone").open()
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)

    class Dying:
        pid, experiments = process.pid, set()

    node.parts.presence.closed(gone.experiment)
    node.parts.presence.came(Dying, gone.experiment)
    node.parts.presence.left(Dying)
    process.communicate()


async def troubles(node, line, monkeypatch) -> None:
    """Replaced, failed, retried, parked, a worker killed."""
    real, meets = pipeline.STAGES["publish"], [WorkerLost("killed"), Bug("a defect")]

    async def publish(job, tools):
        if meets:
            raise meets.pop(0)
        return await real(job, tools)

    with monkeypatch.context() as patch:
        patch.setitem(pipeline.STAGES, "publish", publish)
        await (await Training(line, str(node.runs), name="troubled").open()).save(1)
        await eventually(lambda: not meets)
    link = node.directory / "mine"
    link.mkdir()
    (link / "link.safetensors").symlink_to("/etc/passwd")
    one = (await line.ask("submit", path=str(link / "link.safetensors"), checkpoint=new_id()))["checkpoint"]
    await line.ask("wait", checkpoint=one, level="durable", timeout_s=30)
    gate = anyio.Event()

    async def waits(job, tools):
        await gate.wait()
        return await real(job, tools)

    with monkeypatch.context() as patch:
        patch.setitem(pipeline.STAGES, "publish", waits)
        crowded = await Training(line, str(node.runs), name="crowded").open()
        await crowded.save(1)
        await crowded.save(2)
        await line.ask("replace", experiment=crowded.experiment)
        gate.set()
    [worker] = [state for state in node.parts.workers.state() if state.pid]
    os.kill(worker.pid, signal.SIGKILL)
    await eventually(lambda: all(state.pid != worker.pid for state in node.parts.workers.state()))


async def loads_and_limits(node, line, checkpoint: str) -> None:
    """A load that works and one that does not; a metric beyond its limit; a trainer that stands; a full disk; a plan."""
    await line.ask("loaded", checkpoint=checkpoint, ms=3.5, hot=True)
    await line.ask("loaded", checkpoint=checkpoint, ok=False, error="out of memory")
    stands = await Training(line, str(node.runs), name="stands").open()
    await line.ask("metrics", experiment=stands.experiment, points=[["grad_norm", 7, 1e9, 1.0]])
    await line.ask("experiment.beat", experiment=stands.experiment, step=7)
    retired = await Training(line, str(node.runs), name="retired").open()
    await retired.saved(1)
    await retired.saved(2)
    await node.parts.observers.alerts.look()
    await anyio.sleep(0.2)
    await node.parts.observers.alerts.look()
    await line.ask("experiment.close", experiment=stands.experiment, status="completed")
    await node.parts.observers.alerts.look()


async def slimmed(node, line) -> None:
    """An optimizer's state taken out of an older one, and put back."""
    files = {"model.safetensors": a_tensor(), "optimizer.safetensors": a_tensor(), "state.json": b"{}"}
    slim = await Training(line, str(node.runs), name="slim").open()
    first = await slim.saved(1, files=files)
    await slim.saved(2, files=files)
    await retain.apply(node.parts.tools, slim.experiment, Rules(strip_after=1))
    await line.ask("restore", selector=first)


async def held(node, line) -> None:
    """A plan that takes more at once than anybody has asked for."""
    most = await Training(line, str(node.runs), name="most").open()
    for step in (1, 2, 3):
        await most.saved(step)
    given = node.parts.admission.settings()
    rules = [*given.experiments, ExperimentRules(name="most", keep_last=1, brake_count_min=0)]
    node.parts.admission.current = given.model_copy(update={"experiments": tuple(rules)})
    await most.saved(4)


async def lifted(node, line) -> None:
    """A save that a hook vetoed, and a person who lets it count."""
    doubted = await Training(line, str(node.runs), name="doubted").open()
    await line.ask("unveto", selector=await doubted.saved(99), note="looked at it")


async def relieved(node, path: str) -> None:
    """A root whose disk has less room than it wants; nothing lies in it that could go."""
    given = node.parts.admission.settings()
    wants = Root(path=path, kind="watched", free_bytes_min=1 << 60)
    node.parts.admission.current = given.model_copy(update={"roots": (*given.roots, wants)})
    await relieve.run(node.parts.tools)
    node.parts.admission.current = given


async def all_logged(node) -> dict[str, set[str]]:
    """What was told before anybody could listen stands in the log."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for entry in await node.read(lambda conn: eventlog.page(conn, limit=10_000)):
        found[entry.event.name] |= entry.event.data.keys()
    return found


async def test_every_declared_event_and_every_key_of_it_is_told_by_a_real_flow(short_dir, monkeypatch):
    """M047, M049: a name that nothing fires, or a key that nothing fills, is a promise to whoever hooks on it."""
    monkeypatch.setattr(presence, "LOOK_S", 0.05)
    tree, settings = a_watched(short_dir)
    found = tree / "run7/found_5.safetensors"
    found.write_bytes(a_tensor(5))
    (short_dir / "pinned.py").write_text(HOOKS)
    settings |= {
        "hooks_defaults": {"failures_max": 1, "entry_points": False},
        "hooks": [
            {"name": "pinned", "python": "pinned:look", "import_path": [str(short_dir)]},
            {"name": "broken", "exec": ["/bin/false"], "events": ["experiment.opened"]},
            GATE,
        ],
        "thresholds": [{"metric": "grad_norm", "above": 100.0}],
        "alerts": {"look_s": 3600, "disk_free_share_min": 1.0, "stalled_s": 0.1},
        "experiments": [{"name": "retired", "keep_last": 1}],
    }
    told: defaultdict[str, set[str]] = defaultdict(set)
    async with (
        daemon(short_dir, retention=RULES, **settings) as node,
        node.parts.bus.subscribe(10_000) as events,
        node.connect() as line,
    ):

        async def listen() -> None:
            async for event in events:
                told[event.name] |= event.data.keys()

        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            await eventually(lambda: not node.parts.extensions.hooked.registry.undeclared)
            second = await whole_life(node, line)
            await loads_and_limits(node, line, second)
            await slimmed(node, line)
            await held(node, line)
            await lifted(node, line)
            await three_ends(node, line)
            await troubles(node, line, monkeypatch)
            await line.ask("submit", path=str(found), checkpoint=new_id(), note="mine")
            monkeypatch.setattr(composition, "_load", lambda _: argparse.Namespace(settings=node.parts.settings))
            await composition._reload(node.parts, argparse.Namespace())
            (short_dir / "more").mkdir()
            await line.ask("root.add", path=str(short_dir / "more"), kind="watched")
            await relieved(node, str(short_dir / "more"))
            await line.ask("status")
            composition._say_goodbye(node.parts, anyio.CancelScope())
            wanted = {name: set(declared.keys) for name, declared in EVENTS.items() if name not in ELSEWHERE}
            with anyio.move_on_after(40):
                while any(told[name] != keys for name, keys in wanted.items()):
                    await anyio.sleep(0.05)
                    for name, keys in (await all_logged(node)).items():
                        told[name] |= keys
            group.cancel_scope.cancel()
    wrong = {name: (keys - told[name], told[name] - keys) for name, keys in wanted.items() if told[name] != keys}
    assert not wrong, f"(never told, not declared): {wrong}"
