"""Directories that people copied or moved: which of those that name one checkpoint is the checkpoint."""

import os
import shutil
from pathlib import Path

import pytest
from sqlalchemy import select

from ckptd.catalog import checkpoints, roots, schema
from ckptd.intake.reconcile import Copies
from ckptd.model import State
from ckptd.pipeline import retain, trash
from tests.support.in_process import Training, daemon, eventually

# Scans run when a test says so: nothing of a managed root makes an event.
AT_WILL = {"watching": {"reconcile_s": 3600, "reconcile_max_s": 3600}}


async def idle(node) -> bool:
    return not await node.parts.jobs.unfinished()


async def saved(node, line, *steps: int) -> tuple[list[str], Path]:
    """Save; return the ids, and the directory that they lie in."""
    training = await Training(line, str(node.runs)).open()
    ids = [await training.saved(step) for step in steps]
    await eventually(lambda: idle(node))
    return ids, node.runs / "demo/run"


async def scan(node, path: Path | None = None):
    """Scan a root as its timer does, and wait for what comes of it."""
    root = await node.read(lambda conn: roots.by_path(conn, str(path or node.runs)))
    result = await node.parts.reconciler.scan(root)
    await eventually(lambda: idle(node))
    return result


async def lies(node, one: str) -> tuple[State, str]:
    row = await node.read(lambda conn: checkpoints.get(conn, one))
    return row.state, row.path


def copied(path: Path, name: str) -> Path:
    shutil.copytree(path, path.parent / name, symlinks=True)  # with its times, as `cp -a`
    return path.parent / name


async def test_a_copy_beside_a_checkpoint_changes_nothing_and_is_left_to_whoever_made_it(short_dir):
    async with daemon(short_dir, **AT_WILL) as node, node.connect() as line:
        [one], base = await saved(node, line, 1)
        await line.ask("pin", selector=one, note="paper")
        own = base / "step_0000000001"
        kept = [copied(own, name) for name in ("a_before", "z_after")]
        elsewhere = shutil.copytree(base, node.runs / "demo/another", symlinks=True)
        for _ in range(3):
            result = await scan(node)
            assert (result.missing, result.added) == (0, 0)
            assert await lies(node, one) == (State.LIVE, str(own))
        assert os.readlink(base / "latest") == own.name
        told = [event["event"] for event in (await line.ask("events", limit=100))["events"]]
        assert not {"checkpoint.missing", "checkpoint.restored"} & set(told)
        checks = {check["name"]: check for check in (await line.ask("doctor"))["checks"]}
        assert f"copies of checkpoints, left alone: 5, {elsewhere}" in checks[f"root {node.runs}"]["detail"]

        await line.ask("unpin", selector=one)
        [two], _ = await saved(node, line, 2)
        rules = type(node.parts.settings.retention)(keep_last=1, trash_grace_s=0)
        node.parts.admission.current = node.parts.settings.model_copy(update={"retention": rules})
        row = await node.read(lambda conn: checkpoints.get(conn, two))
        await retain.apply(node.parts.tools, row.experiment_id, rules)
        await trash.purge(node.parts.tools)
        assert (await lies(node, one))[0] is State.DROPPED
        assert not own.exists()
        assert all((path / "manifest.json").exists() for path in kept), "nobody but who made it removes a copy"


async def test_a_directory_that_was_renamed_is_followed_and_is_no_copy(short_dir):
    async with daemon(short_dir, **AT_WILL) as node, node.connect() as line:
        [one], base = await saved(node, line, 1)
        os.rename(base / "step_0000000001", base / "keep_1")
        assert (await scan(node)).missing == 1
        assert node.parts.reconciler.copies(str(node.runs)) == Copies()
        await scan(node)
        assert await lies(node, one) == (State.LIVE, str(base / "keep_1"))
        assert (await line.ask("wait", checkpoint=one, level="verified", timeout_s=30))["state"] == "live"
        assert os.readlink(base / "latest") == "keep_1"


async def test_a_checkpoint_that_came_back_beside_its_copy_is_restored_where_it_lay(short_dir):
    """A scan of one directory meets the copy alone, before any has met the original."""
    async with daemon(short_dir, **AT_WILL) as node, node.connect() as line:
        [one], base = await saved(node, line, 1)
        own = base / "step_0000000001"
        os.rename(own, short_dir / "aside")
        await scan(node)
        assert (await lies(node, one))[0] is State.MISSING
        shutil.copytree(short_dir / "aside", base / "a_copy")
        os.rename(short_dir / "aside", own)
        root = await node.read(lambda conn: roots.by_path(conn, str(node.runs)))
        await node.parts.reconciler._scan_under(root, str(base / "a_copy"))
        assert await lies(node, one) == (State.LIVE, str(own))
        await scan(node)
        assert await lies(node, one) == (State.LIVE, str(own))


async def test_of_two_copies_without_an_original_one_is_taken_for_good(short_dir):
    async with daemon(short_dir, **AT_WILL) as node, node.connect() as line:
        [one], base = await saved(node, line, 1)
        os.rename(base / "step_0000000001", base / "b")
        for name in "acde":
            shutil.copytree(base / "b", base / name)
        await scan(node)
        for _ in range(3):
            await scan(node)
            assert await lies(node, one) == (State.LIVE, str(base / "a"))
        assert node.parts.reconciler.copies(str(node.runs)) == Copies(4, [str(base / name) for name in "bcd"])


async def test_a_copy_is_not_taken_while_something_unreadable_lies_where_the_checkpoint_was(short_dir):
    async with daemon(short_dir, **AT_WILL) as node, node.connect() as line:
        [one], base = await saved(node, line, 1)
        own = base / "step_0000000001"
        copied(own, "a_copy")
        (own / "manifest.json").write_bytes(b"{")
        for _ in range(3):
            await scan(node)
        assert await lies(node, one) == (State.MISSING, str(own))
        shutil.rmtree(own)
        await scan(node)
        assert await lies(node, one) == (State.LIVE, str(base / "a_copy"))


async def test_a_checkpoint_that_was_moved_to_another_root_is_found_and_read_there(short_dir):
    async with daemon(short_dir, **AT_WILL) as node, node.connect() as line:
        [one], base = await saved(node, line, 1)
        await Training(line, str(short_dir / "other"), name="b").open()
        (short_dir / "other/demo").mkdir(parents=True)
        moved = short_dir / "other/demo/step_0000000001"
        os.rename(base / "step_0000000001", moved)
        await scan(node)
        await scan(node, short_dir / "other")
        assert await lies(node, one) == (State.LIVE, str(moved))
        assert (await line.ask("wait", checkpoint=one, level="verified", timeout_s=30))["state"] == "live"
        assert (await scan(node, short_dir / "other")).missing == 0
        row = await node.read(lambda conn: checkpoints.get(conn, one))
        assert row.root == str(short_dir / "other")


async def test_what_was_lost_and_lies_in_its_own_root_again_does_not_follow_a_copy_in_another(short_dir):
    async with daemon(short_dir, **AT_WILL) as node, node.connect() as line:
        [one], base = await saved(node, line, 1)
        await Training(line, str(short_dir / "other"), name="b").open()
        own = base / "step_0000000001"
        os.rename(own, short_dir / "aside")
        await scan(node)
        shutil.copytree(short_dir / "aside", short_dir / "other/demo/step_0000000001")
        os.rename(short_dir / "aside", own)
        await scan(node, short_dir / "other")
        assert await lies(node, one) == (State.MISSING, str(own))
        await scan(node)
        assert await lies(node, one) == (State.LIVE, str(own))


@pytest.mark.parametrize("how", ["all", "the copy first"])
async def test_a_catalog_that_was_lost_knows_originals_from_copies_again(short_dir, how):
    async with daemon(short_dir, **AT_WILL) as node, node.connect() as line:
        ids, base = await saved(node, line, 1, 2)
        for name in ("a_copy", "z_copy"):
            copied(base / "step_0000000001", name)
        shutil.copytree(base, node.runs / "demo/a_run", symlinks=True)
    for name in os.listdir(short_dir / "state"):
        if name.startswith("catalog"):
            os.unlink(short_dir / "state" / name)
    async with daemon(short_dir, front=how == "all", **AT_WILL) as node, node.connect() as line:
        if how == "all":
            await line.ask("rebuild", root=str(node.runs))
        else:
            await node.parts.admission.ensure_root(roots.NewRoot(path=str(node.runs), kind="managed", uid=os.getuid()))
            root = await node.read(lambda conn: roots.by_path(conn, str(node.runs)))
            for directory in (node.runs / "demo/a_run", base / "a_copy"):
                await node.parts.reconciler._scan_under(root, str(directory))
        rows = await node.read(lambda conn: conn.execute(select(schema.checkpoint.c.id, schema.checkpoint.c.path)))
        paths = [str(base / name) for name in ("step_0000000001", "step_0000000002")]
        assert {row.id: row.path for row in rows} == dict(zip(ids, paths, strict=True))
