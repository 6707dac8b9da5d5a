"""Hooks in a daemon: asked before each act, told after it, switched and tried by people; and verbs of plug-ins."""

import json
import os
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import pytest

from ckptd.catalog import checkpoints, eventlog, hookruns
from ckptd.errors import BadRequest, Held, NotFound, Vetoed
from ckptd.hookconfig import VerbEntry
from ckptd.model import Level, State, new_id
from ckptd.pipeline import asking
from ckptd_client.find import find_checkpoint
from tests.support.in_process import Training, a_tensor, daemon, eventually
from tests.support.strangers import SOMEBODY, ask_as, need_root

MODULE = """
import json, os, sys
from ckptd.hooks import Finding, Level, Veto

def veto_odd(context):
    if (context.data.get("step") or 0) % 2:
        return Veto(f"{context.event} of an odd step")

def note(context):
    with open(os.path.join(os.path.dirname(__file__), "told"), "a") as file:
        print(json.dumps(context.to_wire()), file=file)

def hang(context):
    import time
    time.sleep(60)

def predict(context):
    return Finding(Level.INFO, "seven", {"answer": context.data["step"] * 7, "uid": context.data["sender"]["uid"]})
"""


def a_hook(directory, name: str, function: str, *events: str, **more) -> dict:
    return {"name": name, "python": f"mine:{function}", "events": events, "import_path": [str(directory)], **more}


@asynccontextmanager
async def hooked(directory, *hooks: dict, **settings):
    """A daemon with these hooks, whose code has been asked what it is."""
    (directory / "mine.py").write_text(MODULE)
    async with (
        daemon(
            directory,
            hooks=list(hooks),
            hooks_defaults={"entry_points": False, "timeout_s": 30, "ask_s_max": 60},
            **settings,
        ) as node,
        node.connect() as line,
    ):
        await eventually(lambda: not node.parts.extensions.hooked.registry.undeclared)
        yield node, line


async def test_a_vetoed_save_is_as_safe_as_any_and_is_neither_latest_nor_best(short_dir):
    """M057: nothing acknowledged is lost by a hook; what a veto of a save does is written in decision 0006."""
    rules = {"keep_best": [{"metric": "loss", "mode": "min"}], "keep_last": 1, "trash_grace_s": 0}
    gate = a_hook(short_dir, "gate", "veto_odd", "checkpoint.before_save")
    async with hooked(short_dir, gate, retention=rules) as (node, line):
        training = await Training(line, str(node.runs)).open()
        odd = await training.saved(7, metrics={"loss": 0.1})
        row = await node.read(lambda conn: checkpoints.get(conn, odd))
        assert (row.state, row.level) == (State.LIVE, Level.VERIFIED)
        assert row.veto == "hook 'gate': checkpoint.before_save of an odd step"
        for selector in ("latest", "best:loss"):
            with pytest.raises((Vetoed, NotFound)):
                await line.ask("attach", selector=selector, experiment=training.experiment)
        with pytest.raises(Held, match="no better one"):
            await line.ask("remove", selector=odd)
        even = await training.saved(2, metrics={"loss": 0.5})
        await training.saved(9, metrics={"loss": 0.01})
        found = await line.ask("attach", selector="latest", experiment=training.experiment)
        assert found["checkpoint"] == even
        assert (await line.ask("resolve", selector="best:loss", experiment=training.experiment))["checkpoint"] == even
        assert (await line.ask("attach", selector=odd))["step"] == 7, "named by its id it can be loaded"
        assert (await node.read(lambda conn: checkpoints.get(conn, odd))).state is State.LIVE, "no rule retires it"
        assert (await line.ask("show", selector=odd))["checkpoint"]["veto"] == row.veto


async def test_a_person_lets_a_vetoed_save_count_and_latest_and_best_are_decided_again(short_dir):
    """M057: as after a late metric: events, links and retention follow, and the audit trail says what was lifted."""
    rules = {"keep_best": [{"metric": "loss", "mode": "min"}], "keep_last": 1}
    gate = a_hook(short_dir, "gate", "veto_odd", "checkpoint.before_save")
    async with hooked(short_dir, gate, retention=rules) as (node, line):
        training = await Training(line, str(node.runs)).open()
        first, odd = await training.saved(2, metrics={"loss": 0.5}), await training.saved(7, metrics={"loss": 0.1})
        assert (await line.ask("unveto", selector=odd, note="looked"))["changed"] is True
        for selector in ("latest", "best:loss"):
            assert (await line.ask("resolve", selector=selector, experiment=training.experiment))["checkpoint"] == odd
        told = [one.event for one in await node.read(eventlog.page) if one.event.checkpoint == odd]
        told = [event for event in told if event.name in {"latest.changed", "best.changed", "checkpoint.unvetoed"}]
        assert {event.name for event in told} == {"latest.changed", "best.changed", "checkpoint.unvetoed"}
        (said,) = [event.data for event in told if event.name == "checkpoint.unvetoed"]
        veto = "hook 'gate': checkpoint.before_save of an odd step"
        assert (said["veto"], said["note"], said["uid"]) == (veto, "looked", os.getuid())
        (entry,) = (await line.ask("audit"))["entries"]
        assert (entry["action"], entry["before"], entry["note"]) == ("unveto", {"veto": veto}, "looked")
        place = node.runs / "demo/run"
        await eventually(lambda: all(os.readlink(place / name) == "step_0000000007" for name in ("latest", "best")))
        await eventually(lambda: node.read(lambda conn: is_in(conn, first, State.TRASHED)))
        assert (await line.ask("unveto", selector=odd))["changed"] is False
        assert [one["action"] for one in (await line.ask("audit"))["entries"]].count("unveto") == 1


async def test_a_veto_lies_beside_the_manifest_until_it_is_lifted_and_a_rebuild_believes_it(short_dir):
    """I5: a catalog that was lost and made again calls the same checkpoint the latest."""
    gate = a_hook(short_dir, "gate", "veto_odd", "checkpoint.before_save")
    async with hooked(short_dir, gate) as (node, line):
        training = await Training(line, str(node.runs)).open()
        even, odd, other = [await training.saved(step) for step in (2, 7, 9)]
        await eventually(lambda: find_checkpoint(str(node.runs / "demo/run")).checkpoint == even)
        await line.ask("unveto", selector=other)
        await eventually(lambda: find_checkpoint(str(node.runs / "demo/run")).checkpoint == other)
    for left in (short_dir / "state").glob("catalog*"):
        left.unlink()
    async with hooked(short_dir, gate) as (node, line):
        await node.parts.admission.managed_root(str(node.runs), os.getuid())
        await line.ask("rebuild")
        for one in (odd, other):
            await eventually(lambda one=one: node.read(lambda conn: is_at(conn, one, Level.VERIFIED)))
        rows = await node.read(lambda conn: checkpoints.get_many(conn, [odd, other]))
        assert (rows[odd].veto, rows[other].veto) == ("hook 'gate': checkpoint.before_save of an odd step", None)
        assert (await line.ask("resolve", selector="latest", project="demo", name="run"))["checkpoint"] == other


async def test_a_vetoed_load_is_an_error_and_never_another_checkpoint(short_dir):
    """M048, M057."""
    gate = a_hook(short_dir, "gate", "veto_odd", "checkpoint.before_load")
    async with hooked(short_dir, gate) as (node, line):
        training = await Training(line, str(node.runs)).open()
        await training.saved(2)
        odd = await training.saved(3)
        with pytest.raises(Vetoed, match="before_load of an odd step"):
            await line.ask("attach", selector="latest", experiment=training.experiment)
        assert (await line.ask("attach", selector="step:2", experiment=training.experiment))["step"] == 2
        assert (await line.ask("resolve", selector=odd))["step"] == 3


async def test_a_vetoed_verify_comes_later_and_is_not_put_off_for_ever(short_dir, monkeypatch):
    """M048, M057: durable is told all the same, and VERIFIED is withheld for a bounded time."""
    monkeypatch.setattr(asking, "VERIFY_AGAIN_S", 0.05)
    monkeypatch.setattr(asking, "VERIFY_POSTPONED_MAX", 3)
    gate = a_hook(short_dir, "gate", "veto_odd", "checkpoint.before_verify")
    async with hooked(short_dir, gate) as (node, line):
        training = await Training(line, str(node.runs)).open()
        odd = await training.saved(3)
        delivery = node.parts.extensions.hooked.delivery
        await eventually(lambda: delivery.state_of("gate")[0].get("vetoed") == 3)
        await delivery.flush()
        asked, _ = await node.read(lambda conn: hookruns.runs(conn, outcome="vetoed"))
        assert len(asked) == 3
        assert len({one.run.key for one in asked}) == len(asked), "each is a question of its own"
        with pytest.raises(Vetoed):
            await line.ask("verify", selector=odd)


async def test_files_are_durable_before_a_veto_puts_off_their_reading(short_dir, monkeypatch):
    monkeypatch.setattr(asking, "VERIFY_AGAIN_S", 0.2)
    monkeypatch.setattr(asking, "VERIFY_POSTPONED_MAX", 10_000)
    gate = a_hook(short_dir, "gate", "veto_odd", "checkpoint.before_verify")
    async with hooked(short_dir, gate) as (node, line):
        path = node.runs / "model_5.safetensors"
        path.write_bytes(a_tensor())
        one = (await line.ask("submit", path=str(path), checkpoint=new_id(), step=5))["checkpoint"]
        await line.push("level", checkpoint=one, level="durable")
        monkeypatch.setattr(asking, "VERIFY_POSTPONED_MAX", 1)
        await line.push("level", checkpoint=one, level="verified")


async def test_a_vetoed_removal_and_a_vetoed_plan_leave_everything_where_it_is(short_dir):
    """M057."""
    rules = {"keep_last": 1}
    gates = (
        a_hook(short_dir, "one", "veto_odd", "checkpoint.before_delete"),
        a_hook(short_dir, "mark", "note", "retention.before_apply", "retention.applied"),
    )
    async with hooked(short_dir, *gates, retention=rules) as (node, line):
        training = await Training(line, str(node.runs)).open()
        odd = await training.saved(3)
        even = await training.saved(4)
        await training.saved(6)
        await eventually(lambda: node.read(lambda conn: is_in(conn, even, State.TRASHED)))
        assert await node.read(lambda conn: checkpoints.state_of(conn, odd)) is State.LIVE
        with pytest.raises(Vetoed, match="odd step"):
            await line.ask("remove", selector=odd)
        applied = await line.ask("retention", project="demo", name="run", apply=True)
        [kept] = [entry for entry in applied["plans"][0]["keep"] if entry["checkpoint"] == odd]
        assert kept["why"] == ["hook 'one': checkpoint.before_delete of an odd step"]
        told = await eventually((short_dir / "told").read_text)
        assert "retention.before_apply" in told


async def is_at(conn, checkpoint: str, level: Level) -> bool:
    found = (await checkpoints.get_many(conn, [checkpoint])).get(checkpoint)
    return found is not None and found.level is level


async def is_in(conn, checkpoint: str, state: State) -> bool:
    return await checkpoints.state_of(conn, checkpoint) is state


async def test_a_hook_that_hangs_before_an_act_delays_it_for_its_bound_alone(short_dir):
    """M056: a timeout is no veto."""
    hang = a_hook(short_dir, "hang", "hang", "checkpoint.before_save", timeout_s=0.3)
    async with hooked(short_dir, hang) as (node, line):
        training = await Training(line, str(node.runs)).open()
        with anyio.fail_after(30):  # it hangs for a minute
            one = await training.saved(1)
        assert (await node.read(lambda conn: checkpoints.get(conn, one))).veto is None
        answer = await line.ask("hooks")
        assert (answer["hooks"][0]["timeout"], answer["hooks"][0]["ok"]) == (1, 0)


async def test_people_list_try_and_switch_hooks_and_see_what_came_of_them(short_dir):
    """M058, M064."""
    mark = a_hook(short_dir, "mark", "note", "checkpoint.published", priority="high")
    gate = a_hook(short_dir, "gate", "veto_odd", "checkpoint.before_save", enabled=False)
    async with hooked(short_dir, mark, gate) as (node, line):
        training = await Training(line, str(node.runs)).open()
        one = await training.saved(1)
        await eventually(lambda: node.parts.extensions.hooked.delivery.state_of("mark")[0].get("ok"))
        listed = {row["name"]: row for row in (await line.ask("hooks"))["hooks"]}
        assert (listed["mark"]["calls"], listed["mark"]["priority"], listed["gate"]["enabled"]) == (1, "HIGH", False)
        assert listed["mark"]["p50_ms"] > 0
        [run] = (await line.ask("hooks.log", hook="mark"))["runs"]
        assert (run["event"], run["outcome"], run["checkpoint"]) == ("checkpoint.published", "ok", one)
        tried = await line.ask("hooks.test", hook="gate", checkpoint=one, data={"extra": 1})
        assert (tried["run"]["outcome"], tried["run"]["error"]) == ("vetoed", "checkpoint.before_save of an odd step")
        assert (tried["context"]["data"]["step"], tried["context"]["data"]["extra"]) == (1, 1)
        assert (await line.ask("hooks.switch", hook="gate", enabled=True))["changed"] is True
        two = await training.saved(3)
        assert (await node.read(lambda conn: checkpoints.get(conn, two))).veto
        for op, fields in (("hooks.test", {"hook": "none"}), ("hooks.switch", {"hook": "none", "enabled": True})):
            with pytest.raises(NotFound):
                await line.ask(op, **fields)
        with pytest.raises(BadRequest):
            await line.ask("hooks.log", outcome="perhaps")
        assert [entry["action"] for entry in (await line.ask("audit"))["entries"]].count("hooks.switch") == 1


async def test_another_user_lists_tries_and_switches_no_hook(short_dir):
    """S9: on a daemon that serves everybody, hooks are root's and its own user's; a real process of somebody else asks."""
    need_root()
    gate = a_hook(short_dir, "gate", "note", "checkpoint.published")
    requests = [
        {"op": "hooks"},
        {"op": "hooks.log"},
        {"op": "hooks.test", "hook": "gate", "data": {"step": 1}},
        {"op": "hooks.switch", "hook": "gate", "enabled": False},
        {"op": "hooks.switch", "hook": "gate", "enabled": True},
        {"op": "hooks.switch", "hook": "none", "enabled": True},
    ]
    async with hooked(short_dir, gate) as (node, line):
        settings = node.parts.admission.current
        node.parts.admission.current = settings.model_copy(update={"mode": "system"})
        short_dir.chmod(0o711)
        (short_dir / "s").chmod(0o666)
        said = await anyio.to_thread.run_sync(ask_as, SOMEBODY, short_dir / "s", *requests)
        hello, *answers = [json.loads(answer) for answer in said.stdout.splitlines()]
        assert hello["ok"], said
        assert [answer["error"]["code"] for answer in answers] == ["not_authorized"] * len(requests)
        assert not (short_dir / "told").exists(), "nothing was run"
        assert [row["enabled"] for row in (await line.ask("hooks"))["hooks"]] == [True]
        assert (await line.ask("audit"))["entries"] == []
        own = await anyio.to_thread.run_sync(ask_as, 0, short_dir / "s", requests[3])
        assert json.loads(own.stdout.splitlines()[1])["changed"] is True


async def test_a_plug_in_adds_a_verb_of_its_own_and_can_shadow_none(short_dir):
    """M066."""
    verb = {"name": "x-acme.predict", "python": "mine:predict", "import_path": [str(short_dir)]}
    async with hooked(short_dir, verbs=[verb]) as (_, line):
        answer = await line.ask("x-acme.predict", data={"step": 6})
        [finding] = answer["run"]["findings"]
        assert finding["facts"]["answer"] == 42
        assert (await line.ask("hooks"))["verbs"][0]["verb"] == "x-acme.predict"
        with pytest.raises(NotFound):
            await line.ask("x-acme.other")
        with pytest.raises(BadRequest):
            await line.ask("acme.predict")


@pytest.mark.parametrize("name", ["status", "acme.predict", "x-acme", "X-acme.predict", "x-.predict"])
def test_a_verb_without_a_prefix_of_its_own_is_refused(name):
    """M066."""
    with pytest.raises(ValueError, match="name"):
        VerbEntry.model_validate({"name": name, "python": "mine:predict"})
