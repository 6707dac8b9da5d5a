"""A fetch from an archive, and the giving up of what it brought, killed at every named step (M087)."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import anyio
import pytest

from ckptd.pipeline.filecache import Item
from ckptd.worker.fetching import FetchBegin, FetchDrop, FetchedList, FetchKeep
from ckptd.worker.protocol import FileRecord
from tests.support.worker_process import Died, WorkerProcess
from tests.unit.pipeline.test_filecache import Archive, a_cache, below, lies

IN_WORKER = ("fetch.compared", "dir.fsynced", "publish.renamed", "parent.fsynced")
POINTS = ("fetch.compared", "fetch.kept", "fetch.dropped")

DAEMON = """
import json, sys
from pathlib import Path
import anyio
from ckptd.model import FileEntry
from ckptd.pipeline.filecache import Item
from tests.unit.pipeline.test_filecache import a_cache

async def main() -> None:
    directory, key, files = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    item = Item(key, tuple(FileEntry(*file) for file in files))
    async with a_cache(Path(directory)) as (cache, archive, _):
        await cache.get(item, "r", archive.of(item))

anyio.run(main)
"""


def record(item: Item) -> list[FileRecord]:
    return [FileRecord(file.path, file.size_bytes, file.sha256) for file in item.files]


@pytest.mark.parametrize("point", IN_WORKER)
def test_a_fetch_killed_at_any_step_is_whole_or_absent(tmp_path, point):
    """No reader ever finds half of what was fetched under its final name, and the next try goes through."""
    item = Archive(tmp_path / "archive").put()
    root, place = str(tmp_path / "cache"), tmp_path / "cache" / item.key[:2] / item.key
    with WorkerProcess(fail=f"{point}=kill") as worker:
        begun = worker.ask(FetchBegin(root=root, key=item.key))
        shutil.copytree(tmp_path / "archive" / item.key, begun.path, dirs_exist_ok=True)
        with pytest.raises(Died):
            worker.ask(FetchKeep(root=root, key=item.key, path=begun.path, files=record(item)))
    renamed = point in {"publish.renamed", "parent.fsynced"}
    assert place.exists() is renamed
    if renamed:
        assert all((place / f.path).stat().st_size == f.size_bytes for f in item.files)
    with WorkerProcess() as worker:
        begun = worker.ask(FetchBegin(root=root, key=item.key))
        shutil.copytree(tmp_path / "archive" / item.key, begun.path, dirs_exist_ok=True)
        done = worker.ask(FetchKeep(root=root, key=item.key, path=begun.path, files=record(item)))
        assert done.count == (0 if renamed else 1)
        assert worker.ask(FetchedList(root=root)).keys == [item.key]


def test_giving_one_up_killed_half_way_leaves_nothing_under_its_name(tmp_path):
    item = Archive(tmp_path / "archive").put()
    root, place = str(tmp_path / "cache"), tmp_path / "cache" / item.key[:2] / item.key
    with WorkerProcess(fail="fetch.dropped=kill") as worker:
        begun = worker.ask(FetchBegin(root=root, key=item.key))
        shutil.copytree(tmp_path / "archive" / item.key, begun.path, dirs_exist_ok=True)
        worker.ask(FetchKeep(root=root, key=item.key, path=begun.path, files=record(item)))
        with pytest.raises(Died):
            worker.ask(FetchDrop(root=root, key=item.key))
    assert not place.exists()
    with WorkerProcess() as worker:
        assert worker.ask(FetchDrop(root=root, key=item.key)).count == 0
        assert worker.ask(FetchedList(root=root)).keys == []


async def test_files_whose_row_was_never_written_are_dropped_by_the_next_daemon_and_fetched_again(short_dir):
    """Killed between the final name and the catalog: the files are whole, and nobody knows them."""
    item = Archive(short_dir / "archive").put()
    files = json.dumps([[file.path, file.size_bytes, file.sha256] for file in item.files])
    environment = {**os.environ, "CKPTD_FAIL": "fetch.kept=kill"}
    command = [sys.executable, "-c", DAEMON, str(short_dir), item.key, files]
    with anyio.fail_after(60):
        done = await anyio.run_process(command, env=environment, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert below(short_dir / "state/cache") == [item.key]
    async with a_cache(short_dir) as (cache, archive, _):
        assert await cache.entries() == []
        await cache.get(item, "r", archive.of(item))
        assert archive.fetched == [item.key], "what nobody knew was not trusted"
        assert lies(cache, item, archive)
