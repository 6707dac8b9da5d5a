"""One row for what lies at a path, whoever saw it first (M209), and who may hand over what."""

import os
import shutil

import pytest
from sqlalchemy import func, select

from ckptd.catalog import roots, schema
from ckptd.catalog.roots import NewRoot
from ckptd.errors import BadPath, Exists, NotAuthorized
from ckptd.intake.files import FileOffer
from ckptd.model import RootKind, new_id
from tests.support.in_process import Training, a_tensor, daemon, eventually
from tests.support.watched import a_watched, live_at, rows_at


async def test_a_file_that_was_watched_and_is_then_submitted_stays_one_row(short_dir):
    """M209: the writer's word is added to the row that the scan made."""
    tree, settings = a_watched(short_dir)
    path = tree / "run7/last.safetensors"
    path.write_bytes(a_tensor())
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        known = await live_at(node, path)
        await line.ask("wait", checkpoint=known, level="verified", timeout_s=30)
        said = {"project": "vision", "experiment": "resnet", "step": 40, "metrics": {"acc": 0.9}, "note": "good one"}
        answer = await line.ask("submit", path=str(path), checkpoint=new_id(), **said)
        assert (answer["checkpoint"], answer["state"], answer["level"]) == (known, "live", "verified")
        row = (await line.ask("show", selector=known))["checkpoint"]
        assert (row["project"], row["name"], row["step"]) == ("vision", "resnet", 40)
        assert (row["metrics"], row["note"]) == ({"acc": 0.9}, "good one")
        assert await rows_at(node, path) == [(known, "live")]
        again = await line.ask("submit", path=str(path), checkpoint=new_id(), **said)
        assert again["checkpoint"] == known


async def test_a_file_that_is_still_pending_when_it_is_submitted_stays_one_row(short_dir):
    tree, settings = a_watched(short_dir, quiet_s=3600)
    path = tree / "run7/last.bin"
    path.write_bytes(b"opaque")
    settings["watching"] = {"quiet_s": 3600}
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        [(known, state)] = await eventually(lambda: rows_at(node, path))
        assert state == "pending"
        answer = await line.ask("submit", path=str(path), checkpoint=new_id(), step=3, project="p")
        assert answer["checkpoint"] == known
        assert (await rows_at(node, path)) == [(known, "pending")]
        assert (await line.ask("show", selector=known))["checkpoint"]["step"] == 3


async def test_a_submitted_file_that_a_scan_sees_stays_one_row(short_dir):
    tree, settings = a_watched(short_dir)
    path = tree / "run7/x.safetensors"
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        path.write_bytes(a_tensor())
        mine = (await line.ask("submit", path=str(path), checkpoint=new_id()))["checkpoint"]
        await line.ask("wait", checkpoint=mine, level="verified", timeout_s=30)
        root = await node.read(lambda conn: roots.by_path(conn, str(tree)))
        await node.parts.reconciler.scan(root)
        assert [state for _, state in await rows_at(node, path)] == ["live"]


async def test_other_bytes_at_a_submitted_path_are_another_checkpoint(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        path = short_dir / "mine/last.safetensors"
        path.parent.mkdir()
        path.write_bytes(a_tensor(1))
        first = (await line.ask("submit", path=str(path), checkpoint=new_id(), step=1))["checkpoint"]
        await line.ask("wait", checkpoint=first, level="verified", timeout_s=30)
        path.unlink()
        path.write_bytes(a_tensor(2))
        second = (await line.ask("submit", path=str(path), checkpoint=new_id(), step=2))["checkpoint"]
        await line.ask("wait", checkpoint=second, level="verified", timeout_s=30)
        assert await rows_at(node, path) == [(first, "missing"), (second, "live")]


async def test_submitting_a_published_checkpoint_of_ours_names_that_checkpoint(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        path = (await line.ask("resolve", selector=checkpoint))["path"]
        assert (await line.ask("submit", path=path, checkpoint=new_id()))["checkpoint"] == checkpoint


async def test_a_watched_root_does_not_become_managed_because_a_trainer_saves_there(short_dir):
    """Promise 3: other people's files there stay under the rules that the root's entry names."""
    tree, settings = a_watched(short_dir)
    async with daemon(short_dir, **settings) as node, node.connect() as line:
        training = await Training(line, str(tree)).open()
        checkpoint = await training.saved(1)
        root = await node.read(lambda conn: roots.by_path(conn, str(tree)))
        assert (root.kind, root.allow_delete) == (RootKind.WATCHED, False)
        path = (await line.ask("resolve", selector=checkpoint))["path"]
        await node.parts.reconciler.scan(root)
        assert await rows_at(node, path) == [(checkpoint, "live")]


async def test_a_directory_of_submitted_files_becomes_managed_and_is_looked_after(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        path = node.runs / "single.safetensors"
        path.write_bytes(a_tensor())
        await line.ask("submit", path=str(path), checkpoint=new_id())
        checkpoint = await (await Training(line, str(node.runs)).open()).saved(1)
        shutil.rmtree((await line.ask("resolve", selector=checkpoint))["path"])

        async def missed() -> bool:
            return (await line.ask("show", selector=checkpoint))["checkpoint"]["state"] == "missing"

        await eventually(missed)


async def test_admitting_a_burst_of_files_costs_a_few_statements_for_a_whole_batch(short_dir):
    """A burst of 20,000 files: 2,000 a second and more; here as a count, which no busy machine changes."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    from ckptd.worker.protocol import Candidate, IdentityRecord

    async with daemon(short_dir, front=False) as node:
        root = await node.write(lambda tx: roots.ensure(tx, NewRoot(path="/w", kind=RootKind.WATCHED, uid=1000)))
        await node.settled()
        found = [
            Candidate(f"/w/run/c_{n}.safetensors", "file", "safetensors", IdentityRecord(1, n + 1, 9, 5, 6), n)
            for n in range(250)
        ]
        count = 0

        def counted(*_: object) -> None:
            nonlocal count
            count += 1

        event.listen(Engine, "before_cursor_execute", counted)
        try:
            first = await node.parts.reconciler._files.candidates(root, found)
            entering, count = count, 0
            commits = node.parts.catalog._writer.commits
            second = await node.parts.reconciler._files.candidates(root, found)
        finally:
            event.remove(Engine, "before_cursor_execute", counted)
        assert (first.added, second.added, second.known) == (250, 0, 250)
        assert entering < 40
        assert count <= 2, "what is known costs a look-up"
        assert node.parts.catalog._writer.commits == commits, "and no transaction"
        jobs = select(func.count()).select_from(schema.job)
        assert (await node.read(lambda conn: conn.execute(jobs))).scalar_one() == 250
        logged = select(func.count()).where(schema.event_log.c.name == "checkpoint.found")
        assert (await node.read(lambda conn: conn.execute(logged))).scalar_one() == 250


async def test_a_system_daemon_keeps_users_apart(short_dir):
    """S9, I9: a row, a root, a checkpoint id of another user is not to be had."""
    if os.getuid() != 0:
        pytest.skip("only root can serve several users")
    shared = short_dir / "data"
    shared.mkdir()
    settings = {"mode": "system", "roots": [{"path": str(shared), "kind": "managed"}]}
    async with daemon(short_dir, **settings, front=False) as node:
        admission, files = node.parts.admission, node.parts.reconciler._files
        await admission.managed_root(str(shared / "ann"), 1001)
        with pytest.raises(NotAuthorized):
            await admission.managed_root(str(shared / "ann/sub"), 1002)
        with pytest.raises(BadPath):
            await admission.managed_root("/elsewhere", 1001)
        mine = FileOffer(id=new_id(), path=str(shared / "x.safetensors"), uid=1001)
        await files.file(mine)
        with pytest.raises(Exists):
            await files.file(FileOffer(id=new_id(), path=mine.path, uid=1002))
        with pytest.raises(Exists):
            await files.file(FileOffer(id=mine.id, path=str(shared / "y.safetensors"), uid=1002))


async def test_paths_that_leave_the_roots_are_refused(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        for path in ("relative", "/a/../b", "/a//b"):
            with pytest.raises(BadPath):
                await line.ask("submit", path=path, checkpoint=new_id())
