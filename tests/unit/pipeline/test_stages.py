"""Each stage with real files: digests, repair, links, retention, trash."""

import os
import shutil
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from ckptd import pipeline
from ckptd.catalog import checkpoints
from ckptd.catalog.tombstones import tombstones_before
from ckptd.errors import RootDegraded
from ckptd.model import State, new_id
from ckptd.pipeline import retain, verify
from ckptd.worker.protocol import DamageRecord, Purge, Trash
from tests.support.in_process import Training, a_tensor, daemon, eventually, sha256
from tests.support.watched import a_watched, live_at, rows_at


async def state(node, checkpoint: str) -> State:
    return await node.read(lambda conn: checkpoints.state_of(conn, checkpoint))


def before_verify(monkeypatch, act) -> None:
    """Do something once, right after the publish."""
    real, todo = pipeline.STAGES["verify"], [act]

    async def run(job, tools):
        if todo:
            await todo.pop()(job, tools)
        return await real(job, tools)

    monkeypatch.setitem(pipeline.STAGES, "verify", run)


async def test_a_bit_flipped_right_after_publish_is_found_and_written_again_from_memory(short_dir, monkeypatch):
    """Promise 1: verified means a digest; while the arena holds the bytes, damage is repaired to new inodes."""
    data, damaged = a_tensor(7), []

    async def flip(job, tools):
        path = short_dir / "runs/demo/run/step_0000000001/model.safetensors"
        damaged.append(path.stat().st_ino)
        with open(path, "r+b") as file:
            file.seek(500)
            byte = file.read(1)
            file.seek(500)
            file.write(bytes([byte[0] ^ 4]))

    before_verify(monkeypatch, flip)
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        checkpoint = await training.save(1, files={"model.safetensors": data})
        levels = [(await line.push("level", checkpoint=checkpoint)) for _ in range(4)]
        assert [(p["level"], p["state"]) for p in levels] == [
            ("staged", "pending"),
            ("durable", "live"),
            ("durable", "corrupt"),
            ("verified", "live"),
        ]
        path = node.runs / "demo/run/step_0000000001/model.safetensors"
        assert path.read_bytes() == data
        assert path.stat().st_ino != damaged[0]
        recorded = await node.read(lambda conn: checkpoints.identity(conn, checkpoint))
        assert recorded.ino == path.parent.stat().st_ino
        await eventually(lambda: not os.listdir(node.runs / ".ckptd-trash"))


async def test_a_directory_that_vanished_right_after_publish_is_written_again_too(short_dir, monkeypatch):
    async def vanish(job, tools):
        shutil.rmtree(short_dir / "runs/demo/run/step_0000000001")

    before_verify(monkeypatch, vanish)
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).save(1)
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=10)
        await eventually((node.runs / "demo/run/step_0000000001/manifest.json").exists)

        async def live() -> bool:
            return await state(node, checkpoint) is State.LIVE

        await eventually(live)


async def test_damage_without_a_copy_is_reported_and_links_let_go_of_it(short_dir, monkeypatch):
    """M072, M108: `latest` never leads to what is not verified."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await training.saved(1)
        latest = node.runs / "demo/run/latest"

        async def flip(job, tools):
            node.parts.pool.free_checkpoint(job.checkpoint_id)
            with open(node.runs / "demo/run/step_0000000002/model.safetensors", "r+b") as file:
                file.write(b"\xff")

        before_verify(monkeypatch, flip)
        second = await training.save(2)
        push = await line.push("level", checkpoint=second, state="corrupt")
        assert push["error"]["damage"][0]["file"] == "model.safetensors"
        await eventually(lambda: os.readlink(latest) == "step_0000000001")


async def test_a_file_overwritten_before_it_was_read_back_is_no_damage(short_dir, monkeypatch):
    """The second half of its life is another checkpoint's; crying corruption would be a false alarm each epoch."""
    tree, settings = a_watched(short_dir)
    path = tree / "run7/last.safetensors"
    path.write_bytes(a_tensor(1))

    async def overwrite(job, tools):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(a_tensor(2))
        fresh.rename(path)

    before_verify(monkeypatch, overwrite)
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        await live_at(node, path)
        await eventually(lambda: _two(node, path))
        assert [found for _, found in await rows_at(node, path)] == ["missing", "live"]
        events = [event["event"] for event in (await line.ask("events", limit=100))["events"]]
        assert "checkpoint.corrupt" not in events


async def _two(node, path) -> bool:
    return [found for _, found in await rows_at(node, path)] == ["missing", "live"]


async def test_a_file_is_digested_as_sha256sum_would(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        path = short_dir / "mine/a.safetensors"
        path.parent.mkdir()
        path.write_bytes(a_tensor(3, 3_000_000))
        one = (await line.ask("submit", path=str(path), checkpoint=new_id()))["checkpoint"]
        await line.ask("wait", checkpoint=one, level="verified", timeout_s=10)
        [file] = await node.read(lambda conn: checkpoints.files(conn, one))
        assert (file.path, file.sha256, len(file.xxh3)) == ("", sha256(path), 3)


async def test_a_large_file_is_durable_before_it_is_read_back(short_dir, monkeypatch):
    from ckptd.pipeline import publish

    monkeypatch.setattr(publish, "TOGETHER_BYTES_MAX", 10)
    gate = anyio.Event()
    real = pipeline.STAGES["verify"]

    async def held(job, tools):
        await gate.wait()
        return await real(job, tools)

    monkeypatch.setitem(pipeline.STAGES, "verify", held)
    async with daemon(short_dir) as node, node.connect() as line:
        path = short_dir / "mine/a.safetensors"
        path.parent.mkdir()
        path.write_bytes(a_tensor())
        one = (await line.ask("submit", path=str(path), checkpoint=new_id()))["checkpoint"]
        assert (await line.push("level", checkpoint=one, level="durable"))["state"] == "live"
        gate.set()
        await line.push("level", checkpoint=one, level="verified")


async def test_a_file_that_vanishes_while_pending_is_missing_not_failed(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        path = short_dir / "mine/torn.safetensors"
        path.parent.mkdir()
        path.write_bytes(a_tensor()[:-10])
        one = (await line.ask("submit", path=str(path), checkpoint=new_id()))["checkpoint"]
        path.unlink()
        assert (await line.ask("wait", checkpoint=one, level="durable", timeout_s=15))["state"] == "missing"


async def test_a_symlink_is_refused_once_and_for_good(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        (short_dir / "mine").mkdir()
        path = short_dir / "mine/link.safetensors"
        path.symlink_to("/etc/passwd")
        one = (await line.ask("submit", path=str(path), checkpoint=new_id()))["checkpoint"]
        answer = await line.ask("wait", checkpoint=one, level="durable", timeout_s=10)
        assert (answer["state"], answer["error"]["code"]) == ("failed", "bad_path")


async def test_a_link_name_that_a_person_took_costs_nothing_else(short_dir):
    async with daemon(short_dir, retention={"keep_last": 1}) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        (node.runs / "demo/run").mkdir(parents=True)
        (node.runs / "demo/run/latest").write_text("mine")
        first = await training.saved(1)
        await training.saved(2)

        async def retired() -> bool:
            return await state(node, first) is State.TRASHED

        await eventually(retired)
        assert (node.runs / "demo/run/latest").read_text() == "mine"


# -- retention ------------------------------------------------------------------------------------


async def trashed(node, line, count: int) -> list[str]:
    """Save one more than `count` and have all but the last retired; nothing may be moved before it is told to."""
    training = await Training(line, str(node.runs)).open()
    ids = [await training.saved(step) for step in range(1, count + 2)]

    async def done() -> bool:
        return not await node.parts.jobs.unfinished()

    await eventually(done)
    return ids[:count]


def only_last(node) -> None:
    rules = type(node.parts.settings.retention)(keep_last=1, trash_grace_s=0)
    node.parts.admission.current = node.parts.settings.model_copy(update={"retention": rules})


async def test_a_trash_that_fails_half_way_is_carried_on_and_holds_up_nothing(short_dir, monkeypatch):
    """Tombstones come first, so the plan stands; each file is moved on its own, now or at the next look."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(node.parts.pipeline.run, node.parts.stop, lambda: False)
                ids = await trashed(node, line, 4)
                scope.cancel()
        only_last(node)
        call, moved = node.parts.workers.call, []

        async def flaky(request, **more):
            if isinstance(request, Trash):
                moved.append(request.trash)
                if len(moved) in {2, 3}:
                    raise RootDegraded("hangs")
            return await call(request, **more)

        monkeypatch.setattr(node.parts.workers, "call", flaky)
        experiment = (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id
        await retain.apply(node.parts.tools, experiment, node.parts.admission.settings().retention)
        assert [await state(node, one) for one in ids] == [State.TRASHED] * 4
        assert len(os.listdir(node.runs / ".ckptd-trash")) == 2
        assert await retain.resume(node.parts.tools) == 2, "only what was not moved yet"
        assert sorted(os.listdir(node.runs / ".ckptd-trash")) == sorted(ids)
        assert await retain.resume(node.parts.tools) == 0


async def test_a_restart_looks_at_every_tombstone_once_however_many_there_are(short_dir, monkeypatch):
    monkeypatch.setattr(retain, "MOVES_MAX", 2)
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await trashed(node, line, 5)
        experiment = (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id

        async def tombstones(tx):
            for one in ids:
                await checkpoints.mark_trashed(tx, one, one, "test")

        await node.write(tombstones)  # and the daemon dies before it moves anything
        assert experiment
    async with daemon(short_dir, front=False) as node:
        looked = [await retain.resume(node.parts.tools) for _ in range(4)]
        assert looked == [2, 2, 1, 0]
        assert sorted(os.listdir(node.runs / ".ckptd-trash")) == sorted(ids)


async def test_a_purge_that_fails_for_one_goes_on_with_the_others(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await trashed(node, line, 3)
        only_last(node)
        experiment = (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id
        await retain.apply(node.parts.tools, experiment, node.parts.admission.settings().retention)
        call = node.parts.workers.call

        async def flaky(request, **more):
            if isinstance(request, Purge) and request.trash == ids[0]:
                raise RootDegraded("hangs")
            return await call(request, **more)

        with monkeypatch.context() as patch:
            patch.setattr(node.parts.workers, "call", flaky)
            assert await retain.purge(node.parts.tools) == 2
        assert [await state(node, one) for one in ids] == [State.TRASHED, State.DROPPED, State.DROPPED]
        assert await retain.purge(node.parts.tools) == 1
        assert os.listdir(node.runs / ".ckptd-trash") == []


async def test_long_graces_at_the_head_do_not_keep_short_ones_from_being_purged(short_dir, monkeypatch):
    async with daemon(short_dir) as node, node.connect() as line:
        ids = await trashed(node, line, 3)
        only_last(node)
        experiment = (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id
        await retain.apply(node.parts.tools, experiment, node.parts.admission.settings().retention)
        monkeypatch.setattr(retain, "PURGES_MAX", 1)
        horizon = node.parts.clock.now() + timedelta(seconds=5)
        found = await node.read(lambda conn: tombstones_before(conn, horizon))
        assert sorted(one.id for one in found) == sorted(ids)
        slow = type(node.parts.settings.retention)(keep_last=1, trash_grace_s=3600)
        fast = node.parts.admission.settings()
        rules = iter([slow, slow, fast.retention])
        monkeypatch.setattr(type(fast), "rules_for", lambda *_: next(rules))
        assert await retain.purge(node.parts.tools) == 1
        assert await state(node, found[2].id) is State.DROPPED


async def test_what_is_not_ours_any_more_is_never_moved_or_unlinked(short_dir):
    """A directory under the old name with other bytes belongs to whoever made it."""
    async with daemon(short_dir) as node, node.connect() as line:
        [one] = await trashed(node, line, 1)
        path = Path((await node.read(lambda conn: checkpoints.get(conn, one))).path)
        shutil.rmtree(path)
        path.mkdir()
        (path / "theirs").write_text("precious")
        await node.write(lambda tx: checkpoints.mark_trashed(tx, one, one, "test"))
        only_last(node)
        await retain.purge(node.parts.tools)
        assert (path / "theirs").read_text() == "precious"
        assert await state(node, one) is State.DROPPED


async def test_ten_newest_stay_exactly_and_a_restart_changes_nothing(short_dir):
    """M093."""
    settings = {"retention": {"keep_last": 3}}
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        for step in range(1, 7):
            await training.saved(step)

        async def three() -> bool:
            return len(_steps(node)) == 3

        await eventually(three)
    async with daemon(short_dir, **settings) as node:
        await anyio.sleep(0.3)
        assert _steps(node) == ["step_0000000004", "step_0000000005", "step_0000000006"]


def _steps(node) -> list[str]:
    return sorted(name for name in os.listdir(node.runs / "demo/run") if name.startswith("step_"))


@pytest.mark.parametrize(("mib", "named"), [(3, 3), (5000, verify.DAMAGED_MIB_MAX)])
def test_a_map_of_endless_damage_is_cut_so_that_it_can_be_told(mib, named):
    found = verify._damage(DamageRecord("model", "digest", "", list(range(mib))))
    assert len(found.mib) == named
    assert found.detail == ("" if mib == named else "5000 MiB in all")
