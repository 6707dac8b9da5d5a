"""hooks list, show, stats, test, enable, disable, log."""

import json

import pytest


def test_hooks_are_listed_with_what_they_run_at(run, daemon, on_terminal):
    header, line = run("hooks", "list").out.splitlines()
    assert header.split() == ["HOOK", "IS", "KIND", "PRIORITY", "RUNS", "AT"]
    assert line.split() == ["gate", "on", "exec", "NORMAL", "checkpoint.before_save"]
    assert run("hooks").out.splitlines() == [header, line], "the group alone lists them"


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"problem": "its module does not import"}, "broken"),
        ({"enabled": False}, "disabled"),
        ({"circuit": "open"}, "resting"),
    ],
)
def test_a_hook_that_does_not_run_says_so(run, daemon, facts, state):
    daemon.replies["hooks"]["hooks"][0] |= facts
    assert run("hooks", "list").out.split("\t")[1] == state


def test_stats_are_for_programs_as_well(run, daemon):
    line = run("hooks", "stats").out.rstrip("\n").split("\t")
    assert line[:4] == ["gate", "on", "812", "810"]
    assert run("hooks", "stats", "--json").json["hooks"][0]["p95_ms"] == 9.4


def test_a_switch_that_is_off_for_all_of_them_is_told(run, daemon):
    daemon.replies["hooks"]["enabled"] = False
    assert "none of them runs" in run("hooks", "list").err


def test_one_hook_is_shown_whole_and_an_unknown_one_is_exit_code_3(run, daemon):
    assert "target:         /usr/local/bin/gate" in run("hooks", "show", "gate").out
    assert run("hooks", "show", "nobody").code == 3


def test_a_trial_says_how_it_ended(run, daemon):
    ran = run("hooks", "test", "gate", "--event", "checkpoint.before_save", "--data", '{"val_loss": 0.1}')
    assert (ran.code, "gate at checkpoint.before_save: ok" in ran.err) == (0, True)
    assert daemon.asked("hooks.test") == [
        {"hook": "gate", "event": "checkpoint.before_save", "data": {"val_loss": 0.1}}
    ]


@pytest.mark.parametrize(("outcome", "code"), [("failed", 1), ("timeout", 1), ("vetoed", 0), ("skipped", 0)])
def test_a_trial_that_fails_is_exit_code_1_and_a_veto_is_none(run, daemon, outcome, code):
    daemon.replies["hooks.test"]["run"] |= {"outcome": outcome, "error": "no", "output": "it printed\n"}
    ran = run("hooks", "test", "gate")
    assert (ran.code, ran.out) == (code, "it printed\n")


@pytest.mark.parametrize("data", ["[1]", "{", "7"])
def test_what_is_no_object_is_refused_before_the_daemon_is_asked(run, daemon, data):
    assert run("hooks", "test", "gate", "--data", data).code == 2
    assert daemon.asked("hooks.test") == []


@pytest.mark.parametrize(("verb", "enabled"), [("enable", True), ("disable", False)])
def test_hooks_are_switched(run, daemon, verb, enabled):
    assert f"gate is {verb}d" in run("hooks", verb, "gate").err
    daemon.replies["hooks.switch"]["changed"] = False
    assert "already" in run("hooks", verb, "gate").err
    assert daemon.asked("hooks.switch") == [{"hook": "gate", "enabled": enabled}] * 2


def test_recent_runs_are_for_people_and_programs(run, daemon):
    assert run("hooks", "log", "gate", "--outcome", "failed").out.split("\t")[1:4] == [
        "gate", "checkpoint.before_save", "failed",
    ]  # fmt: skip
    assert json.loads(run("hooks", "log", "--jsonl").out)["detail"] == "exit status 1"
    assert run("hooks", "log", "--json").json["runs"][0]["ms"] == 3.1
    assert run("hooks", "log", "--outcome", "perhaps").code == 2
