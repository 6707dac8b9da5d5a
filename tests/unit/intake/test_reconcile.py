"""Truth about the disks: what is there, what went, and what only looks as if it went."""

import os
import shutil

import anyio
import pytest

from ckptd.catalog import arrivals, checkpoints, roots
from ckptd.errors import CkptdError, RootDegraded
from ckptd.intake import standing
from ckptd.model import State
from ckptd.worker.protocol import Hints, Scanned
from tests.support.in_process import Training, a_tensor, daemon, eventually
from tests.support.watched import a_watched, live_at, rows_at


async def root_of(node, path):
    return await node.read(lambda conn: roots.by_path(conn, str(path)))


async def test_a_file_renamed_while_pending_is_found_under_its_new_name(short_dir):
    tree, settings = a_watched(short_dir)
    settings["watching"] = {"quiet_s": 1.0}
    old, new = tree / "run7/a.bin", tree / "run7/b.bin"
    old.write_bytes(b"x" * 100)
    async with daemon(short_dir, **settings) as node:
        await eventually(lambda: rows_at(node, old))
        old.rename(new)
        await live_at(node, new)

        async def old_is_missing() -> bool:
            return [state for _, state in await rows_at(node, old)] == ["missing"]

        await eventually(old_is_missing)


async def test_a_file_overwritten_in_place_is_a_new_checkpoint_and_no_damage(short_dir):
    """A trainer's `last.ckpt` is rewritten each epoch; that must never be reported as corruption."""
    tree, settings = a_watched(short_dir)
    path = tree / "run7/last.safetensors"
    path.write_bytes(a_tensor(1))
    async with daemon(short_dir, **settings) as node:
        first = await live_at(node, path)
        path.write_bytes(a_tensor(2))

        async def second() -> bool:
            states = dict(await rows_at(node, path))
            return states[first] == "missing" and list(states.values()).count("live") == 1

        await eventually(second)
        assert "corrupt" not in [state for _, state in await rows_at(node, path)]


async def test_a_file_that_never_becomes_whole_has_one_row_however_often_it_is_seen(short_dir):
    tree, settings = a_watched(short_dir)
    path = tree / "run7/torn.safetensors"
    path.write_bytes(a_tensor(1)[:-100])
    async with daemon(short_dir, **settings) as node:
        root = await eventually(lambda: root_of(node, tree))
        for _ in range(4):
            await node.parts.reconciler.scan(root)
        assert [state for _, state in await rows_at(node, path)] == ["pending"]
        path.write_bytes(a_tensor(1))
        await live_at(node, path)


async def test_what_can_never_be_a_checkpoint_fails_once_not_at_every_scan(short_dir, monkeypatch):
    """A FAILED row remembers the bytes it failed for."""
    tree, settings = a_watched(short_dir)
    path = tree / "run7/x.safetensors"
    path.write_bytes(a_tensor())
    async with daemon(short_dir, **settings, front=False) as node:
        root = await root_of(node, tree)
        await node.parts.reconciler.scan(root)
        [(one, _)] = await rows_at(node, path)
        await node.write(lambda tx: checkpoints.mark_failed(tx, one, {"code": "bad_path", "message": "no"}))
        await node.parts.reconciler.scan(root)
        assert await rows_at(node, path) == [(one, "failed")]
        path.write_bytes(a_tensor(2, 5000))
        await node.parts.reconciler.scan(root)
        assert [state for _, state in await rows_at(node, path)] == ["failed", "pending"]


async def test_a_root_that_is_gone_loses_no_checkpoint(short_dir):
    """An unmounted disk: nothing is marked missing, the root says what is wrong."""
    tree, settings = a_watched(short_dir)
    path = tree / "run7/a.safetensors"
    path.write_bytes(a_tensor())
    async with daemon(short_dir, **settings) as node:
        one = await live_at(node, path)
        tree.rename(short_dir / "away")
        root = await root_of(node, tree)
        with pytest.raises(CkptdError):
            await node.parts.reconciler.scan(root)
        await eventually(lambda: node.parts.reconciler.state_of(str(tree))[1])
        assert await rows_at(node, path) == [(one, "live")]
        (short_dir / "away").rename(tree)
        await eventually(lambda: not node.parts.reconciler.state_of(str(tree))[1])


async def test_an_empty_mount_point_is_no_proof_that_everything_was_deleted(short_dir, monkeypatch):
    """The directory is there and empty, on another file system than the checkpoints were."""
    tree, settings = a_watched(short_dir)
    path = tree / "run7/a.safetensors"
    path.write_bytes(a_tensor())
    async with daemon(short_dir, **settings) as node:
        one = await live_at(node, path)
        root = await root_of(node, tree)
        shutil.rmtree(tree / "run7")
        unseen = set((await standing.of_root(node.parts.catalog, root)).marked)
        from ckptd.intake.reconcile import Reconciled

        elsewhere = Scanned(seen=0, complete=True, device=999_999)
        with pytest.raises(RootDegraded, match="another file system"):
            await node.parts.reconciler._missing(root, unseen, elsewhere, Reconciled())
        assert (await node.read(lambda conn: checkpoints.state_of(conn, one))) in {State.LIVE, State.MISSING}
        result = await node.parts.reconciler.scan(root)  # the same device: they really are gone
        assert result.missing in {0, 1}
        assert await rows_at(node, path) == [(one, "missing")]


async def test_a_root_that_does_not_exist_yet_is_no_trouble(short_dir):
    async with daemon(short_dir, roots=[{"path": str(short_dir / "later"), "kind": "watched"}]) as node:
        (short_dir / "later").mkdir()
        path = short_dir / "later/a.safetensors"
        path.write_bytes(a_tensor())
        await live_at(node, path)


async def test_a_checkpoint_that_was_missing_and_came_back_is_read_and_good_again(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        one = await (await Training(line, str(node.runs)).open()).saved(1)
        path = (await line.ask("resolve", selector=one))["path"]
        os.rename(path, short_dir / "aside")
        root = await root_of(node, node.runs)
        await node.parts.reconciler.scan(root)
        assert (await node.read(lambda conn: checkpoints.state_of(conn, one))) is State.MISSING
        os.rename(short_dir / "aside", path)
        await node.parts.reconciler.scan(root)
        assert (await line.ask("wait", checkpoint=one, level="verified", timeout_s=30))["state"] == "live"


async def idle(node) -> bool:
    return not await node.parts.jobs.unfinished()


async def test_a_catalog_that_was_lost_is_made_again_from_the_manifests(short_dir):
    """M007, promise 7."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open(tags=["t"])
        ids = [await training.saved(step, metrics={"loss": step / 10}, note=f"n{step}") for step in (1, 2, 3)]
        await line.ask("checkpoint.metrics", checkpoint=ids[0], metrics={"val_loss": 0.5, "acc": "NaN"})
        await line.ask("checkpoint.metrics", checkpoint=ids[0], metrics={"val_loss": 0.25})
        await eventually(lambda: idle(node))
        before = (await line.ask("list", sort="step"))["checkpoints"]
    for name in os.listdir(short_dir / "state"):
        if name.startswith("catalog"):
            os.unlink(short_dir / "state" / name)
    async with daemon(short_dir) as node, node.connect() as line:
        answer = await line.ask("rebuild", root=str(node.runs) + "/")
        assert (answer["roots"][0]["found"], answer["roots"][0]["problem"]) == (3, "")
        for one in ids:
            await line.ask("wait", checkpoint=one, level="verified", timeout_s=30)
        after = (await line.ask("list", sort="step"))["checkpoints"]
    kept = ("checkpoint", "project", "name", "step", "metrics", "note", "path", "size_bytes", "state", "level")
    assert [{k: row[k] for k in kept} for row in after] == [{k: row[k] for k in kept} for row in before]


async def test_a_file_that_grows_while_its_row_is_pending_is_no_second_checkpoint(short_dir):
    """Each scan sees another size; its one job asks again until the writer is done."""
    tree, settings = a_watched(short_dir)
    path = tree / "run7/growing.safetensors"
    async with daemon(short_dir, **settings, front=False) as node:
        root = await root_of(node, tree)
        for size in (100, 200, 300):
            path.write_bytes(a_tensor(1, 4096)[:size])
            await node.parts.reconciler.scan(root)
        assert [state for _, state in await rows_at(node, path)] == ["pending"]
        assert len(await node.parts.jobs.unfinished()) == 1


async def test_known_files_cost_no_transaction_of_their_own(short_dir):
    """100,000 known files at start: one look-up for each batch, one note at the end."""
    tree, settings = a_watched(short_dir)
    for number in range(300):
        (tree / "run7" / f"c_{number}.safetensors").write_bytes(a_tensor(number, 64))
    async with daemon(short_dir, **settings, front=False) as node:
        root = await root_of(node, tree)
        first = await node.parts.reconciler.scan(root)
        await node.settled()
        commits = node.parts.catalog._writer.commits
        second = await node.parts.reconciler.scan(root)
        assert (first.added, second.added, second.known) == (300, 0, 300)
        assert node.parts.catalog._writer.commits - commits == 1


async def test_a_scan_finds_what_became_of_known_files_whatever_was_heard(short_dir):
    """M006, promise 5: changed in place, replaced and deleted files are found by the scan alone."""
    tree, settings = a_watched(short_dir)
    paths = {name: tree / "run7" / f"{name}.safetensors" for name in ("same", "changed", "replaced", "gone")}
    for path in paths.values():
        path.write_bytes(a_tensor(1, 64))
    async with daemon(short_dir, **settings) as node:
        ids = {name: await live_at(node, path) for name, path in paths.items()}
    async with daemon(short_dir, **settings, front=False) as node:
        root = await root_of(node, tree)
        quiet = await node.parts.reconciler.scan(root)
        assert (quiet.found, quiet.known, quiet.added, quiet.missing) == (4, 4, 0, 0)
        before = paths["replaced"].stat()
        with paths["changed"].open("r+b") as file:
            file.write(a_tensor(2, 64))
        (short_dir / "other").write_bytes(a_tensor(3, 64))
        (short_dir / "other").replace(paths["replaced"])
        os.utime(paths["replaced"], ns=(before.st_atime_ns, before.st_mtime_ns))
        paths["gone"].unlink()
        told = await node.parts.reconciler.scan(root)
        assert (told.found, told.known, told.added, told.missing) == (3, 1, 2, 1)
        assert await rows_at(node, paths["same"]) == [(ids["same"], "live")]
        for name in ("changed", "replaced"):
            assert [state for _, state in await rows_at(node, paths[name])] == ["missing", "pending"]
        assert await rows_at(node, paths["gone"]) == [(ids["gone"], "missing")]


async def test_more_files_than_one_request_has_marks_for_are_looked_up(short_dir, monkeypatch):
    tree, settings = a_watched(short_dir)
    for number in range(6):
        (tree / "run7" / f"c_{number}.safetensors").write_bytes(a_tensor(number, 64))
    async with daemon(short_dir, **settings) as node:
        for number in range(6):
            await live_at(node, tree / "run7" / f"c_{number}.safetensors")
    monkeypatch.setattr(standing, "KNOWN_MAX", 2)
    monkeypatch.setattr(arrivals, "_STANDING", arrivals._STANDING.limit(2))
    async with daemon(short_dir, **settings, front=False) as node:
        root = await root_of(node, tree)
        found = await standing.of_root(node.parts.catalog, root)
        assert (len(found.marked), len(found.others)) == (2, 4)
        (tree / "run7/c_5.safetensors").unlink()
        result = await node.parts.reconciler.scan(root)
        assert (result.found, result.known, result.missing) == (5, 5, 1)


@pytest.mark.parametrize(
    ("seen", "took_s", "interval_s"),
    [(True, 0.1, 60.0), (True, 0.5, 300.0), (True, 30.0, 600.0), (False, 30.0, 60.0)],
)
async def test_a_large_tree_rests_longer_only_while_its_events_are_all_seen(short_dir, seen, took_s, interval_s):
    """Promise 5: `reconcile_max_s` bounds it in every case."""
    tree, settings = a_watched(short_dir)
    settings["watching"] = {"reconcile_s": 60, "reconcile_max_s": 600}
    async with daemon(short_dir, **settings, front=False) as node:
        watched = node.parts.reconciler._roots[str(tree)]
        assert not watched.seen, "no watcher has said so yet"
        node.parts.reconciler._hint(watched, Hints([], lost=True, problem="" if seen else "some may be lost"))
        watched.took_s = took_s
        assert await node.parts.reconciler._interval_s(watched) == interval_s


@pytest.mark.parametrize(("same", "interval_s"), [(0, 60.0), (1, 120.0), (3, 480.0), (4, 600.0), (9999, 600.0)])
async def test_a_managed_root_rests_longer_with_each_scan_that_finds_nothing_new(short_dir, same, interval_s):
    """A trainer with a directory for each run leaves a root behind with each."""
    async with daemon(short_dir, watching={"reconcile_s": 60, "reconcile_max_s": 600}, front=False) as node:
        async with node.connect() as line:
            await Training(line, str(node.runs)).open()
        watched = node.parts.reconciler._roots[str(node.runs)]
        watched.everything = True
        await node.parts.reconciler._scan_hinted(watched)
        assert watched.same == 1
        watched.same = same
        assert await node.parts.reconciler._interval_s(watched) == interval_s


async def test_a_watcher_that_ends_is_started_again_and_everything_is_scanned(short_dir):
    """Hints may all be lost; that costs time, never a checkpoint."""
    tree, settings = a_watched(short_dir)
    settings["watching"] = {"reconcile_s": 3600, "quiet_s": 0.1}
    async with daemon(short_dir, **settings) as node:
        await eventually(lambda: node.parts.workers.state() and not node.parts.reconciler.state_of(str(tree))[0])
        [worker] = node.parts.workers.state()
        assert worker.pid is not None
        os.kill(worker.pid, 9)
        path = tree / "run7/after.safetensors"
        path.write_bytes(a_tensor())
        await live_at(node, path)


async def test_temporary_directories_of_a_running_publish_are_not_swept(short_dir, monkeypatch):
    from ckptd.worker.protocol import Done

    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        one = await training.save(1)
        [job] = await node.parts.jobs.claim(1)
        asked = []

        async def call(request, **_):
            asked.append(request)
            if len(asked) == 1:
                raise RootDegraded("hangs")
            return Done()

        await Training(line, str(short_dir / "other"), name="b").open()
        monkeypatch.setattr(node.parts.workers, "call", call)
        await node.parts.reconciler.sweep(60.0)
        assert job.checkpoint_id == one
        assert [request.keep for request in asked] == [[one], [one]], (
            "and one hung disk does not keep the other's litter"
        )


async def test_scans_of_a_tree_that_never_rests_leave_the_worker_time(short_dir):
    tree, settings = a_watched(short_dir)
    async with daemon(short_dir, **settings) as node:
        with anyio.move_on_after(1.0):
            number = 0
            while True:
                (tree / "run7" / f"log_{number % 5}.txt").write_text(str(number))
                number += 1
                await anyio.sleep(0.005)
        path = tree / "run7/real.safetensors"
        path.write_bytes(a_tensor())
        await live_at(node, path)
