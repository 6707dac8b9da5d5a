"""roots, watch-root, rebuild, reload, stop."""

import pytest

from tests.support.canned_daemon import SILENCE


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_roots_lists_them(run, daemon, on_terminal):
    header, line = run("roots").out.splitlines()
    assert header.startswith("ROOT")
    assert line.startswith("/data/runs  watched  imagenet  ok")
    assert run("roots", "--json").json["roots"][0]["allow_delete"] is False


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["roots", "add", "x"], "managed"),
        (["roots", "add", "x", "--watch"], "watched"),
        (["watch-root", "x"], "watched"),
    ],
)
def test_a_root_is_added_by_its_absolute_path(run, daemon, here, words, kind):
    ran = run(*words, "-p", "imagenet")
    assert (ran.code, ran.out) == (0, "")
    assert daemon.asked("root.add") == [{"path": str(here / "x"), "kind": kind, "project": "imagenet"}]


def test_rebuild_counts_what_it_found(run, daemon, on_terminal):
    ran = run("rebuild")
    assert ran.code == 0
    assert ran.out.splitlines()[1].split() == ["/data/runs", "12", "10", "2", "0"]


def test_rebuild_of_a_root_that_could_not_be_read_is_exit_code_1(run, daemon):
    daemon.replies["rebuild"]["roots"][0]["problem"] = "no answer for 120 s"
    ran = run("rebuild", "/data/runs")
    assert ran.code == 1
    assert "no answer for 120 s" in ran.out
    assert daemon.asked("rebuild") == [{"root": "/data/runs"}]


def test_reload_says_what_changed_and_what_needs_a_restart(run, daemon):
    ran = run("reload")
    assert "changed: log.level" in ran.err
    assert "after a restart: socket" in ran.err


def test_stop_comes_back_when_the_daemon_has_ended(run, daemon):
    ran = run("stop")
    assert ran.code == 0
    assert "has stopped" in ran.err


def test_stop_of_a_daemon_that_does_not_end_is_exit_code_6(run, daemon):
    daemon.closes_after_stop = False
    assert run("stop", "--timeout", "200ms").code == 6


def test_stop_without_waiting_comes_back_at_once(run, daemon):
    daemon.closes_after_stop = False
    ran = run("stop", "--no-wait", "--json")
    assert (ran.code, ran.json["ended"]) == (0, False)


def test_stop_of_a_daemon_that_does_not_answer_is_exit_code_6(run, daemon):
    daemon.replies["stop"] = SILENCE
    assert run("stop", "--timeout", "100ms").code == 6
