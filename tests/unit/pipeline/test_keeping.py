"""Keeping and making room with real files: strips, restores, budgets, the free-space floor, plans that are named."""

import os

import anyio
import pytest
import structlog

from ckptd.catalog import burials, checkpoints, eventlog, holds, strips
from ckptd.catalog.strips import StripState
from ckptd.errors import Changed, Held, NotFound
from ckptd.pipeline import relieve, retain, strip, trash
from ckptd.retention import digest
from ckptd.rules import Rules
from ckptd.worker.protocol import Usage, Used
from tests.support.in_process import Training, a_tensor, daemon, eventually

FILES = {"model.safetensors": a_tensor(1), "optimizer.safetensors": a_tensor(2), "state.json": b'{"v":1}'}
FREE = 1 << 30

pytestmark = pytest.mark.usefixtures("still_upkeep")


async def saves(node, line, count: int, **more) -> list[str]:
    training = await Training(line, str(node.runs)).open()
    ids = [await training.saved(step, files=FILES, **more) for step in range(1, count + 1)]

    async def done() -> bool:
        return not await node.parts.jobs.unfinished()

    await eventually(done)
    return ids


async def saved_alone(node, line, count: int) -> list[str]:
    """Save, with the pipeline running only meanwhile: what follows is the test's own doing."""
    async with anyio.create_task_group() as group:
        group.start_soon(node.parts.pipeline.run, node.parts.stop, lambda: False)
        ids = await saves(node, line, count)
        group.cancel_scope.cancel()
    return ids


def follow(node, **rules) -> Rules:
    """Have these rules hold from now on."""
    found = Rules(**rules)
    node.parts.admission.current = node.parts.admission.settings().model_copy(update={"retention": found})
    return found


async def row(node, checkpoint: str):
    return await node.read(lambda conn: checkpoints.get(conn, checkpoint))


async def states(node, ids: list[str]) -> str:
    """One letter each: what became of them."""
    return "".join([str((await row(node, one)).state)[0] for one in ids])


def on_disk(node, step: int) -> list[str]:
    return sorted(os.listdir(node.runs / f"demo/run/step_{step:010d}"))


async def told(node, name: str) -> list[dict]:
    logged = await node.read(eventlog.page)
    return [dict(one.event.data) for one in logged if one.event.name == name]


def disk_with(node, monkeypatch, free_bytes: int) -> None:
    """Let every root's file system seem to have this much room."""
    call = node.parts.workers.call

    async def said(request, **more):
        if isinstance(request, Usage):
            return Used(total_bytes=1 << 40, free_bytes=free_bytes, filesystem="ext4", direct_io=True, leases=True)
        return await call(request, **more)

    monkeypatch.setattr(node.parts.workers, "call", said)


async def test_optimizer_states_of_older_ones_go_to_the_trash_and_the_rest_stays_whole(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 3)
        before = (await row(node, ids[0])).size_bytes
        rules = follow(node, strip_after=1, trash_grace_s=0)
        experiment = (await row(node, ids[0])).experiment_id
        done = await retain.apply(node.parts.tools, experiment, rules)
        assert [one.id for one in done.strip] == [ids[1], ids[0]]
        assert (done.drop, await states(node, ids)) == ((), "lll")
        assert on_disk(node, 1) == ["manifest.json", "model.safetensors", "state.json", "stripped.json"]
        assert on_disk(node, 3) == ["manifest.json", *sorted(FILES)]
        assert (await row(node, ids[0])).size_bytes == before - len(FILES["optimizer.safetensors"])
        for one in ids:
            assert (await line.ask("verify", selector=one))["results"][0]["ok"], "what is left is as it was written"
        assert (await told(node, "checkpoint.stripped"))[0]["files"] == ["optimizer.safetensors"]
        assert (await retain.apply(node.parts.tools, experiment, rules)).strip == (), "once is enough"
        assert await trash.purge(node.parts.tools) == 2
        assert os.listdir(node.runs / ".ckptd-trash") == []
        with pytest.raises(NotFound, match="gone"):
            await line.ask("restore", selector=ids[0])


async def test_what_was_stripped_comes_back_while_the_trash_holds_it(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 2)
        rules = follow(node, strip_after=1)
        experiment = (await row(node, ids[0])).experiment_id

        async def written() -> int:
            return (await line.ask("stats"))["experiments"][0]["written_bytes"]

        before = await written()
        await retain.apply(node.parts.tools, experiment, rules)
        assert (await row(node, ids[0])).size_bytes < (await row(node, ids[1])).size_bytes
        assert await written() == before, "it was written all the same"
        back = await line.ask("restore", selector=ids[0])
        assert (back["restored"], back["pinned"]) == (["optimizer.safetensors"], True)
        assert on_disk(node, 1) == ["manifest.json", *sorted(FILES)]
        assert await written() == before
        assert (await line.ask("verify", selector=ids[0]))["results"][0]["ok"]
        assert [f["path"] for f in (await line.ask("show", selector=ids[0]))["files"]] == list(FILES)
        assert (await retain.apply(node.parts.tools, experiment, rules)).strip == (), "a pinned one is never stripped"
        assert await node.read(lambda conn: strips.of_checkpoint(conn, ids[0])) is None


async def test_a_strip_never_begins_on_what_a_promise_holds_by_then(short_dir):
    """Pinned, leased, the newest: each came between the plan and its execution."""
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 3)
        rules = follow(node, strip_after=1)
        await node.write(lambda tx: holds.pin(tx, ids[0], 1000))
        await node.write(lambda tx: holds.lease(tx, ids[1], "reader", 60.0))
        rows = [await row(node, one) for one in ids]
        assert await strip.begin_all(node.parts.tools, rows, rules) == ()
        assert on_disk(node, 1) == on_disk(node, 2) == on_disk(node, 3)


async def test_a_strip_that_a_crash_cut_short_is_carried_on_and_verifies_meanwhile(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 2)
        rules = follow(node, strip_after=1)
        with monkeypatch.context() as patch:

            async def nothing(*_):
                return None

            patch.setattr(strip, "_try", nothing)  # the daemon dies here, with the intent on the disk
            await retain.apply(node.parts.tools, (await row(node, ids[0])).experiment_id, rules)
        assert (await node.read(lambda conn: strips.of_checkpoint(conn, ids[0]))).state is StripState.STRIPPING
        assert (await line.ask("verify", selector=ids[0]))["results"][0]["ok"]
        assert "optimizer.safetensors" in on_disk(node, 1)
    async with daemon(short_dir, front=False) as node:
        assert await strip.resume(node.parts.tools) == 1
        assert "optimizer.safetensors" not in on_disk(node, 1)
        assert await strip.resume(node.parts.tools) == 0


async def test_a_stripped_checkpoint_that_is_retired_takes_what_was_stripped_along(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 2)
        experiment = (await row(node, ids[0])).experiment_id
        await retain.apply(node.parts.tools, experiment, follow(node, strip_after=1))
        await retain.apply(node.parts.tools, experiment, follow(node, keep_last=1, trash_grace_s=0))
        await trash.purge(node.parts.tools)
        assert (await states(node, ids), os.listdir(node.runs / ".ckptd-trash")) == ("dl", [])


async def test_a_catalog_made_again_knows_what_was_stripped(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 2)
        await retain.apply(node.parts.tools, (await row(node, ids[0])).experiment_id, follow(node, strip_after=1))
    for left in (short_dir / "state").glob("catalog.sqlite*"):
        left.unlink()
    async with daemon(short_dir) as node, node.connect() as line:
        await line.ask("root.add", path=str(node.runs), kind="managed")
        await line.ask("rebuild")

        async def verified() -> bool:
            return (await states(node, ids)) == "ll" and all([(await row(node, one)).is_good for one in ids])

        await eventually(verified)
        assert (await line.ask("restore", selector=ids[0]))["restored"] == ["optimizer.safetensors"]
        assert on_disk(node, 1) == ["manifest.json", *sorted(FILES)]


async def test_a_retired_checkpoint_comes_back_and_is_pinned(short_dir):
    async with daemon(short_dir, retention={"keep_last": 1}) as node, node.connect() as line:
        ids = await saves(node, line, 2)
        assert await states(node, ids) == "tl"
        back = await line.ask("restore", selector=ids[0])
        assert (back["restored"], back["pinned"]) == ("checkpoint", True)
        assert (await row(node, ids[0])).is_good, "the same bytes: it is as verified as it was"
        rules = node.parts.admission.settings().retention
        assert (await retain.apply(node.parts.tools, (await row(node, ids[0])).experiment_id, rules)).drop == ()
        with pytest.raises(NotFound, match="nothing to restore"):
            await line.ask("restore", selector=ids[0])
        assert await trash.resume(node.parts.tools) == 0, "its tombstone is forgotten"
        with pytest.raises(Held):
            await line.ask("remove", selector=ids[0])


async def test_nothing_comes_back_once_its_unlinking_has_begun(short_dir):
    async with daemon(short_dir, retention={"keep_last": 1, "trash_grace_s": 0}) as node, node.connect() as line:
        ids = await saves(node, line, 2)
        [of] = await node.read(trash.graveyards)
        [one] = await node.read(lambda conn: trash.retired_before(conn, of, node.parts.clock.now(), 0))
        await trash._begun(node.parts.tools, [one])
        with pytest.raises(NotFound, match="unlinking has begun"):
            await line.ask("restore", selector=ids[0])


async def test_below_the_floor_the_alarm_comes_first_then_the_trash_then_the_oldest_that_nothing_holds(
    short_dir, monkeypatch
):
    """M101."""
    async with daemon(short_dir, front=False, alerts={"look_s": 3600}) as node, node.connect() as line:
        ids = await saved_alone(node, line, 6)
        size = (await row(node, ids[0])).size_bytes
        await node.write(lambda tx: holds.pin(tx, ids[1], 1000))
        await line.ask("remove", selector=ids[4])
        settings = node.parts.admission.settings()
        disk = settings.disk.model_copy(update={"free_bytes_min": FREE})
        node.parts.admission.current = settings.model_copy(update={"disk": disk})
        disk_with(node, monkeypatch, FREE - size)
        [relief] = await relieve.run(node.parts.tools)
        assert (await states(node, ids), relief.freed_bytes) == ("lllldl", size), "the trash was enough"
        disk_with(node, monkeypatch, FREE - 2 * size)
        await relieve.run(node.parts.tools)
        assert await states(node, ids) == "dldldl", "the pinned one stays"
        assert os.listdir(node.runs / ".ckptd-trash") == []
        logged = await node.read(eventlog.page)
        names = [one.event.name for one in logged]
        assert names.index("disk.relief") < names.index("checkpoint.dropped")
        assert names.count("disk.relief") == 1, "what lasts is told once an hour"
        assert "disk.low" not in names, "that is the alarm of [alerts], which nobody has looked at"
        disk_with(node, monkeypatch, 0)
        with structlog.testing.capture_logs() as lines:
            for _ in range(3):
                await relieve.run(node.parts.tools)
        assert await states(node, ids) == "dldddl", "only the pinned and the newest are left, and nothing more goes"
        said = [one["event"] for one in lines if one["event"].startswith(("disk.held", "space.shed"))]
        assert said == ["space.shed", "disk.held"], "a look that can do no more says so once an hour"


async def test_one_act_of_running_low_on_a_mount_is_one_event_of_each_meaning(short_dir, monkeypatch):
    """Two roots on one disk, both below the floor of [disk] and the disk below that of [alerts], looked at again and again."""
    alerts = {"look_s": 3600, "disk_free_bytes_min": FREE, "disk_free_share_min": 0, "rss_bytes_max": 0}
    async with daemon(short_dir, front=False, alerts=alerts) as node, node.connect() as line:
        other = node.runs.with_name("other")
        for place in (node.runs, other):
            await Training(line, str(place)).open()
            await node.parts.observers.status.usage(str(place))
        settings = node.parts.admission.settings()
        disk = settings.disk.model_copy(update={"free_bytes_min": FREE})
        node.parts.admission.current = settings.model_copy(update={"disk": disk})
        for free in (FREE - 1, FREE - 2, FREE + FREE // 2, FREE - 1):
            disk_with(node, monkeypatch, free)
            for _ in range(2):
                await node.parts.observers.alerts.look()
                await relieve.run(node.parts.tools)
        told = [one.event for one in await node.read(eventlog.page)]
        low = [one.data for one in told if one.name == "disk.low"]
        relief = [one.data for one in told if one.name == "disk.relief"]
        assert (len(low), len(relief)) == (2, 2), "once, and once more after it was over"
        assert all(one["roots"] == sorted(map(str, (node.runs, other))) for one in relief)
        assert low[0]["mount"] == relief[0]["mount"]


async def test_a_root_over_its_budget_sheds_its_oldest_into_the_trash(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        ids = await saved_alone(node, line, 5)
        size = (await row(node, ids[0])).size_bytes
        settings = node.parts.admission.settings()
        node.parts.admission.current = settings.model_copy(
            update={"disk": settings.disk.model_copy(update={"root_bytes_max": 3 * size})}
        )
        await relieve.run(node.parts.tools)
        assert await states(node, ids) == "ttlll"
        await relieve.run(node.parts.tools)
        assert await states(node, ids) == "ttlll"
        follow(node, project_bytes_max=2 * size)
        await relieve.run(node.parts.tools)
        assert await states(node, ids) == "tttll"
        why = (await told(node, "checkpoint.trashed"))[-1]["why"]
        assert why.startswith("over the budget of project demo")


async def test_a_plan_that_was_named_is_done_as_it_was_or_not_at_all(short_dir):
    """M100: what a person saw is what is done."""
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 4)
        follow(node, keep_last=2)
        seen = await line.ask("retention")
        assert [one["checkpoint"] for one in seen["plans"][0]["drop"]] == [ids[1], ids[0]]
        await line.ask("pin", selector=ids[0])
        with pytest.raises(Changed, match="is not what there is to do now"):
            await line.ask("retention", apply=True, plan=seen["digest"])
        assert await states(node, ids) == "llll"
        seen = await line.ask("retention")
        done = await line.ask("retention", apply=True, plan=seen["digest"])
        assert (done["digest"], await states(node, ids)) == (seen["digest"], "ltll")
        assert (await told(node, "retention.applied"))[-1]["retired"] == 1


async def test_a_metric_between_plan_and_tombstone_counts(short_dir, monkeypatch):
    """The plan is looked at again in the transaction that writes its tombstones, and made again when it does not stand."""
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 4)
        rules = follow(node, keep_last=1)
        whole = retain.still_holds
        calls = []

        async def late(tx, *given):
            if not calls:
                await holds.pin(tx, ids[1], 1000)
            calls.append(given)
            return await whole(tx, *given)

        monkeypatch.setattr(retain, "still_holds", late)
        experiment = (await row(node, ids[0])).experiment_id
        done = await retain.apply(node.parts.tools, experiment, rules)
        assert sorted(one.checkpoint.step for one in done.drop) == [1, 3]
        assert await states(node, ids) == "tltl"
        assert digest([done]) != digest([await retain.plan(node.parts.tools, experiment, rules)])


async def test_ten_thousand_are_retired_in_small_transactions(short_dir, monkeypatch):
    """M097: no transaction writes more than TOMBSTONES_MAX, and no job waits for more than MOVES_MAX renames."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        ids = await saved_alone(node, line, 7)
        rules = follow(node, keep_last=1)
        monkeypatch.setattr(retain, "TOMBSTONES_MAX", 2)
        monkeypatch.setattr(retain, "MOVES_MAX", 3)
        written, whole = [], burials.bury

        async def bury(tx, why):
            written.append(len(why))
            await whole(tx, why)

        monkeypatch.setattr(burials, "bury", bury)
        await retain.apply(node.parts.tools, (await row(node, ids[0])).experiment_id, rules)
        assert (written, await states(node, ids)) == ([2, 2, 2], "ttttttl")
        assert len(os.listdir(node.runs / ".ckptd-trash")) == 3
        assert await trash.resume(node.parts.tools) == 3
        assert len(os.listdir(node.runs / ".ckptd-trash")) == 6


async def test_why_a_checkpoint_stays_or_goes_is_said_with_what_would_change_it(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 4)
        follow(node, keep_last=2, drop="on_pressure")
        await line.ask("pin", selector=ids[0], note="table 3")
        said = await line.ask("retention.explain", selector=ids[0])
        assert (said["verdict"], said["why"]) == ("keep", [f"pin of uid {os.getuid()}: table 3"])
        assert said["looked"] == [
            {"rule": "keep_last", "words": "last 2", "keeps": False, "why": "it is number 4 from the newest"}
        ]
        assert said["changes"] == [f"without the pin of uid {os.getuid()}: table 3: spare"]
        follow(node, keep_last=2)
        newer = await line.ask("retention.explain", selector=ids[2])
        assert newer["changes"] == ["without keep_last: spare", "after 1 more verified save: drop"]
        goes = await line.ask("retention.explain", selector=ids[1])
        assert (goes["verdict"], goes["why"]) == ("drop", ["no rule keeps step 2"])
        await line.ask("retention", apply=True)
        with pytest.raises(NotFound, match="is in the trash") as gone:
            await line.ask("retention.explain", selector=ids[1])
        assert "ckpt restore" in gone.value.hint


async def test_tags_are_given_and_taken_and_keep(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await saves(node, line, 3)
        follow(node, keep_last=1, keep_tags=("paper",))
        changed = await line.ask("checkpoint.tag", selector=ids[0], add=["paper", "x"])
        assert (changed["tags"], changed["changed"]) == (["paper", "x"], True)
        assert not (await line.ask("checkpoint.tag", selector=ids[0], add=["x"]))["changed"]
        await line.ask("retention", apply=True)
        assert await states(node, ids) == "ltl"
        assert (await line.ask("checkpoint.tag", selector=ids[0], remove=["paper"]))["tags"] == ["x"]
        await line.ask("retention", apply=True)
        assert await states(node, ids) == "ttl"
        assert (await told(node, "checkpoint.tagged"))[-1]["tags"] == ["x"]


@pytest.mark.parametrize(("switch", "links"), [("save_last", ["best", "best_loss"]), ("save_best", ["latest"])])
async def test_a_switch_that_is_off_takes_its_link_away_and_leaves_the_others(short_dir, switch, links):
    """M009: the newest verified one stays whatever the switches say."""
    rules = {"keep_last": 1, "keep_best": {"metric": "loss", "mode": "min"}, switch: False}
    async with daemon(short_dir, retention=rules) as node, node.connect() as line:
        ids = await saves(node, line, 2, metrics={"loss": 1.0})
        here = node.runs / "demo/run"
        assert sorted(path.name for path in here.iterdir() if path.is_symlink()) == links
        assert (await row(node, ids[1])).is_good
