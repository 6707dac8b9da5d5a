"""What is told when an experiment fails or is lost: the last good checkpoint, and a command that really starts it again. M062"""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from ckptd.catalog import experiments, recovery
from ckptd.catalog.recovery import COMMAND_BYTES_MAX, Ended, command_of, recipe
from ckptd.hooks.builtin.notices import Recovery
from ckptd.hooks.context import Context
from ckptd.hooks.result import Level as Finding
from ckptd.model import ExperimentStatus, Level
from ckptd_client.facts import quick_facts
from tests.support.catalog import a_checkpoint, climb, experiment, saved

ENDED = Ended("e" * 32, "imagenet", "resnet50", "/data/runs", 950)


def facts(**more: object) -> dict[str, object]:
    return {"cwd": "/home/me", "executable": sys.executable, "argv": ["train.py", "--lr", "0.1"], **more}


def test_the_command_really_starts_the_same_program_again(tmp_path):
    """What the client says of a process of each kind, put into a shell: the same arguments arrive in the same place."""
    package = tmp_path / "my work" / "trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    script = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd()]))\n"
    tell = "import json, sys; from ckptd_client.facts import quick_facts; print(json.dumps(quick_facts()))\n"
    (package / "__main__.py").write_text(f"import os\nif 'TELL' in os.environ:\n    {tell}else:\n    {script}")
    words = ["--name", "it's; a $(test)", "--empty", "", "--lr=0.1"]
    for how in (["-m", "trainer"], ["trainer/__main__.py"], ["-W", "ignore", "trainer/__main__.py"]):
        command = [sys.executable, *how, *words]
        told = subprocess.run(
            command, cwd=package.parent, env={"TELL": "1"}, capture_output=True, check=True, text=True
        ).stdout
        again = command_of(json.loads(told))
        assert again is not None
        said = subprocess.run(["sh", "-c", again], cwd="/", env={}, capture_output=True, check=True, text=True).stdout
        assert json.loads(said) == [words, str(package.parent)]


def test_settings_that_change_numbers_are_part_of_the_command():
    command = command_of(facts(env={"PYTHONHASHSEED": "0", "HOSTNAME": "n1", "CUDA_VISIBLE_DEVICES": "0,1"}))
    assert command == (
        f"cd /home/me && CUDA_VISIBLE_DEVICES=0,1 PYTHONHASHSEED=0 {shlex.quote(sys.executable)} train.py --lr 0.1"
    )


def test_a_secret_is_never_in_the_command_and_its_place_is_named(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--api-key", "hunter2", "--lr", "1"])
    monkeypatch.setattr(sys, "argv", ["train.py", "--api-key", "hunter2", "--lr", "1"])
    found = recipe(replace(ENDED, facts=quick_facts()), None)
    assert "hunter2" not in json.dumps(found)
    assert any("secret" in hint for hint in found["hints"])


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"argv": []},
        {"argv": "train.py"},
        {"argv": [1]},
        {"argv": ["a\0b"]},
        {"argv": ["x" * (COMMAND_BYTES_MAX + 1)]},
    ],
)
def test_a_process_that_did_not_say_how_it_was_started_has_no_command(said):
    found = recipe(replace(ENDED, facts=said), None)
    assert found["command"] is None
    assert any("did not say" in hint for hint in found["hints"])


def test_what_a_person_must_know_before_is_hinted():
    environment = {"RANK": "3", "WORLD_SIZE": "8", "SLURM_JOB_ID": "4711"}
    found = recipe(replace(ENDED, facts=facts(host="node7", env=environment, git_dirty=True)), None)
    assert found["hints"] == [
        "it has no verified checkpoint: it would begin anew",
        "it ran on node7",
        "it was rank 3 of 8: start all of them through their launcher",
        "it ran under Slurm job 4711",
        "its code had changes that are not in the commit",
    ]


async def test_the_last_good_checkpoint_is_the_newest_verified_one(catalog):
    run = await experiment(catalog, facts=facts())
    for step in (100, 200, 300):
        await saved(catalog, run, step=step)
    newest = await catalog.write(lambda tx: climb(tx, a_checkpoint(run, 400), Level.DURABLE))
    await catalog.write(lambda tx: experiments.saved_at(tx, run, 400))
    row = await catalog.read(lambda conn: experiments.get(conn, run))
    found = await catalog.read(lambda conn: recovery.of_experiment(conn, experiments.ended(row)))
    assert found["checkpoint"]["step"] == 300
    assert found["last_step"] == 400
    assert found["steps_again"] == 100
    assert newest.id != found["checkpoint"]["checkpoint"]


@pytest.mark.parametrize("status", [ExperimentStatus.FAILED, ExperimentStatus.LOST])
async def test_the_event_of_a_bad_end_says_how_to_go_on_and_the_hook_stores_it(catalog, told, status):
    run = await experiment(catalog, facts=facts())
    good = await saved(catalog, run, step=300)
    await catalog.write(lambda tx: experiments.set_status(tx, run, status))
    event = told.events[-1]
    assert event.name == f"experiment.{status}"
    assert event.data["recovery"]["checkpoint"]["checkpoint"] == good.id
    context = Context(event.name, "k", event.at, event.experiment, "", event.data)
    finding = Recovery().execute(context)
    assert finding.level is Finding.WARNING
    assert finding.text == (
        f"last good checkpoint: step 300, {good.path}; resume with: {event.data['recovery']['command']}"
    )
    assert finding.facts["facts"]["cwd"] == "/home/me"


async def test_a_good_end_says_nothing_of_recovery(catalog, told):
    run = await experiment(catalog, facts=facts())
    await catalog.write(lambda tx: experiments.set_status(tx, run, ExperimentStatus.COMPLETED))
    assert "recovery" not in told.events[-1].data
    assert Recovery().execute(Context("experiment.lost", "k", told.events[-1].at)) is None


async def test_a_command_that_names_an_old_checkpoint_is_pointed_to_the_last_good_one(catalog):
    run = await experiment(catalog, facts=facts(argv=["t.py", "--resume", "/data/runs/demo/run/step_0000000100"]))
    await saved(catalog, run, step=300)
    row = await catalog.read(lambda conn: experiments.get(conn, run))
    found = await catalog.read(lambda conn: recovery.of_experiment(conn, experiments.ended(row)))
    assert found["hints"] == [
        f"its command names /data/runs/demo/run/step_0000000100; the last good checkpoint is {found['checkpoint']['path']}"
    ]
