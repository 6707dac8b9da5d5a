"""What a shell is offered, and that it never waits for it."""

import os
import subprocess
import sys
import time

import pytest

from tests.support.canned_daemon import SILENCE

ENTRY = [sys.executable, "-c", "import sys; from ckptd.cli import main; sys.exit(main())"]
# A busy machine takes more than the moment that a person is made to wait.
PATIENT = [
    sys.executable,
    "-c",
    "import sys; from ckptd.cli import completion, main; completion.COMPLETE_S = 60.0; sys.exit(main())",
]
ID = "6f1c0e3a9b7d4c52a1e8f00d5b6c7a89"


def _offers(line, entry=PATIENT):
    """Ask as fish does, whose protocol is the plainest: the words before the cursor, and the one under it."""
    *words, last = line.split(" ")
    env = {**os.environ, "_CKPT_COMPLETE": "fish_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": last}
    ran = subprocess.run(entry, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ran.stderr == ""
    return [offer.split(",", 1)[1].split("\t")[0] for offer in ran.stdout.splitlines() if offer]


def test_verbs_are_offered_without_a_daemon():
    assert _offers("ckpt sta") == ["status", "stats"]
    assert _offers("ckpt retention ") == ["apply", "explain", "plan"]


def test_projects_and_experiments_are_offered(daemon):
    assert _offers("ckpt ls ima") == ["imagenet", "imagenet/resnet50"]
    assert _offers("ckpt ls imagenet/") == ["imagenet/resnet50"]
    assert daemon.asked("experiments")[-1]["project"] == "imagenet"


def test_ids_are_offered_for_what_looks_like_one(daemon):
    assert _offers("ckpt show 6f1c") == [ID]
    assert _offers("ckpt rm aa") == []


def test_words_and_metrics_are_offered_behind_the_at(daemon):
    offered = _offers("ckpt path imagenet/resnet50@")
    assert {"imagenet/resnet50@latest", "imagenet/resnet50@best:val_loss", "imagenet/resnet50@step:1000"} <= set(
        offered
    )


def test_a_name_that_could_steer_the_shell_is_not_offered(daemon):
    row = daemon.replies["experiments"]["experiments"][0]
    daemon.replies["experiments"]["experiments"] = [{**row, "name": "a\nplain,evil"}, {**row, "name": "good"}]
    assert _offers("ckpt ls imagenet/") == ["imagenet/good"]


def test_a_daemon_that_does_not_answer_costs_no_more_than_its_moment(daemon):
    """200 ms, and what Python takes to start."""
    daemon.replies["experiments"] = SILENCE
    started_s = time.monotonic()
    assert _offers("ckpt ls ima", ENTRY) == []
    assert time.monotonic() - started_s < 30  # the daemon would say nothing for ever


def test_without_a_daemon_there_is_no_offer_and_no_error():
    assert _offers("ckpt ls ima") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_calls_ckpt_back(run, shell):
    ran = run("completion", shell)
    assert ran.code == 0
    assert f"_CKPT_COMPLETE={shell}_complete" in ran.out


def test_the_bash_script_is_accepted_by_bash(run):
    script = run("completion", "bash").out
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=20, check=False).returncode == 0
