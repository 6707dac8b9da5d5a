"""grid and recovery: what they print for people and for programs, with a daemon and without. M061, M062"""

import json
import subprocess
import sys

import anyio
import pytest

from ckptd.catalog import experiments
from ckptd.model import ExperimentStatus
from tests.support.catalog import StillClock, experiment, opened, saved

ID = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"


def test_grid_on_a_terminal_is_a_table_with_a_line_for_the_whole(run, daemon, on_terminal):
    ran = run("grid", "imagenet", "--tag", "sweep7", "--metric", "val_loss")
    header, row, blank, whole = ran.out.splitlines()
    assert header.split() == (
        "EXPERIMENT IS DONE STEP STEPS/S LEFT SEEN VAL_LOSS LAST VAL_LOSS MIN VAL_LOSS MAX".split()  # noqa: SIM905
    )
    assert row.split()[:6] == ["imagenet/lr-0.1", "running", "25%", "1000/4000", "2", "25m"]
    assert row.split()[-3:] == ["0.31", "0.3", "2.1"]
    assert (blank, whole) == ("", "1 experiments, 1 running, 25% done, 25m left")
    (asked,) = daemon.asked("grid")
    assert asked == {"project": "imagenet", "tag": "sweep7", "metric": "val_loss", "limit": 500}


def test_grid_in_a_pipe_is_tab_separated(run, daemon):
    fields = run("grid").out.rstrip("\n").split("\t")
    assert fields[:11] == [
        ID, "imagenet", "lr-0.1", "running", "0.25", "1000", "4000.0", "steps", "2.0", "1500.0",
        "2026-11-20T12:00:00+00:00",
    ]  # fmt: skip


def test_grid_json_is_one_object_and_jsonl_one_per_experiment(run, daemon):
    assert run("grid", "--json").json["summary"]["by_condition"] == {"running": 1}
    assert json.loads(run("grid", "--jsonl").out)["condition"] == "running"


def test_grid_says_when_there_are_more(run, daemon):
    daemon.replies["grid"]["more"] = True
    assert "there are more than these 1" in run("grid").err


def test_names_of_other_people_cannot_move_the_cursor(run, daemon, on_terminal):
    daemon.replies["grid"]["rows"][0]["name"] = "a\x1b[31m"
    daemon.replies["recovery"]["hints"] = ["b\x1b[31m"]
    assert "\x1b" not in run("grid").out + run("recovery", "a/b").out


def test_recovery_says_what_is_needed_to_go_on(run, daemon, on_terminal):
    lines = run("recovery", "imagenet/resnet50").out.splitlines()
    assert lines[0] == "imagenet/resnet50 lost"
    assert lines[1].split()[:5] == ["last", "good", "step", "1000,", "6f1c0e3a9b7d,"]
    assert lines[2].strip() == "/data/runs/imagenet/resnet50/step_0000001000"
    assert lines[-1].strip() == "command   cd /home/me/train && /usr/bin/python3 train.py --lr 0.1"
    assert daemon.asked("recovery") == [{"project": "imagenet", "name": "resnet50"}]


def test_recovery_command_prints_the_command_alone(run, daemon):
    assert run("recovery", ID, "--command").out == "cd /home/me/train && /usr/bin/python3 train.py --lr 0.1\n"
    assert daemon.asked("recovery") == [{"experiment": ID}]
    daemon.replies["recovery"]["command"] = None
    ran = run("recovery", ID, "--command")
    assert (ran.code, ran.out) == (3, "")
    assert "did not say how it was started" in ran.err


@pytest.mark.parametrize("word", ["resnet50", "a/b/c", "/b", "a/", ID[:10]])
def test_what_names_no_experiment_is_a_clear_error(run, daemon, word):
    ran = run("recovery", word)
    assert ran.code == 2
    assert f"{word!r} is neither PROJECT/NAME nor an id" in ran.err


def test_show_says_how_to_go_on_after_a_bad_end(run, daemon, on_terminal):
    assert "to go on" not in run("show", "latest").out
    daemon.replies["show"]["recovery"] = daemon.replies["recovery"]
    daemon.replies["show"]["experiment"]["status"] = "lost"
    shown = run("show", "latest").out
    assert "its experiment lost; to go on:" in shown
    assert "python3 train.py --lr 0.1" in shown


def test_show_says_what_hooks_found(run, daemon, on_terminal):
    (line,) = [line for line in run("show", "latest").out.splitlines() if "numeric-health" in line]
    assert line.split("  ")[-1] == "numbers are sound"


def test_without_a_daemon_the_catalog_answers_and_the_command_still_runs(run, short_dir):
    (short_dir / "state").mkdir()
    facts = {"cwd": str(short_dir), "executable": sys.executable, "argv": ["-c", "print('again')"], "host": "here"}

    async def fill() -> None:
        async with opened(short_dir / "state/catalog.sqlite", None, StillClock()) as catalog:
            one = await experiment(catalog, "run", facts=facts, tags=("t",))
            await saved(catalog, one, 300)
            await catalog.write(lambda tx: experiments.set_status(tx, one, ExperimentStatus.LOST))

    anyio.run(fill)
    assert [row["condition"] for row in run("grid", "--tag", "t", "--json").json["rows"]] == ["lost"]
    nothing = run("grid", "imagnet")
    assert (nothing.code, nothing.out) == (3, "")
    assert "no experiment of project 'imagnet'" in nothing.err
    assert "projects: demo; tags: t" in nothing.err
    found = run("recovery", "demo/run", "--json").json
    assert (found["checkpoint"]["step"], found["source"]) == (300, "catalog")
    command = run("recovery", "demo/run", "--command").out
    again = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert again.stdout == "again\n"
    assert "to go on" in run("show", "demo/run").out
