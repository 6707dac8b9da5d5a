"""status, wait, log: what looks on, also while a daemon restarts."""

import json

import pytest

from ckptd.cli import daemon_socket, watching
from ckptd.cli.options import Globals
from ckptd.clock import SystemClock
from ckptd.errors import TimedOut, Unreachable
from tests.support.canned_daemon import HANG_UP, SILENCE

ID = "6f1c0e3a9b7d4c52a1e8f00d5b6c7a89"


def _event(seq, at="2026-11-20T12:00:01+00:00"):
    subject = {"project": "imagenet", "name": "resnet50", "experiment": "e", "checkpoint": ID, "step": seq}
    return {"seq": seq, "at": at, "event": "checkpoint.verified", **subject, "data": {"ms": 0.5}}


def test_status_names_everything_that_is_degraded(run, daemon):
    ran = run("status")
    assert "ckptd 0.1.0, pid 812, up 1h" in ran.out
    assert "degraded: root /mnt/slow: no answer for 120 s" in ran.out
    assert "1 queued, 2 running, 0 parked" in ran.out
    assert "3.8 GiB of 14.9 GiB in 4: 1 leased, 1 committed, 2 hot" in ran.out
    assert "1 staged 1 durable 10 verified" in ran.out
    assert "372.5 GiB" in ran.out


def test_a_probe_is_one_line_and_an_exit_code(run, daemon):
    """M162. For systemd, Kubernetes and cron: 0 or 1, whatever it was that failed."""
    line = daemon.replies["health"]["line"]
    ran = run("status", "--probe")
    assert (ran.code, ran.out) == (1, line + "\n")
    assert [request["op"] for request in daemon.requests] == ["health"]
    daemon.replies["health"] = {"well": True, "line": "serving; 0 jobs queued, 0 running", "degraded": []}
    ran = run("status", "--probe")
    assert (ran.code, ran.out, ran.err) == (0, "serving; 0 jobs queued, 0 running\n", "")
    assert run("status", "--probe", "--json").json["well"] is True


@pytest.mark.parametrize("answer", [SILENCE, HANG_UP, TimedOut("busy")], ids=["hangs", "hangs up", "refuses"])
def test_a_probe_of_a_daemon_that_does_not_answer_fails_with_one_line(run, daemon, answer):
    daemon.replies["health"] = answer
    ran = run("status", "--probe", "--timeout", "200ms")
    assert (ran.code, ran.out.count("\n"), ran.err) == (1, 1, "")


def test_a_probe_without_a_daemon_fails_with_one_line(run):
    ran = run("status", "--probe")
    assert (ran.code, ran.out.count("\n"), ran.err) == (1, 1, "")
    assert ran.out.startswith("no daemon answers")


def test_status_json_is_the_daemons_answer_with_a_version(run, daemon):
    assert run("status", "--json").json == {"v": 1, **daemon.replies["status"]}


def test_wait_prints_what_was_reached(run, daemon):
    ran = run("wait", ID)
    assert (ran.code, ran.out) == (0, f"{ID}\tdurable\tlive\t/data/runs/imagenet/resnet50/step_0000001000\n")


def test_wait_asks_again_until_its_own_timeout(run, daemon, monkeypatch):
    """One request is bounded on the daemon's side; the person's bound may be longer."""
    monkeypatch.setattr(watching, "WAIT_ASK_S", 0.0)
    monkeypatch.setattr(watching, "GRACE_S", 60.0)
    daemon.replies["wait"] = [TimedOut("not yet"), TimedOut("not yet"), daemon.replies["wait"]]
    assert run("wait", ID, "--timeout", "1h").code == 0
    assert len(daemon.asked("wait")) == 3


def test_wait_ends_with_exit_code_6(run, daemon, monkeypatch):
    monkeypatch.setattr(watching, "GRACE_S", 60.0)
    daemon.replies["wait"] = TimedOut("not yet")
    assert run("wait", ID, "--timeout", "0").code == 6
    assert daemon.asked("wait")[0]["timeout_s"] == 0


@pytest.mark.parametrize(("state", "code"), [("failed", 1), ("replaced", 1), ("corrupt", 4), ("missing", 4)])
def test_wait_for_what_can_never_be_says_why(run, daemon, state, code):
    error = {"code": "no_space", "message": "the disk is full", "hint": ""}
    daemon.replies["wait"].update(state=state, error=error)
    ran = run("wait", ID)
    assert ran.code == code
    assert f"is {state}: the disk is full" in ran.err


def test_wait_goes_on_over_a_restart_of_the_daemon(run, daemon, monkeypatch):
    monkeypatch.setattr(watching, "AWAY_PAUSE_S", 0.0)
    daemon.replies["wait"] = [HANG_UP, HANG_UP, daemon.replies["wait"]]
    assert run("wait", ID).code == 0


def test_wait_without_a_daemon_to_begin_with_does_not_wait_for_one(run):
    assert run("wait", ID).code == 5


def test_a_daemon_that_stays_away_ends_the_wait(daemon, monkeypatch):
    monkeypatch.setattr(watching, "AWAY_S", 0.0)
    monkeypatch.setattr(watching, "AWAY_PAUSE_S", 0.0)
    monkeypatch.setattr(daemon_socket, "asked", lambda: Globals(socket=daemon.path))
    sessions = watching.sessions(SystemClock())
    next(sessions)
    daemon.close()
    with pytest.raises(Unreachable):
        next(sessions)


def test_log_prints_the_newest_events_oldest_first(run, daemon, on_terminal):
    daemon.replies["events"] = {"events": [_event(1), _event(2)], "next": None}
    lines = run("log", "-n", "2").out.splitlines()
    assert ["step 1" in lines[0], "step 2" in lines[1]] == [True, True]
    assert "checkpoint.verified" in lines[0]
    assert daemon.asked("events") == [{"limit": 2, "follow": False}]


def test_log_in_a_pipe_has_number_time_event_subject_and_data(run, daemon):
    daemon.replies["events"] = {"events": [_event(7)], "next": None}
    seq, _, name, checkpoint, subject, step, data = run("log").out.rstrip("\n").split("\t")
    assert (seq, name, checkpoint, subject, step) == ("7", "checkpoint.verified", ID, "imagenet/resnet50", "7")
    assert json.loads(data) == {"ms": 0.5}


def test_log_since_a_number_asks_for_what_follows_it(run, daemon):
    run("log", "--since", "811", "--json")
    assert daemon.asked("events") == [{"limit": 100, "follow": False, "since_seq": 811}]


@pytest.mark.parametrize("since", ["1h", "2026-11-20T12:00:00Z", "2026-11-20T12:00:00.000+00:00"])
def test_log_since_a_time_leaves_out_what_was_before(run, daemon, since):
    old, new = _event(1, "2020-01-01T00:00:00+00:00"), _event(2, "2999-01-01T00:00:00+00:00")
    daemon.replies["events"] = {"events": [old, new], "next": None}
    assert [event["seq"] for event in run("log", "--since", since, "--json").json["events"]] == [2]


def test_log_since_a_time_asks_the_daemon_for_that_time_and_says_when_there_is_more(run, daemon, on_terminal):
    """The newest hundred, less what is older, would leave most of a busy hour out."""
    daemon.replies["events"] = {"events": [_event(2, "2999-01-01T00:00:00+00:00")], "next": 2}
    ran = run("log", "--since", "2026-11-20T12:00:00+01:00")
    assert daemon.asked("events") == [{"limit": 100, "follow": False, "since": "2026-11-20T11:00:00+00:00"}]
    assert "--since 2" in ran.err


def test_log_follow_since_a_time_pages_through_all_of_it_first(run, daemon, monkeypatch):
    daemon.replies["events"] = [
        {"events": [_event(1)], "next": 1},
        {"events": [_event(2)], "next": None},
        {"events": [_event(3)], "next": None},
    ]

    def taking(event, out):
        if event["seq"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching, "_print_event", taking)
    assert run("log", "-f", "--since", "2000-01-01T00:00:00Z").code == 130
    asked = [(one.get("since", ""), one.get("since_seq")) for one in daemon.asked("events")]
    assert [after for _, after in asked] == [None, 1, 2]
    assert asked[0][0] == "2000-01-01T00:00:00+00:00"


def test_log_since_nonsense_is_a_usage_error(run, daemon):
    assert run("log", "--since", "yesterday").code == 2


def test_log_follow_goes_on_over_a_restart_and_tells_nothing_twice(run, daemon, monkeypatch):
    monkeypatch.setattr(watching, "AWAY_PAUSE_S", 0.0)
    daemon.pushes["events"] = [{"push": "level", "state": "live"}, {"push": "event", "event": _event(3)}]
    daemon.replies["events"] = [
        {"events": [_event(1), _event(2)], "next": None},
        {"events": [_event(4)], "next": None},
    ]
    got = []

    def taking(event, out):
        got.append(event["seq"])
        if event["seq"] == 3:
            daemon.hang_up()
        if event["seq"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching, "_print_event", taking)
    assert run("log", "-f").code == 130
    assert got == [1, 2, 3, 4]
    assert [asked.get("since_seq") for asked in daemon.asked("events")] == [None, 3]


def test_log_follow_with_json_is_refused(run, daemon):
    assert run("log", "-f", "--json").code == 2


def test_log_audit_is_oldest_first(run, daemon, on_terminal):
    entry = daemon.replies["audit"]["entries"][0]
    daemon.replies["audit"]["entries"] = [{**entry, "entry": 2, "action": "unpin"}, {**entry, "entry": 1}]
    lines = run("log", "--audit").out.splitlines()
    assert "pin" in lines[1]
    assert "unpin" in lines[2]
    assert "uid 1000 pid 4711" in lines[1]
    assert [row["entry"] for row in run("log", "--audit", "--json").json["entries"]] == [1, 2]
