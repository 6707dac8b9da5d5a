"""stats, top and cache as people and programs see them, said by a daemon that says what the reference shows."""

import pytest

from ckptd.cli import measuring
from ckptd.cli.measuring import stats_lines, top_lines
from tests.unit.cli.conftest import TERMINAL

SECRET = "sixteen characters and more"


def test_stats_of_one_experiment_are_a_page_with_its_times_and_its_cost(daemon, run, replies):
    lines = "\n".join(stats_lines(replies["stats"], TERMINAL))
    for said in (
        "the last 1h",
        "1.1 GiB",
        "80 ms",
        "P99",
        "saving costs 0.20% of training's time",
        "imagenet/resnet50",
    ):
        assert said in lines, lines
    ran = run("stats", "imagenet/resnet50", "--since", "1h")
    assert ran.code == 0
    asked = [request for request in daemon.requests if request["op"] == "stats"]
    assert [(one["name"], one["since_s"]) for one in asked] == [("resnet50", 3600.0)]
    assert run("stats", "--json").json["jobs"]["running"] == 1


def test_stats_of_a_daemon_that_has_seen_nothing_say_so(replies):
    body = {**replies["stats"], "since_s": None, "experiment": None, "experiments": []}
    body["period"] = {"counts": {}, "written_bytes": 0, "took": {}}
    body["hot"] = {**body["hot"], "hits": 0, "misses": 0}
    lines = "\n".join(stats_lines(body, TERMINAL))
    assert "no save was measured yet" in lines
    assert "none yet of loads" in lines


def test_rates_are_those_since_the_page_before_and_none_after_a_restart(replies):
    first = {"stats": replies["stats"], "status": replies["status"], "at_s": 10.0}
    total = {"counts": {"checkpoint.published": 8}, "written_bytes": 4 << 30}
    before = {
        **first,
        "stats": {**first["stats"], "total": {"counts": {"checkpoint.published": 4}, "written_bytes": 0}},
    }
    now = {**first, "stats": {**first["stats"], "total": total}, "at_s": 12.0}
    assert "2.0 saves/s, 2.0 GiB/s" in top_lines(now, before, TERMINAL)[0]
    assert "saves/s" not in top_lines(before, now, TERMINAL)[0]
    assert "saves/s" not in top_lines(now, None, TERMINAL)[0]


def test_what_other_people_named_can_not_move_the_cursor(replies):
    status = {**replies["status"]}
    status["experiments"] = [{**status["experiments"][0], "status": "running", "name": "x\x1b[2J"}]
    page = {"stats": replies["stats"], "status": status, "at_s": 1.0}
    assert "\x1b" not in "\n".join(top_lines(page, None, TERMINAL))


def test_a_size_on_the_command_line_is_a_size_and_anything_else_is_a_clear_error(daemon, run):
    assert run("cache", "trim", "--to", "20G").code == 0
    wrong = run("cache", "trim", "--to", "much")
    assert wrong.code == 2
    assert "is no size" in wrong.err
    assert run("cache", "trim").code == 2
    listed = run("cache", "ls").out.split("\t")
    assert listed[0] == "6f1c0e3a9b7d4c52a1e8f00d5b6c7a89"


@pytest.mark.parametrize("form", [(), ("--json",), ("--origin",)])
def test_the_token_of_the_web_is_shown_to_nobody(run, short_dir, form):
    file = short_dir / "c.toml"
    file.write_text(f'[web]\nport = 9470\ntoken = "{SECRET}"\n')
    ran = run("config", "show", "--config", str(file), *form)
    assert ran.code == 0
    assert SECRET not in ran.out
    assert "***" in ran.out


def test_durations_are_written_with_three_digits():
    said = [measuring._ms({"x": value}, "x") for value in (None, 0.0000801, 0.0801, 8.0123, 4000.0)]
    assert said[:4] == ["", "0.0801 ms", "80.1 ms", "8.01 s"]
    assert "h" in said[4] or "m" in said[4]
