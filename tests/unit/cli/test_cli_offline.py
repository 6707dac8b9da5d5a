"""ls, show, path and experiments while no daemon runs: the real catalog, read and not touched."""

import os
import subprocess
import sys

import anyio
import pytest

from ckptd.catalog import checkpoints, holds
from ckptd.model import Level, new_id
from tests.support.boards import put_places
from tests.support.catalog import a_checkpoint, climb, experiment, opened, saved

ENTRY = [sys.executable, "-c", "import sys; from ckptd.cli import main; sys.exit(main())"]


async def _fill(path):
    """Three verified checkpoints of imagenet/resnet50, the second the best and pinned; one staged of imagenet/vit."""
    async with opened(path) as catalog:
        resnet = await experiment(catalog, "resnet50", project="imagenet")
        rows = [
            await saved(catalog, resnet, step, metrics={"val_loss": loss}, note=f"n{step}")
            for step, loss in ((100, 0.5), (200, 0.3), (300, float("nan")))
        ]
        vit = await experiment(catalog, "vit", project="imagenet")
        staged = await catalog.write(lambda tx: climb(tx, a_checkpoint(vit, 5), Level.STAGED))

        async def decide(tx):
            await holds.pin(tx, rows[1].id, 1000, "table 3")
            await put_places(tx, resnet, {("val_loss", "min"): [(rows[1].id, 0.3), (rows[0].id, 0.5)]})

        await catalog.write(decide)
        return [row.id for row in rows], staged.id


@pytest.fixture
def known(short_dir):
    (short_dir / "state").mkdir(mode=0o700)
    return anyio.run(_fill, short_dir / "state" / "catalog.sqlite")


def test_ls_reads_the_catalog_and_says_so(run, known):
    verified, staged = known
    ran = run("ls", "--json")
    assert ran.code == 0
    assert "no daemon answers; reading" in ran.err
    assert ran.json["source"] == "catalog"
    assert [row["checkpoint"] for row in ran.json["checkpoints"]] == [staged, *reversed(verified)]
    rows = {row["checkpoint"]: row for row in ran.json["checkpoints"]}
    assert "pin" in rows[verified[1]]["holds"]
    assert "latest" in rows[verified[2]]["holds"]
    assert rows[verified[2]]["metrics"] == {"val_loss": "NaN"}


def test_filters_and_pages_work_as_with_a_daemon(run, known):
    verified, _ = known
    assert run("ls", "imagenet/resnet50", "--sort", "step", "-q").out.split() == list(reversed(verified))
    assert run("ls", "imagenet/vit", "--level", "durable", "-q").out == ""
    ran = run("ls", "-n", "2", "-q")
    assert len(ran.out.split()) == 2
    assert "--all" not in ran.err  # ids are for programs; the hint is for people
    assert run("ls", "--all", "--state", "pending", "-q").out.split() == [known[1]]


def test_path_and_show_resolve_selectors(run, known):
    verified, staged = known
    assert run("path", "imagenet/resnet50").out == f"/data/{verified[2]}\n"
    assert run("path", "imagenet/resnet50@best:val_loss").out == f"/data/{verified[1]}\n"
    assert run("path", "imagenet/resnet50@best").out == f"/data/{verified[1]}\n"
    assert run("path", verified[0][:12]).out == f"/data/{verified[0]}\n"
    assert run("path", staged).code == 3
    body = run("show", "imagenet/resnet50@step:200", "--json").json
    assert body["checkpoint"]["note"] == "n200"
    assert body["files"][0]["path"] == "model.safetensors"
    assert {hold["kind"] for hold in body["holds"]} == {"pin"}
    assert {entry["what"] for entry in body["history"]} >= {"staged", "published", "verified"}
    assert run("show", "imagenet/resnet50@step:200").code == 0


def test_experiments_are_listed(run, known):
    rows = run("experiments", "--json").json["experiments"]
    assert [(row["name"], row["checkpoints"]) for row in rows] == [("vit", 0), ("resnet50", 3)]
    assert rows[1]["best"][0]["step"] == 200


def test_a_summary_is_counted(run, known):
    """M155"""
    verified, _ = known
    body = run("ls", "imagenet", "--summary", "--json").json
    assert (body["count"], body["valid"], body["invalid"]) == (4, 3, 0)
    assert body["by_level"] == {"verified": 3, "staged": 1}
    assert (body["newest"]["step"], body["oldest"]["step"]) == (300, 100)
    assert [(best["metric"], best["checkpoint"], best["value"]) for best in body["best"]] == [
        ("val_loss", verified[1], 0.3)
    ]
    assert run("ls", "nothing", "--summary", "--json").json["newest"] is None


def test_what_is_invalid_but_still_in_an_arena_is_recoverable(run, short_dir, known):
    """M155: valid, invalid, recoverable."""

    async def damage():
        async with opened(short_dir / "state" / "catalog.sqlite") as catalog:
            for at, arena in ((0, new_id()), (1, None)):
                await catalog.write(lambda tx, at=at: checkpoints.mark_missing(tx, known[0][at]))
                await catalog.write(lambda tx, at=at, arena=arena: checkpoints.set_arena(tx, known[0][at], arena))

    anyio.run(damage)
    body = run("ls", "--summary", "--json").json
    assert (body["valid"], body["invalid"], body["recoverable"]) == (1, 2, 1)


def test_nothing_is_found_with_exit_code_3_and_no_catalog_is_exit_code_5(run, known, short_dir):
    assert run("path", "nothing/here").code == 3
    assert run("show", "ffffffffff").code == 3
    (short_dir / "state" / "catalog.sqlite").unlink()
    assert run("ls").code == 5


@pytest.mark.parametrize("words", [["status"], ["verify", "latest"], ["pin", "latest"], ["log"], ["retention", "plan"]])
def test_other_verbs_need_a_daemon(run, known, words):
    assert run(*words).code == 5


def test_a_daemon_that_was_named_has_no_substitute(run, known, short_dir, monkeypatch):
    """Another daemon's catalog would answer something else."""
    monkeypatch.delenv("CKPTD_DIR")
    assert run("ls", "--socket", str(short_dir / "other")).code == 5


def test_the_catalog_is_not_changed_by_reading_it(run, known, short_dir):
    state = short_dir / "state"
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    for words in (["ls"], ["show", known[0][0]], ["path", "imagenet/resnet50"], ["ls", "--summary"]):
        assert run(*words).code == 0
    assert {
        path.name: path.read_bytes() for path in state.iterdir() if not path.name.endswith(("-shm", "-wal"))
    } == before


def test_what_a_killed_daemon_left_in_its_wal_is_seen(run, short_dir):
    """The newest commits of a daemon that died are in the WAL only."""
    code = (
        "import os, sys, anyio\n"
        "from tests.support.catalog import opened, experiment, saved\n"
        "async def go():\n"
        "    async with opened(sys.argv[1]) as catalog:\n"
        "        of = await experiment(catalog, 'resnet50', project='imagenet')\n"
        "        row = await saved(catalog, of, 7)\n"
        "        sys.stdout.write(row.id); sys.stdout.flush()\n"
        "        os.kill(os.getpid(), 9)\n"
        "anyio.run(go)\n"
    )
    (short_dir / "state").mkdir(mode=0o700)
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    catalog = short_dir / "state" / "catalog.sqlite"
    died = subprocess.run(
        [sys.executable, "-c", code, catalog], capture_output=True, env=env, text=True, timeout=60, check=False
    )
    assert died.returncode == -9
    assert (short_dir / "state" / "catalog.sqlite-wal").stat().st_size > 0
    assert run("ls", "-q").out.split() == [died.stdout]


def test_a_broken_configuration_does_not_hide_the_checkpoints(run, known, short_dir):
    (short_dir / "config" / "ckptd").mkdir(parents=True)
    (short_dir / "config" / "ckptd" / "config.toml").write_text("nonsense = [")
    assert len(run("ls", "-q").out.split()) == 4


def test_a_damaged_catalog_is_one_line(run, known, short_dir):
    (short_dir / "state" / "catalog.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 8192)
    ran = run("ls")
    assert ran.code == 1
    assert "[catalog_fault]" in ran.err
    assert "Traceback" not in ran.err


def test_a_process_that_reads_the_catalog_ends_cleanly(known):
    """Threads of the database driver must not keep the process, or complain at its end."""
    ran = subprocess.run([*ENTRY, "ls", "-q"], capture_output=True, text=True, timeout=60, check=True)
    assert len(ran.stdout.split()) == 4
    assert len(ran.stderr.splitlines()) == 1
