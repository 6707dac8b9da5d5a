"""The load bench runs, and its judges judge."""

import dataclasses
import os
import sqlite3

import pytest

from tests.bench_load import catalogue, report
from tests.bench_load.filler import fill
from tests.bench_load.outcome import Limit, bounded, impossible, percentile, told
from tests.bench_load.scale import SMALL
from tests.bench_load.tree import grow, know


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (50.0, 99.0, 7.0)


def test_a_row_is_met_when_all_of_its_figures_are() -> None:
    near, far = (Limit("p50", 2.0, "ms"), 1.9), (Limit("p99", 10.0, "ms"), 10.1)
    assert bounded("a", [near], 1).met
    row = bounded("a", [near, far], 5)
    assert row.met is False
    assert (row.target, row.measured) == ("p50 ≤ 2 ms, p99 ≤ 10 ms", "p50 1.9 ms, p99 10.1 ms")


def test_the_page_counts_what_is_met_and_says_why_a_row_is_missing() -> None:
    met = bounded("fast", [(Limit("p99", 10.0, "ms"), 1.0)], 3)
    missed = bounded("slow", [(Limit("p99", 10.0, "ms"), 11.0)], 3, "the disk")
    page = report.render(
        {"Part": [met, missed, impossible("gone", "-", "no disk"), told("size", "3 MiB", 1)]}, "make x"
    )
    assert "1 of 2 targets are met." in page
    assert "| slow | p99 ≤ 10 ms | p99 11 ms | **NO** | 3 |" in page
    assert "* slow: the disk." in page
    assert "* gone: no disk." in page
    assert page.startswith("# Load\n")


def test_a_filled_catalog_has_the_rows_and_indexes_of_a_grown_one(tmp_path) -> None:
    filled = fill(tmp_path / "filled", 2_000, 3, os.getuid())
    with sqlite3.connect(filled.path) as db:
        counts = [
            db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("checkpoint", "file", "experiment")
        ]
        assert counts == [2_000, 6_000, filled.experiments]
        assert db.execute("PRAGMA quick_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        indexes = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    db.close()
    assert {"ix_checkpoint_path_key", "ix_checkpoint_newest_good"} <= indexes


def test_a_tree_is_known_as_it_lies_there(tmp_path) -> None:
    grow(tmp_path / "w", 250)
    assert know(tmp_path / "catalog", tmp_path / "w", os.getuid()) == 250
    with sqlite3.connect(tmp_path / "catalog") as db:
        for path, ino, mtime_ns in db.execute("SELECT path, ino, mtime_ns FROM checkpoint"):
            assert (os.stat(path).st_ino, os.stat(path).st_mtime_ns) == (ino, mtime_ns)
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    db.close()


@pytest.mark.slow
def test_the_part_about_the_catalog_measures_every_row(tmp_path) -> None:
    """With five thousand checkpoints instead of a million; what it judges there is a machine's matter, not a test's."""
    rows = list(catalogue.measure(dataclasses.replace(SMALL, folder=None, looks=3)))
    assert {row.what for row in rows} >= {"list or search", "commit (synchronous=FULL)", "opening the catalog"}
    assert all(row.runs for row in rows)
