"""The one writer: commits, batches, failures, cancellation, full disks, locks."""

import errno
import os
import sqlite3
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import func, insert, select, text

from ckptd import config
from ckptd.catalog import Catalog, experiments, open_catalog, roots, schema, sqlite, writer
from ckptd.catalog.roots import NewRoot
from ckptd.catalog.tx import Tx
from ckptd.errors import Bug, Busy, CatalogFault, CkptdError, NoSpace
from ckptd.events import Event
from ckptd.model import RootKind
from tests.support.catalog import SETTINGS, UID, StillClock, Told, an_experiment, experiment, opened


def a_root(path: str) -> NewRoot:
    return NewRoot(path=path, kind=RootKind.WATCHED, uid=UID)


async def paths(catalog: Catalog) -> set[str]:
    return {root.path for root in await catalog.read(roots.all_roots)}


async def test_nothing_is_told_and_nothing_stays_of_a_transaction_that_fails(catalog: Catalog, told: Told) -> None:
    called: list[int] = []

    async def fails(tx: Tx) -> None:
        await roots.ensure(tx, a_root("/lost"))
        tx.after(lambda: called.append(1))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await catalog.write(fails)
    assert await paths(catalog) == set()
    assert (told.names, called) == ([], [])


@pytest.mark.parametrize(
    ("number", "told_as"),
    [(errno.EIO, CatalogFault), (errno.ECONNRESET, CatalogFault), (errno.ENOSPC, NoSpace), (errno.EMFILE, Busy)],
)
async def test_an_error_of_the_kernel_under_a_commit_is_the_catalogs_trouble_and_no_defect(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, number: int, told_as: type[CkptdError]
) -> None:
    """It ends the transaction, everybody in it is told who must act, and the next write finds the catalog as it was."""

    def breaks(point: str) -> None:
        if point == "catalog.commit":
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(writer.failpoint, "hit", breaks)
        with pytest.raises(told_as):
            await catalog.write(lambda tx: roots.ensure(tx, a_root("/lost")))
    assert await paths(catalog) == set()
    await catalog.write(lambda tx: roots.ensure(tx, a_root("/kept")))
    assert await paths(catalog) == {"/kept"}


async def test_events_and_callbacks_come_after_the_commit_that_makes_them_true(
    tmp_path: Path, clock: StillClock
) -> None:
    """A subscriber that looks at once, with another connection, must see what it was told of."""
    seen: list[int] = []

    def look(*_: Any) -> None:
        other = sqlite3.connect(tmp_path / "c.sqlite")
        seen.append(other.execute("SELECT count(*) FROM root").fetchone()[0])
        other.close()

    async with open_catalog(tmp_path / "c.sqlite", SETTINGS, clock, look) as catalog:

        async def write(tx: Tx) -> None:
            await roots.ensure(tx, a_root("/data"))
            tx.after(look)
            look()

        await catalog.write(write)
    assert seen == [0, 1, 1]


async def test_an_undeclared_event_fails_its_transaction(catalog: Catalog) -> None:
    async def write(tx: Tx) -> None:
        await roots.ensure(tx, a_root("/data"))
        tx.emit(Event("no.such", tx.clock.now()))

    with pytest.raises(Bug):
        await catalog.write(write)
    assert await paths(catalog) == set()


async def at_once(catalog: Catalog, count: int, *, odd_fail: bool = True) -> list[Any]:
    """Start many writes at the same moment; every third fails after it has written."""
    outcomes: list[Any] = [None] * count

    async def one(number: int) -> None:
        async def write(tx: Tx) -> str:
            root = await roots.ensure(tx, a_root(f"/{number}"))
            if odd_fail and number % 3 == 0:
                raise ValueError(str(number))
            return root.path

        try:
            outcomes[number] = await catalog.write(write)
        except ValueError as error:
            outcomes[number] = error

    async with anyio.create_task_group() as group:
        for number in range(count):
            group.start_soon(one, number)
    return outcomes


async def test_writes_that_wait_together_share_a_commit_and_fail_alone(catalog: Catalog, told: Told) -> None:
    """M017: many trainers at once, no lost row; one bad write spoils nobody else's."""
    before = catalog._writer.commits  # type: ignore[union-attr]
    outcomes = await at_once(catalog, 100)
    assert [isinstance(outcome, ValueError) for outcome in outcomes] == [n % 3 == 0 for n in range(100)]
    assert await paths(catalog) == {f"/{n}" for n in range(100) if n % 3}
    assert sorted(event.data["root"] for event in told.events) == sorted(f"/{n}" for n in range(100) if n % 3)
    assert catalog._writer.commits - before <= 100 // writer.BATCH_MAX + 2  # type: ignore[union-attr]


async def test_a_cancelled_write_that_waits_leaves_nothing(catalog: Catalog) -> None:
    begun, go_on = anyio.Event(), anyio.Event()

    async def slow(tx: Tx) -> None:
        begun.set()
        await go_on.wait()
        await roots.ensure(tx, a_root("/slow"))

    async with anyio.create_task_group() as group:
        group.start_soon(catalog.write, slow)
        await begun.wait()
        with anyio.move_on_after(0.01) as scope:
            await catalog.write(lambda tx: roots.ensure(tx, a_root("/cancelled")))
        assert scope.cancelled_caught
        go_on.set()
    assert await paths(catalog) == {"/slow"}


async def test_a_write_cancelled_once_begun_runs_to_its_end(catalog: Catalog) -> None:
    """Half a transaction is never left open on the one connection."""
    begun = anyio.Event()

    async def slow(tx: Tx) -> None:
        begun.set()
        await anyio.sleep(0.05)
        await roots.ensure(tx, a_root("/whole"))

    async with anyio.create_task_group() as group:
        group.start_soon(catalog.write, slow)
        await begun.wait()
        group.cancel_scope.cancel()
    assert await paths(catalog) == {"/whole"}
    await catalog.write(lambda tx: roots.ensure(tx, a_root("/next")))


async def test_a_cancelled_read_leaves_its_connection_usable(catalog: Catalog) -> None:
    for _ in range(3 * SETTINGS.readers):
        with anyio.move_on_after(0):
            await catalog.read(roots.all_roots)
    assert await paths(catalog) == set()


async def test_more_waiting_writes_than_the_limit_are_told_to_come_back(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "WRITERS_MAX", 5)
    begun, go_on = anyio.Event(), anyio.Event()
    refused = 0

    async def slow(tx: Tx) -> None:
        begun.set()
        await go_on.wait()

    async def one(number: int) -> None:
        nonlocal refused
        try:
            await catalog.write(lambda tx: roots.ensure(tx, a_root(f"/{number}")))
        except Busy as error:
            refused += 1 if error.details["retry_after_s"] > 0 else 100

    async with anyio.create_task_group() as group:
        group.start_soon(catalog.write, slow)
        await begun.wait()
        for number in range(8):
            group.start_soon(one, number)
        await anyio.wait_all_tasks_blocked()
        go_on.set()
    assert refused == 3
    assert len(await paths(catalog)) == 5


async def test_readers_see_one_consistent_view_during_a_long_write(catalog: Catalog) -> None:
    """M032: neither half of the write, nor a change between two statements of one read."""
    half, go_on = anyio.Event(), anyio.Event()

    async def long_write(tx: Tx) -> None:
        await roots.ensure(tx, a_root("/1"))
        half.set()
        await go_on.wait()
        await roots.ensure(tx, a_root("/2"))

    counted = select(func.count()).select_from(schema.root)

    async def read(conn: Any) -> tuple[int, int]:
        first = (await conn.execute(counted)).scalar_one()
        go_on.set()
        await done.wait()
        return first, (await conn.execute(counted)).scalar_one()

    done = anyio.Event()

    async def write() -> None:
        await catalog.write(long_write)
        done.set()

    async with anyio.create_task_group() as group:
        group.start_soon(write)
        await half.wait()
        assert await catalog.read(read) == (0, 0)
    assert len(await paths(catalog)) == 2


async def test_a_reading_connection_cannot_write(catalog: Catalog) -> None:
    """One connection writes; a reader that tried would be a bug, and is refused by SQLite itself."""
    new = insert(schema.project).values(uid=1, name="x")
    with pytest.raises(Exception, match="readonly"):
        await catalog.read(lambda conn: conn.execute(new))


async def test_a_thousand_queries_open_no_more_than_the_readers(tmp_path: Path) -> None:
    """M033."""
    at_the_same_time = most = 0

    async def read(conn: Any) -> None:
        nonlocal at_the_same_time, most
        at_the_same_time += 1
        most = max(most, at_the_same_time)
        await conn.execute(text("SELECT 1"))
        at_the_same_time -= 1

    settings = config.Catalog(ballast_bytes=0, readers=3)
    async with opened(tmp_path / "c.sqlite", settings=settings) as catalog, anyio.create_task_group() as group:
        for _ in range(1000):
            group.start_soon(catalog.read, read)
    assert most == 3


async def test_a_lock_held_by_another_process_is_weather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F18: told as busy, nothing lost, and the catalog goes on when the lock is gone."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 20)
    path = tmp_path / "c.sqlite"
    async with opened(path) as catalog:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Busy) as caught:
            await catalog.write(lambda tx: roots.ensure(tx, a_root("/1")))
        assert "another process" in caught.value.message
        other.execute("ROLLBACK")
        other.close()
        await catalog.write(lambda tx: roots.ensure(tx, a_root("/1")))
        assert await paths(catalog) == {"/1"}


def fill_up(catalog: Catalog) -> Any:
    """Make the database full for real: SQLite itself answers SQLITE_FULL from its page limit on."""

    async def limit(conn: Any) -> int:
        (pages,) = await sqlite.pragma(conn, "page_count")
        (limited,) = await sqlite.pragma(conn, f"max_page_count={pages}")
        return int(limited)

    return catalog._writer.exclusive(limit)  # type: ignore[union-attr]


async def test_on_a_full_disk_the_ballast_is_released_and_the_write_tried_again(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deletions must be recordable when there is no space."""
    settings = config.Catalog(ballast_bytes=1 << 20)
    path = tmp_path / "c.sqlite"
    reserve = tmp_path / "c.sqlite.ballast"
    async with opened(path, told, settings=settings) as catalog:
        assert reserve.stat().st_blocks * 512 >= 1 << 20
        await fill_up(catalog)
        one = catalog._writer
        assert one is not None
        release = one.ballast.release

        async def released_space() -> bool:
            """What the file system does when the reserve is cut: there is room again."""
            freed = await release()
            await sqlite.pragma(one.conn, "max_page_count=100000")
            return freed

        monkeypatch.setattr(one.ballast, "release", released_space)
        await experiment(catalog, config={"big": "x" * 100_000})
        assert told.names == ["experiment.opened"]
        assert reserve.stat().st_blocks == 0
        assert not one.ballast.whole
        monkeypatch.setattr("ckptd.catalog.UPKEEP_COMMITS", 1)
        await catalog.write(lambda tx: roots.ensure(tx, a_root("/1")))
        assert reserve.stat().st_blocks * 512 >= 1 << 20


async def test_a_disk_that_stays_full_is_no_space_and_what_was_committed_stays(tmp_path: Path, told: Told) -> None:
    """M022, M049: and the catalog works again as soon as there is room. It is told at once, and once."""
    async with opened(tmp_path / "c.sqlite", told) as catalog:
        kept = await experiment(catalog, name="kept")
        await fill_up(catalog)
        for _ in range(2):
            with pytest.raises(NoSpace):
                await experiment(catalog, name="big", config={"big": "x" * 100_000})
        assert (await catalog.read(lambda conn: experiments.get(conn, kept))).name == "kept"
        await catalog._writer.exclusive(  # type: ignore[union-attr]
            lambda conn: sqlite.pragma(conn, "max_page_count=100000")
        )
        await experiment(catalog, name="big", config={"big": "x" * 100_000})
    assert told.names == ["experiment.opened", "catalog.failed", "experiment.opened"]
    assert (told.events[1].data["error"]["code"], told.events[1].seq) == ("no_space", None)


async def test_one_write_that_fills_the_disk_does_not_confuse_those_beside_it(tmp_path: Path) -> None:
    """SQLite may undo the whole transaction by itself; then nobody in it is told of success."""
    async with opened(tmp_path / "c.sqlite") as catalog:
        await fill_up(catalog)
        outcomes: dict[str, BaseException | None] = {}

        async def one(name: str, size: int) -> None:
            try:
                await catalog.write(
                    lambda tx: experiments.open_experiment(tx, an_experiment(name, config={"x": "y" * size}))
                )
                outcomes[name] = None
            except NoSpace as error:
                outcomes[name] = error

        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(one, f"r{number}", 200_000 if number == 3 else 1)
        rows, _ = await catalog.read(experiments.page)
        assert {row.name for row in rows} == {name for name, error in outcomes.items() if error is None}
        assert isinstance(outcomes["r3"], NoSpace)


async def test_the_wal_is_truncated_when_it_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open view keeps the WAL growing; once it is gone, upkeep cuts the file."""
    monkeypatch.setattr("ckptd.catalog.UPKEEP_COMMITS", 1)
    settings = config.Catalog(ballast_bytes=0, wal_bytes_max=64 << 10)
    path = tmp_path / "c.sqlite"
    async with opened(path, settings=settings) as catalog:
        go_on, reading = anyio.Event(), anyio.Event()

        async def look(conn: Any) -> None:
            await conn.execute(text("SELECT count(*) FROM root"))
            reading.set()
            await go_on.wait()

        monkeypatch.setattr(sqlite, "TRUNCATE_WAIT_MS", 1)
        async with anyio.create_task_group() as group:
            group.start_soon(catalog.read, look)
            await reading.wait()
            for number in range(4):
                await experiment(catalog, name=f"r{number}", config={"x": "y" * 50_000})
            assert await sqlite.wal_bytes(path) > 64 << 10
            go_on.set()
        await experiment(catalog, name="last")
        assert await sqlite.wal_bytes(path) <= 64 << 10


async def test_state_is_for_its_owner_only(tmp_path: Path) -> None:
    async with opened(tmp_path / "c.sqlite") as catalog:
        await experiment(catalog)
        modes = {os.stat(tmp_path / name).st_mode & 0o777 for name in ("c.sqlite", "c.sqlite-wal", "c.sqlite-shm")}
    assert modes == {0o600}


def test_a_ballast_never_fills_the_disk_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptd.catalog.ballast import Ballast

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    too_big = Ballast(tmp_path / "big", 1 << 60)
    assert not too_big._fill()
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        late = Ballast(tmp_path / "late", 1 << 20)
        assert not late._fill()
    assert (tmp_path / "late").stat().st_size == 0
    assert not Ballast(tmp_path / "none", 1 << 20)._release()
