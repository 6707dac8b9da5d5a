"""best: what it asks, what it prints, and that looking needs no daemon."""

import anyio
import pytest

from ckptd.pipeline import winners
from ckptd.rules import Rules
from tests.support.catalog import experiment, opened, saved

ID = "6f1c0e3a9b7d4c52a1e8f00d5b6c7a89"
RULES = Rules(
    keep_best=(
        {"metric": "val_loss", "mode": "min", "k": 2},
        {
            "name": "front",
            "by": "pareto",
            "terms": [{"metric": "val_loss", "mode": "min"}, {"metric": "acc", "mode": "max"}],
            "scope": "project",
        },
    )
)


def test_list_has_one_line_for_each_rule(run, daemon):
    ran = run("best", "list", "imagenet/resnet50")
    path = "/data/runs/imagenet/resnet50/step_0000001000"
    assert ran.out.split("\t") == ["imagenet/resnet50", "val_loss", ID, "1000", "0.31", "1", f"{path}\n"]
    assert daemon.asked("best") == [{"project": "imagenet", "name": "resnet50", "places": 1}]


def test_list_follows_the_pages_to_their_end(run, daemon):
    [one] = daemon.replies["best"]["experiments"]
    pages = [{"experiments": [one], "next": 7}, {"experiments": [one], "next": None}]
    daemon.replies["best"] = lambda _: pages.pop(0)
    assert len(run("best", "list", "--jsonl").out.splitlines()) == 2
    assert [asked.get("after") for asked in daemon.asked("best")] == [None, 7]


def test_show_prints_every_place_of_one_rule(run, daemon):
    ran = run("best", "show", "imagenet/resnet50", "val_loss")
    assert ran.out.startswith(f"1\t{ID}\timagenet/resnet50\t1000\t0.31\tval_loss=0.31\t/data")
    assert daemon.asked("best") == [{"project": "imagenet", "name": "resnet50", "rule": "val_loss", "places": 500}]
    assert run("best", "show", "imagenet/resnet50", "--json").json["boards"][0]["words"] == "best by val_loss (min)"


def test_a_rule_that_is_not_there_is_exit_code_3(run, daemon):
    daemon.replies["best"] = {"experiments": [], "next": None}
    ran = run("best", "show", "imagenet/resnet50", "nothing")
    assert (ran.code, ran.out) == (3, "")
    assert "no rule 'nothing'" in ran.err
    assert run("best", "show", "imagenet").code == 2


def test_recompute_names_what_differs(run, daemon):
    ran = run("best", "recompute", "imagenet", "--dry-run")
    assert ran.out == "imagenet/resnet50\tval_loss\n"
    assert "1 of 3 experiments differ" in ran.err
    assert daemon.asked("best.recompute") == [{"project": "imagenet", "dry_run": True}]


async def _fill(path):
    async with opened(path) as catalog:
        for name, loss, acc in (("a", 0.5, 0.9), ("b", 0.3, 0.7)):
            of = await experiment(catalog, name, project="imagenet")
            row = await saved(catalog, of, 100, metrics={"val_loss": loss, "acc": acc})
            await catalog.write(lambda tx, row=row: winners.refresh_best(tx, row, RULES))


@pytest.fixture
def known(short_dir):
    (short_dir / "state").mkdir(mode=0o700)
    anyio.run(_fill, short_dir / "state" / "catalog.sqlite")


@pytest.mark.usefixtures("known")
def test_looking_works_without_a_daemon_and_deciding_does_not(run):
    """M103: a rule over the project says the same in each of its experiments."""
    rows = [line.split("\t") for line in run("best", "list", "imagenet").out.splitlines()]
    assert [(row[0], row[1], row[4], row[5]) for row in rows] == [
        ("imagenet/b", "val_loss", "0.3", "1"),
        ("imagenet/b", "front", "0.3", "2"),
        ("imagenet/a", "val_loss", "0.5", "1"),
        ("imagenet/a", "front", "0.3", "2"),
    ]
    shown = run("best", "show", "imagenet/a", "front").out.splitlines()
    assert [line.split("\t")[2] for line in shown] == ["imagenet/b", "imagenet/a"]
    assert run("path", "imagenet/a@best:front").out.strip().startswith("/data/")
    assert run("best", "recompute").code == 5
