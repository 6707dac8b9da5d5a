"""Files from an archive, here a local directory: fetched once, exact, within the budget, held while in use (M087)."""

import hashlib
import os
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.catalog.cached import Cached
from ckptd.config import Workers as WorkerSettings
from ckptd.errors import Missing, OverQuota, SourceChanged, Weather
from ckptd.model import FileEntry, new_id
from ckptd.pipeline.filecache import FileCache, Item, to_drop
from ckptd.worker import Workers
from tests.support.catalog import StillClock, opened
from tests.support.in_process import settings_of

NOW = datetime(2030, 1, 1, tzinfo=UTC)
KIB = 1 << 10
ENTRIES = st.lists(st.tuples(st.integers(1, 100), st.booleans()), max_size=12).map(
    lambda found: [Cached(f"{n:032x}", size, NOW, n, NOW, held) for n, (size, held) in enumerate(found)]
)


@settings(max_examples=120)
@given(ENTRIES, st.integers(0, 700), st.randoms())
def test_the_longest_unused_go_and_no_more_than_must(entries, to_bytes, dice):
    shuffled = entries[:]
    dice.shuffle(shuffled)
    gone = to_drop(shuffled, to_bytes)
    free = [entry for entry in entries if not entry.in_use]
    assert gone == [entry.key for entry in free[: len(gone)]], "in the order of use"
    left = sum(entry.size_bytes for entry in entries if entry.key not in gone)
    assert left <= to_bytes or len(gone) == len(free)
    if gone:
        last = next(entry for entry in entries if entry.key == gone[-1])
        assert left + last.size_bytes > to_bytes


# -- with a real worker -----------------------------------------------------------------------------


class Archive:
    """A directory that stands for a tier, and counts how often each item was asked of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fetched: list[str] = []
        self.spoil = ""

    def put(self, size_bytes: int = 10 * KIB) -> Item:
        key = new_id()
        (self.directory / key / "model").mkdir(parents=True)
        files = []
        for name in ("manifest.json", "model/part.safetensors"):
            data = random.Random(f"{key}{name}").randbytes(size_bytes // 2)
            (self.directory / key / name).write_bytes(data)
            files.append(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()))
        return Item(key, tuple(files))

    def of(self, item: Item):
        async def fetch(target: str) -> None:
            self.fetched.append(item.key)
            await anyio.to_thread.run_sync(
                lambda: shutil.copytree(self.directory / item.key, target, dirs_exist_ok=True)
            )
            if self.spoil == "cut":
                os.truncate(f"{target}/manifest.json", 1)
            elif self.spoil == "missing":
                os.unlink(f"{target}/manifest.json")
            elif self.spoil == "more":
                Path(f"{target}/more").write_text("x")
            elif self.spoil:
                raise Weather("the archive is away")

        return fetch


def lies(cache: FileCache, item: Item, archive: Archive) -> bool:
    """Whether it is there, whole."""
    place = Path(cache.place(item.key))
    same = (
        [(place / f.path).read_bytes() == (archive.directory / item.key / f.path).read_bytes() for f in item.files]
        if place.exists()
        else []
    )
    assert all(same), "half of it has the final name"
    return bool(same)


def below(root: Path) -> list[str]:
    """Every name that is in the cache's directory."""
    return sorted(path.name for path in root.glob("*/*"))


@asynccontextmanager
async def a_cache(directory: Path, bytes_max: int = 30 * KIB) -> AsyncIterator[tuple[FileCache, Archive, StillClock]]:
    (directory / "archive").mkdir(exist_ok=True)
    settings = settings_of(directory, cache={"bytes_max": bytes_max})
    clock = StillClock()
    workers = Workers(WorkerSettings(idle_io=False, nice=0), clock, lambda event: None)
    async with opened(directory / "catalog.sqlite", clock=clock) as catalog, anyio.create_task_group() as group:
        await group.start(workers.run)
        yield FileCache(catalog, workers, clock, lambda: settings), Archive(directory / "archive"), clock
        group.cancel_scope.cancel()


async def test_what_is_asked_for_often_is_fetched_once_also_by_many_at_once(short_dir):
    """M087."""
    async with a_cache(short_dir) as (cache, archive, _):
        item = archive.put()
        async with anyio.create_task_group() as group:
            for reader in range(5):
                group.start_soon(cache.get, item, f"reader {reader}", archive.of(item))
        assert await cache.get(item, "late", archive.of(item)) == cache.place(item.key)
        assert lies(cache, item, archive)
        assert archive.fetched == [item.key]
        assert (cache.hits, cache.misses) == (5, 1)


async def test_the_longest_unused_makes_room_and_what_is_in_use_never_does(short_dir):
    """M087: LRU by bytes, pinned while in use."""
    async with a_cache(short_dir) as (cache, archive, clock):
        first, second, third, fourth = (archive.put() for _ in range(4))
        for item in (first, second, third):
            await cache.get(item, "r", archive.of(item))
        for item in (second, third):
            await cache.release(item.key, "r")
        await cache.get(second, "again", archive.of(second))
        await cache.release(second.key, "again")
        await cache.get(fourth, "r", archive.of(fourth))
        assert [lies(cache, item, archive) for item in (first, second, third, fourth)] == [True, True, False, True]
        assert sum(entry.size_bytes for entry in await cache.entries()) <= 30 * KIB
        await cache.get(second, "r", archive.of(second))
        with pytest.raises(OverQuota, match=r"cache\.bytes_max"):
            await cache.get(third, "r", archive.of(third))
        assert [lies(cache, item, archive) for item in (first, second, fourth)] == [True, True, True]
        clock.pass_s(7 * 3600)
        await cache.get(third, "r", archive.of(third))  # readers that never came back hold nothing for ever
        assert lies(cache, third, archive)


@pytest.mark.parametrize(
    ("spoil", "error"), [("cut", SourceChanged), ("missing", Missing), ("more", SourceChanged), ("away", Weather)]
)
async def test_what_the_archive_did_not_promise_is_never_kept(short_dir, spoil, error):
    async with a_cache(short_dir) as (cache, archive, _):
        item = archive.put()
        archive.spoil = spoil
        with pytest.raises(error):
            await cache.get(item, "r", archive.of(item))
        assert await cache.entries() == []
        assert below(short_dir / "state/cache") == []
        archive.spoil = ""
        await cache.get(item, "r", archive.of(item))
        assert lies(cache, item, archive)


async def test_a_trim_gives_up_what_nobody_uses_and_files_that_no_row_names_go_at_the_next_start(short_dir):
    async with a_cache(short_dir) as (cache, archive, _):
        used, unused = archive.put(), archive.put()
        for item in (used, unused):
            await cache.get(item, "r", archive.of(item))
        await cache.release(unused.key, "r")
        gone = await cache.trim(0)
        assert [entry.key for entry in gone] == [unused.key]
        assert below(short_dir / "state/cache") == [used.key]
        stray = short_dir / "state/cache/ab" / ("ab" * 16)
        stray.mkdir(parents=True)
        shutil.rmtree(cache.place(used.key))
        cache._ready = False
        await cache.trim(1 << 30)
        assert not stray.exists()
        assert await cache.entries() == []
