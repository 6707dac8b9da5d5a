"""What people said of a path stays with it when other bytes lie there: pins and tags, in the same transaction."""

import json
import os

import pytest

from ckptd.catalog import checkpoints, holds, roots
from ckptd.errors import SourceChanged
from ckptd.model import Damage
from ckptd.pipeline import retain, trash
from ckptd.worker.protocol import Verify
from tests.support.in_process import a_tensor, daemon, eventually, sha256
from tests.support.watched import a_watched, live_at, rows_at


async def idle(node) -> bool:
    return not await node.parts.jobs.unfinished()


def trainer_checkpoint(tree, step):
    path = tree / f"run7/checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(a_tensor(step))
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.0, "log_history": []}))
    return path


async def taken(node, path) -> str:
    one = await live_at(node, path)
    await eventually(lambda: idle(node))
    return one


async def after(node, path, old: str) -> str:
    """Wait until another row than `old` is the live one at a path."""

    async def one() -> str:
        found = [id_ for id_, state in await rows_at(node, path) if state == "live" and id_ != old]
        return found[0] if found else ""

    new = await eventually(one)
    await eventually(lambda: idle(node))
    return new


async def pins(node, one: str) -> list[str]:
    now = node.parts.tools.clock.now()
    held = await node.read(lambda conn: holds.of_checkpoint(conn, one, now))
    return [hold.note for hold in held if hold.kind == "pin"]


async def told(line, *names: str) -> list[tuple[str, str]]:
    events = (await line.ask("events", limit=200))["events"]
    return [(event["event"], event["checkpoint"]) for event in events if event["event"] in names]


async def retire(node, one: str, **rules) -> None:
    settings = node.parts.settings
    found = type(settings.retention)(trash_grace_s=0, **rules)
    node.parts.admission.current = settings.model_copy(update={"retention": found})
    row = await node.read(lambda conn: checkpoints.get(conn, one))
    await retain.apply(node.parts.tools, row.experiment_id, found)
    await trash.purge(node.parts.tools)


async def test_a_file_added_to_a_pinned_checkpoint_of_a_watched_root_does_not_lose_its_pin(short_dir):
    tree, settings = a_watched(short_dir, allow_delete=True)
    first = trainer_checkpoint(tree, 10)
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        old = await taken(node, first)
        await line.ask("pin", selector=old, note="paper")
        (first / "README.md").write_text("the model of table 2\n")
        new = await after(node, first, old)
        assert (await pins(node, old), await pins(node, new)) == ([], ["paper"])
        moved = await told(line, "checkpoint.pinned", "checkpoint.unpinned")
        assert sorted(moved) == sorted(
            [("checkpoint.pinned", old), ("checkpoint.unpinned", old), ("checkpoint.pinned", new)]
        )
        experiment = await node.read(lambda conn: checkpoints.get(conn, new))
        latest = await node.read(lambda conn: checkpoints.newest_good(conn, experiment.experiment_id))
        assert latest.id == new
        last = await taken(node, trainer_checkpoint(tree, 20))
        await retire(node, last, keep_last=1)
        assert (first / "model.safetensors").exists()
        assert (await line.ask("unpin", selector=new))["changed"]
        await retire(node, last, keep_last=1)
        assert not first.exists(), "and it is let go when it is unpinned"


async def test_a_path_that_is_written_again_each_epoch_stays_pinned(short_dir):
    """Pinned once, overwritten by its trainer, and handed over by name as well: there is one pin all the while."""
    tree, settings = a_watched(short_dir)
    path = tree / "run7/last.safetensors"
    path.write_bytes(a_tensor(0))
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        rows = [await taken(node, path)]
        await line.ask("pin", selector=rows[0], note="keep")
        for epoch in (1, 2):
            path.write_bytes(a_tensor(epoch))
            rows.append(await after(node, path, rows[-1]))
        (tree / "next").write_bytes(a_tensor(3))
        os.rename(tree / "next", path)
        rows.append((await line.ask("submit", checkpoint="d" * 32, path=str(path)))["checkpoint"])
        await line.ask("wait", checkpoint=rows[-1], level="verified", timeout_s=30)
        assert [await pins(node, one) for one in rows] == [[], [], [], ["keep"]]


async def test_tags_go_along_and_metrics_stay_with_the_bytes_that_they_were_said_of(short_dir):
    tree, settings = a_watched(short_dir)
    path = tree / "run7/last.safetensors"
    path.write_bytes(a_tensor(0))
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        old = await taken(node, path)
        await line.ask("checkpoint.tag", selector=old, add=["table-2"])
        await line.ask("checkpoint.metrics", checkpoint=old, metrics={"val_loss": 0.1})
        path.write_bytes(a_tensor(1))
        new = await after(node, path, old)
        row = await node.read(lambda conn: checkpoints.get(conn, new))
        assert (row.tags, row.metrics) == (("table-2",), {})
        assert ("checkpoint.tagged", new) in await told(line, "checkpoint.tagged")


async def test_a_pin_goes_along_whoever_noticed_first_that_other_bytes_lie_there(short_dir):
    """`ckpt verify` marks the row; the scan that brings the new one comes later."""
    tree, settings = a_watched(short_dir)
    path = tree / "run7/last.safetensors"
    path.write_bytes(a_tensor(0))
    settings["watching"] = {"reconcile_s": 3600, "reconcile_max_s": 3600}
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        old = await taken(node, path)
        await line.ask("pin", selector=old, note="keep")
        await node.write(lambda tx: checkpoints.mark_missing(tx, old, "somebody noticed"))
        path.write_bytes(a_tensor(1))
        new = await after(node, path, old)
        assert (await pins(node, old), await pins(node, new)) == ([], ["keep"])


@pytest.mark.parametrize("how", ["found", "handed over"])
async def test_what_lies_in_the_trash_keeps_what_was_said_of_it(short_dir, how):
    tree, settings = a_watched(short_dir, allow_delete=True)
    path = tree / "run7/last.safetensors"
    path.write_bytes(a_tensor(0))
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        old = await taken(node, path)
        other = tree / "run7/newer.safetensors"
        other.write_bytes(a_tensor(5))
        await taken(node, other)
        await line.ask("checkpoint.tag", selector=old, add=["of-these-bytes"])
        await line.ask("remove", selector=old)
        assert [state for _, state in await rows_at(node, path)] == ["trashed"]
        path.write_bytes(a_tensor(1))
        if how == "handed over":
            await line.ask("submit", checkpoint="e" * 32, path=str(path))
        new = await after(node, path, old)
        assert (await node.read(lambda conn: checkpoints.get(conn, new))).tags == ()


async def test_an_older_row_whose_bytes_lie_there_again_is_no_second_owner_of_the_file(short_dir):
    """Touched: the same bytes, another time of writing. To verify the older row must not let a rule remove the pinned file."""
    tree, settings = a_watched(short_dir, allow_delete=True)
    path = tree / "run7/model_1.safetensors"
    path.write_bytes(a_tensor(1))
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        old = await taken(node, path)
        await line.ask("pin", selector=old, note="paper")
        os.utime(path)
        new = await after(node, path, old)
        [said] = (await line.ask("verify", selector=old))["results"]
        assert (said["ok"], said["state"]) == (True, "missing")
        assert await rows_at(node, path) == [(old, "missing"), (new, "live")]
        (tree / "run7/model_2.safetensors").write_bytes(a_tensor(2))
        await retire(node, await taken(node, tree / "run7/model_2.safetensors"), keep_last=1)
        assert path.exists()


@pytest.mark.parametrize("known_as", ["corrupt", "missing"])
async def test_a_file_put_there_while_the_old_one_was_read_back_is_not_recorded_as_what_was_read(
    short_dir, monkeypatch, known_as
):
    tree, settings = a_watched(short_dir)
    settings["watching"] = {"reconcile_s": 3600, "reconcile_max_s": 3600}
    path = tree / "run7/model_1.safetensors"
    path.write_bytes(a_tensor(1))
    (tree / "next").write_bytes(a_tensor(2))
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        old = await taken(node, path)
        # The second scan, that of the watch's own beginning, is over: it would find the missing one.
        await eventually(lambda: node.parts.reconciler._roots[str(tree)].same)
        if known_as == "corrupt":
            await node.write(lambda tx: checkpoints.mark_corrupt(tx, old, [Damage("", "digest")]))
        else:
            await node.write(lambda tx: checkpoints.mark_missing(tx, old))
        call = node.parts.workers.call

        async def busy_writer(request, **more):
            answer = await call(request, **more)
            if isinstance(request, Verify) and (tree / "next").exists():
                os.rename(tree / "next", path)
            return answer

        monkeypatch.setattr(node.parts.workers, "call", busy_writer)
        with pytest.raises(SourceChanged):
            await line.ask("verify", selector=old)
        monkeypatch.undo()
        root = await node.read(lambda conn: roots.by_path(conn, str(tree)))
        await node.parts.reconciler.scan(root)
        new = await after(node, path, old)
        files = await node.read(lambda conn: checkpoints.files(conn, new))
        assert [file.sha256 for file in files] == [sha256(path)]
