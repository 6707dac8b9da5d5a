"""Each stage with real files: digests, repair, links, retention, trash."""

import os
import shutil

import anyio
from sqlalchemy import update

from ckptd import pipeline
from ckptd.catalog import checkpoints, schema
from ckptd.model import State, new_id
from tests.support.in_process import Training, a_tensor, daemon, eventually, sha256
from tests.support.rungs import in_turns, rungs
from tests.support.watched import a_watched, live_at, rows_at

SELDOM = {"reconcile_s": 3600, "reconcile_max_s": 3600}  # a scan of its own would take what is damaged for missing


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
    gates = in_turns(monkeypatch, "publish", "verify", "repair")
    async with daemon(short_dir, watching=SELDOM) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        checkpoint = await training.save(1, files={"model.safetensors": data})
        levels = await rungs(line, checkpoint, gates)
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
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
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
        await line.ask("wait", checkpoint=one, level="verified", timeout_s=30)
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
        assert (await line.ask("wait", checkpoint=one, level="durable", timeout_s=30))["state"] == "missing"


async def test_a_symlink_is_refused_once_and_for_good(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        (short_dir / "mine").mkdir()
        path = short_dir / "mine/link.safetensors"
        path.symlink_to("/etc/passwd")
        one = (await line.ask("submit", path=str(path), checkpoint=new_id()))["checkpoint"]
        answer = await line.ask("wait", checkpoint=one, level="durable", timeout_s=30)
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


async def renumbered(tx) -> None:
    """The machine started again: every disk has another number than the catalog knows."""
    await tx.conn.execute(update(schema.checkpoint).values(dev=schema.checkpoint.c.dev + 1))


async def test_a_damaged_publish_is_written_again_on_a_disk_with_another_number(short_dir, monkeypatch):
    path = short_dir / "runs/demo/run/step_0000000001/model.safetensors"

    async def flip(job, tools):
        await tools.catalog.write(renumbered)
        with open(path, "r+b") as file:
            file.write(b"\xff")

    before_verify(monkeypatch, flip)
    async with daemon(short_dir) as node, node.connect() as line:
        await (await Training(line, str(node.runs)).open()).saved(1, files={"model.safetensors": a_tensor(7)})
        assert path.read_bytes() == a_tensor(7)
        await eventually(lambda: not os.listdir(node.runs / ".ckptd-trash"))
