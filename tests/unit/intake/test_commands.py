"""What people ask and that changes something, over a real socket, with real files."""

import os
import shutil
from pathlib import Path

import pytest

from ckptd.catalog import checkpoints, experiments
from ckptd.errors import BadPath, CkptdError, Held, NotAuthorized, NotFound, TimedOut
from ckptd.intake import requests as ask
from ckptd.intake import retentionrequests as keeping
from ckptd.intake.commands import Commands
from ckptd.model import State, new_id
from tests.support import catalog as store
from tests.support.in_process import Training, a_tensor, daemon, eventually
from tests.support.strangers import Stranger
from tests.support.watched import a_watched, live_at


async def path_of(line, checkpoint: str) -> str:
    return str((await line.ask("show", selector=checkpoint))["checkpoint"]["path"])


async def idle(node) -> None:
    """Wait until no job is left."""

    async def done() -> bool:
        return not await node.parts.jobs.unfinished()

    await eventually(done)


async def state_of(line, checkpoint: str) -> tuple[str, str]:
    row = (await line.ask("show", selector=checkpoint))["checkpoint"]
    return row["state"], row["level"]


async def test_verify_finds_damage_reports_it_and_believes_what_is_good_again(short_dir):
    """M071, M072: CORRUPT names file and MiB; the same bytes back are verified again, on whichever inode."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        one, two = await training.saved(1), await training.saved(2)
        path = await path_of(line, one) + "/model.safetensors"
        node.parts.pool.free_checkpoint(one)
        good = Path(path).read_bytes()
        shutil.copy(path, short_dir / "backup")
        with open(path, "r+b") as file:
            file.seek(200)
            file.write(bytes([good[200] ^ 1]))
        result = (await line.ask("verify", selector=one))["results"][0]
        assert (result["ok"], result["state"]) == (False, "corrupt")
        assert [(d["file"], d["kind"], d["mib"]) for d in result["damage"]] == [("model.safetensors", "digest", [0])]
        assert (await line.ask("resolve", selector="latest", project="demo", name="run"))["checkpoint"] == two
        names = [e["event"] for e in (await line.ask("events", limit=50))["events"]]
        assert "checkpoint.corrupt" in names
        os.unlink(path)
        shutil.copy(short_dir / "backup", path)
        assert (await line.ask("verify", selector=one))["results"][0]["ok"]
        assert await state_of(line, one) == ("live", "verified")


async def test_verify_of_a_missing_checkpoint_whose_files_came_back(short_dir):
    """The restored files lie on other inodes; the catalog learns them, so that no scan takes them for new."""
    async with daemon(short_dir, watching={"reconcile_s": 3600}) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        one = await training.saved(1)
        node.parts.pool.free_checkpoint(one)
        path = await path_of(line, one)
        shutil.copytree(path, short_dir / "backup")
        shutil.rmtree(path)
        result = (await line.ask("verify", selector=one))["results"][0]
        assert (result["ok"], result["state"]) == (False, "missing")
        with pytest.raises(NotFound):
            await line.ask("resolve", selector="latest", project="demo", name="run")
        shutil.copytree(short_dir / "backup", path)
        assert (await line.ask("verify", selector=one))["results"][0]["ok"]
        assert await state_of(line, one) == ("live", "verified")
        recorded = await node.read(lambda conn: checkpoints.identity(conn, one))
        assert recorded.ino == os.stat(path).st_ino


async def test_damage_that_the_hot_copy_can_make_good_is_repaired_not_only_reported(short_dir):
    """The arena is not thrown away while it is the last good copy on this node."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        data = a_tensor(3)
        one = await training.saved(1, files={"model.safetensors": data})
        path = await path_of(line, one) + "/model.safetensors"
        with open(path, "r+b") as file:
            file.write(b"\xff")
        assert not (await line.ask("verify", selector=one))["results"][0]["ok"]

        async def repaired() -> bool:
            return await state_of(line, one) == ("live", "verified")

        await eventually(repaired)
        assert Path(path).read_bytes() == data

        async def gone() -> bool:
            return not os.listdir(node.runs / ".ckptd-trash")

        await eventually(gone)  # what was moved aside goes after the repair is verified


async def test_verify_of_a_checkpoint_retired_meanwhile_leaves_it_retired(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        one, _ = await training.saved(1), await training.saved(2)
        from ckptd.intake import commands

        read_back = commands.read_back

        async def slow(tools, read):
            found = await read_back(tools, read)
            async with node.connect() as other:
                await other.ask("remove", selector=one)
            return found

        monkeypatch.setattr(commands, "read_back", slow)
        await line.ask("verify", selector=one)
        assert (await state_of(line, one))[0] == "trashed"


async def test_remove_obeys_promises_and_says_which(short_dir):
    """M094: the newest verified one, a pin, the best: `held` names each; a dry run says the same."""
    # On pressure: else the second may be retired before it is pinned.
    rules = {"keep_best": {"metric": "loss", "mode": "min"}, "drop": "on_pressure"}
    async with daemon(short_dir, retention=rules) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        first = await training.saved(1, metrics={"loss": 0.1})
        second = await training.saved(2, metrics={"loss": 0.5})
        third = await training.saved(3, metrics={"loss": 0.9})
        await line.ask("pin", selector=second)
        for selector, why in ((first, "best"), (second, "pin"), (third, "newest")):
            for dry_run in (True, False):
                with pytest.raises(Held) as caught:
                    await line.ask("remove", selector=selector, dry_run=dry_run)
                assert why in str(caught.value.details["holds"])
        await line.ask("unpin", selector=second)
        dry = await line.ask("remove", selector=second, dry_run=True)
        assert (await state_of(line, second))[0] == "live"
        done = await line.ask("remove", selector=second)
        assert (dry["action"], done["action"]) == ("trash", "trash")
        assert not os.path.exists(done["path"])
        assert (node.runs / ".ckptd-trash" / second).is_dir()


async def test_what_has_no_files_is_forgotten_and_what_is_on_its_way_is_not_removed(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        one = await (await Training(line, str(node.runs)).open()).save(1)
        with pytest.raises(Held, match="on its way"):
            await line.ask("remove", selector=one)
        await node.write(lambda tx: checkpoints.mark_failed(tx, one, {"code": "missing", "message": "gone"}))
        assert (await line.ask("remove", selector=one, dry_run=True))["action"] == "forget"
        assert (await state_of(line, one))[0] == "failed"
        assert (await line.ask("remove", selector=one))["action"] == "forget"
        assert (await state_of(line, one))[0] == "dropped"


async def test_other_peoples_files_are_removed_only_where_the_root_allows_it_by_name(short_dir):
    tree, settings = a_watched(short_dir)
    path = tree / "run7/a.safetensors"
    path.write_bytes(a_tensor())
    (node_runs := short_dir / "runs").mkdir()
    inside = node_runs / "theirs.safetensors"
    inside.write_bytes(a_tensor(2))
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        await Training(line, str(node.runs)).open()
        watched = await live_at(node, path)
        submitted = (await line.ask("submit", path=str(inside), checkpoint=new_id()))["checkpoint"]
        await line.ask("wait", checkpoint=submitted, level="verified", timeout_s=30)
        for one in (watched, submitted):
            with pytest.raises(Held, match="may not delete"):
                await line.ask("remove", selector=one)
        assert path.exists()
        assert inside.exists()


async def test_retention_shows_a_plan_and_carries_out_only_what_was_seen(short_dir):
    """M093: the plan that is printed is the plan that is executed."""
    rules = {"keep_last": 1}
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        ids = [await training.saved(step) for step in (1, 2, 3)]
        await idle(node)
        node.parts.admission.current = node.parts.settings.model_copy(
            update={"retention": type(node.parts.settings.retention)(**rules)}
        )
        plan = (await line.ask("retention", project="demo"))["plans"][0]
        assert {d["checkpoint"] for d in plan["drop"]} == set(ids[:2])
        assert (await line.ask("summary"))["valid"] == 3
        done = await line.ask("retention", project="demo", apply=True, only=[ids[0]])
        assert done["applied"]
        assert [d["checkpoint"] for d in done["plans"][0]["drop"]] == [ids[0]]
        rows = await node.read(lambda conn: checkpoints.get_many(conn, ids))
        assert [rows[one].state for one in ids] == [State.TRASHED, State.LIVE, State.LIVE]


async def test_pin_and_unpin_say_whether_anything_changed(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        one = await (await Training(line, str(node.runs)).open()).saved(1)
        changed = [
            (await line.ask(op, selector=one, **more))["changed"]
            for op, more in (
                ("pin", {"note": "a"}),
                ("pin", {"note": "a"}),
                ("pin", {"note": "b"}),
                ("unpin", {"note": "c"}),
                ("unpin", {}),
            )
        ]
        assert changed == [True, False, True, True, False]
        entries = (await line.ask("audit"))["entries"]
        assert [(e["action"], e["note"]) for e in entries][::2] == [("unpin", "c"), ("pin", "")]
        assert [e["action"] for e in entries] == ["unpin", "pin", "pin"]


async def test_wait_ends_with_the_level_the_end_or_the_time(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        one = await (await Training(line, str(node.runs)).open()).save(1)
        assert (await line.ask("wait", checkpoint=one, level="staged"))["level"] == "staged"
        with pytest.raises(TimedOut):
            await line.ask("wait", checkpoint=one, level="durable", timeout_s=0.2)
        number = await line.send("wait", checkpoint=one, level="durable", timeout_s=30)
        await line.ask("replace", experiment=(await node.read(lambda c: checkpoints.get(c, one))).experiment_id)
        assert (await line.reply(number))["state"] == "replaced"


async def test_one_root_that_can_not_be_read_does_not_keep_the_others_from_being_rebuilt(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        await (await Training(line, str(node.runs)).open()).saved(1)
        gone = short_dir / "gone"
        gone.mkdir()
        await (await Training(line, str(gone), name="other").open()).saved(1)
        await idle(node)
        shutil.rmtree(gone)
        answer = {root["root"]: root for root in (await line.ask("rebuild"))["roots"]}
        assert answer[str(node.runs)]["problem"] == ""
        assert answer[str(gone)]["problem"]


async def test_a_managed_root_is_not_made_a_watched_one(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        await Training(line, str(node.runs)).open()
        with pytest.raises(BadPath, match="managed already"):
            await line.ask("root.add", path=str(node.runs))
        watched = short_dir / "w"
        watched.mkdir()
        assert (await line.ask("root.add", path=str(watched), project="p"))["added"]
        assert not (await line.ask("root.add", path=str(watched) + "/"))["added"]
        [root] = [r for r in (await line.ask("roots"))["roots"] if r["path"] == str(watched)]
        assert root["project"] == "p"


async def test_acts_of_the_operator_are_refused_to_other_users(short_dir):
    """I9: nobody stops, reloads, rebuilds or gives roots to a daemon that serves others too."""
    async with daemon(short_dir, front=False) as node:
        commands = node.parts.service._handlers[ask.Stop].__self__
        assert isinstance(commands, Commands)
        other = Stranger(os.getuid() + 4242)
        requests = (
            ask.Stop(id=1),
            ask.Reload(id=1),
            ask.Rebuild(id=1, root="/etc"),
            ask.RootAdd(id=1, path="/etc"),
        )
        for request in requests:
            with pytest.raises(NotAuthorized):
                await commands.handlers[type(request)](other, request)
        assert not node.parts.stop.is_set()


async def test_another_users_checkpoints_can_not_be_planned_removed_or_waited_for(short_dir):
    rules = {"keep_last": 1}
    async with daemon(short_dir, retention=rules, front=False) as node:
        opened = await node.write(lambda tx: experiments.open_experiment(tx, store.an_experiment(uid=os.getuid())))
        saved = [
            await node.write(lambda tx, s=step: store.climb(tx, store.a_checkpoint(opened.experiment.id, s)))
            for step in (1, 2)
        ]
        commands = node.parts.service._handlers[ask.Stop].__self__
        other = Stranger(os.getuid() + 4242)
        retain = node.parts.service._handlers[keeping.Retention]
        assert (await retain(other, keeping.Retention(id=1, apply=True)))["plans"] == []
        assert (await node.read(lambda conn: checkpoints.state_of(conn, saved[0].id))) is State.LIVE
        with pytest.raises(TimedOut):
            await commands.wait(other, ask.Wait(id=1, checkpoint=saved[0].id, timeout_s=0.1))
        for request in (ask.Pin(id=1, selector=saved[0].id), ask.Remove(id=1, selector=saved[0].id)):
            with pytest.raises(CkptdError):
                await commands.handlers[type(request)](other, request)


async def test_reload_reads_the_configuration_again_and_names_what_changed(short_dir, monkeypatch):
    from ckptd import daemon as composition
    from ckptd.origins import Loaded

    async with daemon(short_dir, front=False) as node, node.connect() as line:
        old = node.parts.settings
        new = old.model_copy(
            update={
                "retention": type(old.retention)(keep_last=3),
                "log": type(old.log)(level="debug"),
            }
        )
        monkeypatch.setattr(composition, "_load", lambda _options: Loaded(new, {}, (), ()))
        answer = await line.ask("reload")
        assert answer["changed"] == ["log.level", "retention.keep_last"]
        assert answer["restart_needed"] == ["log.level"]
        assert node.parts.admission.settings().retention.keep_last == 3


async def test_stop_answers_and_then_drains(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await line.ask("stop")
        assert node.parts.stop.is_set()
