"""Opening: what is damaged, locked away, or in the wrong place is named, and never written to."""

import hashlib
import os
import sqlite3
import sys
from pathlib import Path

import anyio
import pytest
from sqlalchemy import text

from ckptd.catalog import (
    Catalog,
    checkpoints,
    experiments,
    open_catalog,
    open_reader,
    roots,
    schema,
    sqlite,
    versions,
)
from ckptd.catalog.roots import NewRoot
from ckptd.errors import CatalogFault, NotFound, Unreachable
from ckptd.model import RootKind
from ckptd_client import places
from tests.support.catalog import SETTINGS, UID, StillClock, Told, an_experiment, experiment, opened, saved


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def filled(path: Path, count: int = 40) -> str:
    async with opened(path) as catalog:
        known = await experiment(catalog)
        for step in range(count):
            await saved(catalog, known, step, note="x" * 500)
    return known


async def test_what_was_written_is_there_after_opening_again(tmp_path: Path) -> None:
    known = await filled(tmp_path / "c.sqlite", 3)
    async with opened(tmp_path / "c.sqlite") as catalog:
        newest = await catalog.read(lambda conn: checkpoints.newest_good(conn, known))
        assert newest is not None
        assert newest.step == 2
        assert (await saved(catalog, known, 9)).sequence > newest.sequence


async def test_promises_to_survive_a_power_cut_are_set(tmp_path: Path) -> None:
    """With synchronous=NORMAL a power cut lost 500 of 500 acknowledged commits, FULL none."""
    async with opened(tmp_path / "c.sqlite") as catalog:
        writer = catalog._writer
        assert writer is not None
        for words, wanted in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert (await sqlite.pragma(writer.conn, words))[0] == wanted


@pytest.mark.parametrize("where", ["header", "page"])
async def test_a_damaged_catalog_is_refused_with_advice_and_left_as_it_is(tmp_path: Path, where: str) -> None:
    """F19: a flipped page is found by quick_check, a foreign header by SQLite; the original is evidence."""
    path = tmp_path / "c.sqlite"
    await filled(path)
    with path.open("r+b") as file:
        file.seek(0 if where == "header" else 4096 * 12)
        file.write(b"not a database, not at all" if where == "header" else bytes(4096))
    before = sha256(path)
    with pytest.raises(CatalogFault, match="damaged") as caught:
        async with opened(path):
            pass
    assert "ckpt rebuild" in caught.value.hint
    assert str(path) in caught.value.hint
    assert sha256(path) == before


async def test_damage_met_while_running_is_a_fault_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    known = await filled(path)
    async with opened(path) as catalog:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            for page in range(4096, size, 4096):
                file.seek(page)
                file.write(b"\xff" * 100)
        with pytest.raises(CatalogFault, match="damaged") as caught:
            await catalog.read(lambda conn: experiments.summary(conn, known))
        assert "ckpt rebuild" in caught.value.hint
    with pytest.raises(CatalogFault):
        async with opened(path):
            pass


async def test_a_network_file_system_is_refused_unless_the_url_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M032: WAL needs shared memory, which no network file system has."""
    monkeypatch.setattr(places, "network_type", lambda path: "nfs4")
    path = tmp_path / "c.sqlite"
    with pytest.raises(CatalogFault, match="nfs4") as caught:
        async with opened(path):
            pass
    assert "CKPTD_DIR" in caught.value.hint
    assert not path.exists()
    url = f"sqlite+aiosqlite:///{path}?network=allow"
    async with open_catalog(url, SETTINGS, StillClock(), Told().publish) as catalog:
        await experiment(catalog)
    assert os.path.exists(path)


async def test_a_directory_nobody_may_write_to_is_a_fault_with_advice(tmp_path: Path) -> None:
    with pytest.raises(CatalogFault) as caught:
        async with opened(tmp_path / "missing" / "c.sqlite"):
            pass
    assert "permissions" in caught.value.hint


async def test_the_cli_reads_without_a_daemon_and_changes_nothing(tmp_path: Path) -> None:
    """The WAL of a daemon that was killed is read too, by a connection that can't truncate it."""
    path = tmp_path / "c.sqlite"
    code = (
        "import asyncio, os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.support.catalog import *\n"
        "async def main():\n"
        "    async with opened(Path(sys.argv[1])) as catalog:\n"
        "        await saved(catalog, await experiment(catalog), 5)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    await anyio.run_process([sys.executable, "-c", code, str(path)], check=False)
    wal = Path(f"{path}-wal")
    before = sha256(path), sha256(wal)
    assert before[1] != hashlib.sha256(b"").hexdigest()
    async with open_reader(path, SETTINGS) as catalog:
        (found,), _ = await catalog.read(experiments.page)
        newest = await catalog.read(lambda conn: checkpoints.newest_good(conn, found.id))
        assert newest is not None
        assert newest.step == 5
        with pytest.raises(Unreachable):
            await catalog.write(lambda tx: experiments.heartbeat(tx, found.id))
    assert (sha256(path), sha256(wal)) == before


async def test_reading_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        async with open_reader(tmp_path / "c.sqlite", SETTINGS):
            pass
    assert os.listdir(tmp_path) == []


async def test_a_reader_of_another_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    await filled(path, 1)
    raw = sqlite3.connect(path)
    raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.commit()
    raw.close()
    with pytest.raises(CatalogFault, match="9999"):
        async with open_reader(path, SETTINGS):
            pass


class NextVersion:
    """A step that the future brings, so that migrating from today's schema can be tested today."""

    SOURCE = """
import sqlalchemy as sa
from alembic import op
revision, down_revision, branch_labels, depends_on = "0002", "0001", None, None
def upgrade():
    with op.batch_alter_table("root") as root:
        root.add_column(sa.Column("color", sa.Text()))
    op.execute("UPDATE root SET color = 'blue'")
    op.create_index("ix_root_color", "root", ["color"])
def downgrade():
    op.drop_column("root", "color")
"""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("env.py", "steps/v0001_schema.py"):
            target = home / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text((versions.HERE / name).read_text())
        (home / "steps" / "v0002_color.py").write_text(self.SOURCE)
        monkeypatch.setattr(versions, "HERE", home)
        monkeypatch.setattr(versions, "HEAD", "0002")


async def test_an_older_catalog_is_migrated_after_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M038, M039: on a populated file; the snapshot is the whole catalog as it was. M049: it is an event, once."""
    told = Told()
    path = tmp_path / "c.sqlite"
    async with opened(path) as catalog:
        await catalog.write(lambda tx: roots.ensure(tx, NewRoot(path="/data", kind=RootKind.WATCHED, uid=UID)))
        known = await experiment(catalog)
        await saved(catalog, known, 5)
    NextVersion(tmp_path / "next", monkeypatch)
    async with opened(path, told):
        pass
    async with opened(path, told) as catalog:
        color = await catalog.read(lambda conn: conn.execute(text("SELECT color FROM root")))
        assert color.scalar_one() == "blue"
        newest = await catalog.read(lambda conn: checkpoints.newest_good(conn, known))
        assert newest is not None
    assert [(event.name, event.data) for event in told.events] == [
        ("catalog.migrated", {"before": "0001", "after": "0002"})
    ]
    snapshot = tmp_path / "c.sqlite.before-0002"
    assert snapshot.stat().st_mode & 0o777 == 0o600
    raw = sqlite3.connect(snapshot)
    assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == ("0001",)
    assert raw.execute("SELECT count(*) FROM checkpoint").fetchone() == (1,)
    assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    raw.close()


async def test_a_migration_killed_at_any_statement_leaves_the_old_schema_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F20: old or new, nothing between; and the next start goes through."""
    path = tmp_path / "c.sqlite"
    async with opened(path) as catalog:
        await catalog.write(lambda tx: roots.ensure(tx, NewRoot(path="/data", kind=RootKind.WATCHED, uid=UID)))
    NextVersion(tmp_path / "next", monkeypatch)
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from ckptd.catalog import versions\n"
        "from tests.support.catalog import opened\n"
        "versions.HERE, versions.HEAD = Path(sys.argv[2]), '0002'\n"
        "async def main():\n"
        "    async with opened(Path(sys.argv[1])): pass\n"
        "asyncio.run(main())\n"
    )
    killed = 0
    for point in ("catalog.snapshot", *(f"catalog.migrate:{n}" for n in range(1, 40))):
        done = await anyio.run_process(
            [sys.executable, "-c", code, str(path), str(tmp_path / "next")],
            env={**os.environ, "CKPTD_FAIL": f"{point}=kill"},
            check=False,
        )
        raw = sqlite3.connect(path)
        version = raw.execute("SELECT version_num FROM alembic_version").fetchone()[0]
        columns = {row[1] for row in raw.execute("PRAGMA table_info(root)")}
        tables = {row[0] for row in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert raw.execute("SELECT path FROM root").fetchall() == [("/data",)]
        raw.close()
        assert ("color" in columns) == (version == "0002")
        assert not [table for table in tables if "tmp" in table]
        if done.returncode == 0:
            break
        killed += 1
        assert version == "0001"
    assert killed >= 5
    assert version == "0002"


async def test_a_table_is_named_for_each_noun_of_the_design() -> None:
    """M034: one schema, used by all modules."""
    assert set(schema.metadata.tables) >= {
        *("project", "experiment", "segment", "metric", "metric_summary", "checkpoint", "file", "copy"),
        *("best", "pin", "lease", "job", "audit", "event", "root"),
    }
    assert an_experiment().uid == UID


async def test_an_error_of_the_caller_comes_out_as_it_is_and_the_catalog_is_closed(tmp_path: Path) -> None:
    async def fails() -> None:
        async with opened(tmp_path / "c.sqlite") as catalog:
            assert isinstance(catalog, Catalog)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await fails()
    assert not os.path.exists(tmp_path / "c.sqlite-wal")


async def test_a_write_ahead_log_that_is_removed_under_us_costs_no_commit_and_is_told(tmp_path: Path) -> None:
    """F19: SQLite goes on in the file that has no name; the next process would never see what was committed there."""
    path = tmp_path / "c.sqlite"
    async with opened(path) as catalog:
        await experiment(catalog, name="before")
        await catalog.recover()
        assert catalog.trouble is None
        Path(f"{path}-wal").unlink()
        await experiment(catalog, name="after")
        await catalog.recover()
        assert catalog.trouble is not None
        assert "removed or replaced" in catalog.trouble.error.message
        await experiment(catalog, name="later")
        await catalog.recover()
        with sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True) as other:  # as after a crash
            assert [row[0] for row in other.execute("SELECT name FROM experiment ORDER BY name")] == [
                "after",
                "before",
                "later",
            ]
        other.close()
