"""F14: a root whose disk is not mounted is neither written to nor retired from, and nothing of it is given up for gone.

The disk is a tmpfs that is bound to the root's place, and taken away from there.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from ckptd.catalog import checkpoints, roots
from ckptd.errors import NotFound, RootDegraded
from ckptd.model import State
from ckptd.pipeline import retain, trash
from ckptd.worker.rootmark import NAME
from tests.support.disk import tmpfs
from tests.support.in_process import Node, Training, daemon, eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("still_upkeep")]
KEEP_ONE = {"keep_last": 1, "trash_grace_s": 86400}


@dataclass
class Disk:
    """A disk at a mount point that is there without it as well."""

    disk: Path
    point: Path

    def come(self) -> None:
        """Mount it."""
        subprocess.run(["mount", "--bind", str(self.disk), str(self.point)], check=True)

    def go(self) -> None:
        """Unmount it, whoever has something open there."""
        subprocess.run(["umount", "-l", str(self.point)], check=True)

    def directories(self) -> list[str]:
        return sorted(path.name for path in self.disk.glob("demo/run/step_*"))

    def trashed(self) -> list[str]:
        return sorted(os.listdir(self.disk / ".ckptd-trash"))


@pytest.fixture
def disk(short_dir: Path) -> Iterator[Disk]:
    point = short_dir / "runs"
    point.mkdir()
    with tmpfs(short_dir / "disk", "64m") as place:
        made = Disk(place, point)
        made.come()
        yield made
        while os.path.ismount(point):
            made.go()


async def states(node: Node, ids: list[str]) -> str:
    """The first letters of their states."""
    found = await node.read(lambda conn: checkpoints.get_many(conn, ids))
    return "".join(str(found[one].state)[0] for one in ids)


async def in_trash(node: Node, disk: Disk, count: int) -> None:
    await eventually(lambda: (disk.disk / ".ckptd-trash").is_dir() and len(disk.trashed()) == count)
    await eventually(lambda: len(node.parts.tools.moved) == count)


def follow(node: Node, **rules: Any) -> None:
    settings = node.parts.admission.settings()
    new = settings.retention.model_copy(update=rules)
    node.parts.admission.current = settings.model_copy(update={"retention": new})


async def known(node: Node) -> tuple[str, int]:
    [root] = await node.read(roots.all_roots)
    return root.mark, root.device


def written(directory: Path) -> str:
    return str(json.loads((directory / NAME).read_bytes())["root"])


async def test_a_save_waits_while_the_disk_of_its_root_is_away_and_nothing_is_retired_for_it(short_dir, disk):
    """keep_last = 1: verified beneath the mount point it was the newest, and the real ones went."""
    async with daemon(short_dir, retention=KEEP_ONE) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        first = await training.saved(1)
        assert await known(node) == (written(disk.disk), disk.disk.stat().st_dev)
        disk.go()
        second = await training.save(2)
        await eventually(lambda: str(node.runs) in node.parts.workers.marks.refused())
        [trouble] = [each for each in node.parts.troubles.now() if each.what == f"root {node.runs}"]
        assert (trouble.grave, "is its disk mounted?" in trouble.do) == (True, True)
        [state] = [each for each in (await line.ask("status"))["roots"] if each["path"] == str(node.runs)]
        assert (state["state"], "another file system" in state["problem"]) == ("degraded", True)
        [row] = [each for each in (await line.ask("doctor"))["checks"] if each["name"] == f"root {node.runs}"]
        assert row["status"] == "fail"
        assert await states(node, [first, second]) == "lp"
        assert os.listdir(node.runs) == []
        disk.come()
        await line.push("level", checkpoint=second, level="verified", state="live")
        await in_trash(node, disk, 1)
        assert disk.directories() == ["step_0000000002"]
        await eventually(lambda: not node.parts.workers.marks.refused())
        assert await states(node, [first, second]) == "tl"


async def test_a_daemon_that_starts_before_the_disk_is_mounted_gives_nothing_in_the_trash_up_for_gone(short_dir, disk):
    async with daemon(short_dir, retention=KEEP_ONE) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        ids = [await training.saved(step) for step in (1, 2)]
        await in_trash(node, disk, 1)
    disk.go()
    async with daemon(short_dir, retention=KEEP_ONE) as node, node.connect() as line:
        await eventually(lambda: str(node.runs) in node.parts.workers.marks.refused())
        assert await trash.resume(node.parts.tools) == 1
        with pytest.raises(RootDegraded, match="another file system"):
            await line.ask("restore", selector=ids[0])
        assert await states(node, ids) == "tl"
        assert os.listdir(node.runs) == []
        disk.come()
        assert (await line.ask("restore", selector=ids[0]))["state"] == "live"
        assert disk.directories() == ["step_0000000001", "step_0000000002"]


async def test_a_grace_that_ends_while_the_disk_is_away_ends_when_it_is_back(short_dir, disk):
    async with daemon(short_dir, retention=KEEP_ONE) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        ids = [await training.saved(step) for step in (1, 2)]
        await in_trash(node, disk, 1)
        disk.go()
        follow(node, trash_grace_s=0)
        assert await trash.purge(node.parts.tools) == 0
        assert await states(node, ids) == "tl"
        disk.come()
        assert await trash.purge(node.parts.tools) == 1
        assert disk.trashed() == []
        assert await states(node, ids) == "dl"


async def test_a_tombstone_that_is_carried_out_while_the_disk_is_away_stays_one(short_dir, disk):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        async with anyio.create_task_group() as group:
            group.start_soon(node.parts.pipeline.run, node.parts.stop, lambda: False)
            training = await Training(line, str(node.runs)).open()
            ids = [await training.saved(step) for step in (1, 2)]
            group.cancel_scope.cancel()
        disk.go()
        follow(node, **KEEP_ONE)
        experiment = (await node.read(lambda conn: checkpoints.get(conn, ids[0]))).experiment_id
        await retain.apply(node.parts.tools, experiment, node.parts.admission.settings().retention)
        assert await states(node, ids) == "tl"
        disk.come()
        assert await trash.resume(node.parts.tools) == 1
        assert disk.trashed() == [ids[0]]
        assert await states(node, ids) == "tl"


async def test_a_root_that_was_removed_by_its_user_goes_on_under_a_new_mark(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        first = await training.saved(1)
        before = written(node.runs)
        await node.idle()  # a link that is made meanwhile would keep its directory
        shutil.rmtree(node.runs)
        second = await training.saved(2)
        assert (node.runs / "demo/run/step_0000000002/manifest.json").is_file()
        assert written(node.runs) != before
        assert (await known(node))[0] == written(node.runs)
        await eventually(lambda: _is(node, first, State.MISSING))
        assert await states(node, [second]) == "l"


async def _is(node: Node, checkpoint: str, state: State) -> bool:
    return await node.read(lambda conn: checkpoints.state_of(conn, checkpoint)) is state


async def test_a_lost_catalog_adopts_the_mark_that_lies_there(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        await (await Training(line, str(node.runs)).open()).saved(1)
        mark = written(node.runs)
    shutil.rmtree(short_dir / "state")
    async with daemon(short_dir) as node, node.connect() as line:
        await line.ask("root.add", path=str(node.runs), kind="managed")
        await eventually(lambda: _knows(node, mark))
        assert written(node.runs) == mark


async def _knows(node: Node, mark: str) -> bool:
    return (await known(node))[0] == mark


async def test_a_root_that_lies_in_the_place_of_another_waits_for_a_person(short_dir):
    """`ckpt rebuild ROOT` is that person's word; `ckpt rebuild` of everything is not."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await training.saved(1)
        (node.runs / NAME).write_text(json.dumps({"v": 1, "root": "07" * 16}))
        second = await training.save(2)
        await eventually(lambda: str(node.runs) in node.parts.workers.marks.refused())
        [one] = (await line.ask("rebuild"))["roots"]
        assert "another root" in one["problem"]
        assert await states(node, [second]) == "p"
        assert not (node.runs / "demo/run/step_0000000002").exists()
        [one] = (await line.ask("rebuild", root=str(node.runs)))["roots"]
        assert (one["problem"], one["known"]) == ("", 1)
        await line.push("level", checkpoint=second, level="verified", state="live")
        assert written(node.runs) == "07" * 16
        assert (await known(node))[0] == "07" * 16


async def test_a_person_who_rebuilds_an_empty_mount_point_by_mistake_adopts_nothing(short_dir, disk):
    async with daemon(short_dir) as node, node.connect() as line:
        await (await Training(line, str(node.runs)).open()).saved(1)
        mark = await known(node)
        disk.go()
        [one] = (await line.ask("rebuild", root=str(node.runs)))["roots"]
        assert "another file system" in one["problem"]
        assert await known(node) == mark
        disk.come()
        assert (await line.ask("rebuild", root=str(node.runs)))["roots"][0]["problem"] == ""


async def test_a_disk_that_is_mounted_again_under_another_number_is_the_same_root(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        await (await Training(line, str(node.runs)).open()).saved(1)
        mark, device = await known(node)
    async with daemon(short_dir, front=False) as node:
        await node.write(lambda tx: roots.remember_mark(tx, str(node.runs), mark, device + 1))
    async with daemon(short_dir, front=False) as node:
        await node.parts.reconciler.sweep(0.0)
        assert await known(node) == (mark, device)


async def test_a_mark_that_can_not_be_recorded_lets_its_publish_wait(short_dir, monkeypatch):
    """Else a row would tell of a checkpoint under a mark that the next daemon does not know."""
    async with daemon(short_dir) as node, node.connect() as line:
        kept, tries = node.parts.workers.marks.remember, []

        async def fail_once(root: str, mark: Any) -> None:
            tries.append(mark)
            if len(tries) == 1:
                raise RootDegraded("the catalog has no room")
            await kept(root, mark)

        node.parts.workers.marks.remember = fail_once
        await (await Training(line, str(node.runs)).open()).saved(1)
        assert len(tries) >= 2
        assert (await known(node))[0] == written(node.runs)


async def test_a_watched_root_has_no_file_of_ours_written_into_it(short_dir):
    tree = short_dir / "theirs"
    tree.mkdir()
    async with daemon(short_dir, roots=[{"path": str(tree), "kind": "watched"}]) as node:
        [root] = await node.read(roots.all_roots)
        await node.parts.reconciler.scan(root)
        with pytest.raises(NotFound):
            await node.read(lambda conn: checkpoints.get(conn, "0" * 32))
        assert os.listdir(tree) == []
