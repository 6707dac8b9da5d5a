"""pin, unpin, rm, retention, submit: what changes something, and what keeps it from doing so by mistake."""

import io
import os
import socket
from pathlib import Path

import pytest

from ckptd.cli import retaining
from ckptd.errors import Busy, Held, NotFound
from ckptd_client import spool

ID = "6f1c0e3a9b7d4c52a1e8f00d5b6c7a89"
OTHER = "77777777777777777777777777777777"


class Terminal(io.StringIO):
    """Standard input of a person who has typed an answer."""

    def isatty(self):
        return True


@pytest.fixture
def answering(monkeypatch):
    def answer(text):
        monkeypatch.setattr("sys.stdin", Terminal(text))

    return answer


def test_pin_says_what_it_pinned_and_sends_the_note(run, daemon):
    ran = run("pin", "imagenet/resnet50", "--note", "table 3")
    assert (ran.code, ran.out) == (0, "")
    assert "pinned imagenet/resnet50 step 1000 (6f1c0e3a9b7d)" in ran.err
    assert daemon.asked("pin") == [{"selector": "imagenet/resnet50", "note": "table 3"}]


def test_unpin_of_what_was_not_pinned_says_so(run, daemon):
    daemon.replies["unpin"] = {**daemon.replies["pin"], "changed": False}
    ran = run("unpin", ID)
    assert (ran.code, ran.out) == (0, "")
    assert "nothing to unpin" in ran.err
    assert run("unpin", ID, "--json").json["changed"] is False


def test_unveto_lets_a_checkpoint_count_and_says_when_nothing_was_vetoed(run, daemon):
    ran = run("unveto", "imagenet/resnet50@step:1000", "--note", "looked at it")
    assert (ran.code, ran.out) == (0, "")
    assert "imagenet/resnet50 step 1000 (6f1c0e3a9b7d) counts now" in ran.err
    assert daemon.asked("unveto") == [{"selector": "imagenet/resnet50@step:1000", "note": "looked at it"}]
    daemon.replies["unveto"] = {**daemon.replies["pin"], "changed": False}
    assert "was not vetoed" in run("unveto", ID).err
    assert run("unveto", ID, "-q").out == f"{ID}\n"


def test_rm_dry_run_removes_nothing(run, daemon):
    ran = run("rm", ID, "--dry-run")
    assert ran.code == 0
    assert "would trash imagenet/resnet50 step 900" in ran.err
    assert [asked["dry_run"] for asked in daemon.asked("remove")] == [True]


def test_rm_asks_first_and_a_no_removes_nothing(run, daemon, answering):
    answering("n\n")
    ran = run("rm", ID)
    assert ran.code == 1
    assert "remove 1 checkpoint?" in ran.err
    assert [asked["dry_run"] for asked in daemon.asked("remove")] == [True]


def test_rm_after_a_yes_removes_the_id_that_was_shown(run, daemon, answering):
    """ "latest" may mean another one by the time the person has answered."""
    answering("y\n")
    ran = run("rm", "imagenet/resnet50@latest")
    assert ran.code == 0
    assert daemon.asked("remove") == [
        {"selector": "imagenet/resnet50@latest", "dry_run": True},
        {"selector": ID, "dry_run": False},
    ]


def test_rm_gives_up_what_is_on_its_way_only_when_that_is_said(run, daemon):
    ran = run("rm", "--give-up", "--yes", ID)
    assert ran.code == 0
    assert [asked["give_up"] for asked in daemon.asked("remove")] == [True, True]


def test_rm_refuses_when_nobody_can_be_asked(run, daemon, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    ran = run("rm", ID)
    assert ran.code == 2
    assert "--yes" in ran.err
    assert [asked["dry_run"] for asked in daemon.asked("remove")] == [True]


def test_rm_of_several_removes_none_when_one_is_held(run, daemon):
    daemon.replies["remove"] = [daemon.replies["remove"], Held("it is the best", holds=["best:val_loss"])]
    ran = run("rm", ID, OTHER, "--yes")
    assert ran.code == 7
    assert "it is the best [held]" in ran.err
    assert [asked["dry_run"] for asked in daemon.asked("remove")] == [True, True]


def test_rm_prints_ids_or_json_for_programs(run, daemon):
    assert run("rm", ID, "--yes", "-q").out == f"{ID}\n"
    body = run("rm", ID, "--yes", "--json").json
    assert (body["removed"][0]["action"], body["dry_run"]) == ("trash", False)


def test_retention_plan_shows_reasons_and_changes_nothing(run, daemon, on_terminal):
    ran = run("retention", "plan", "imagenet")
    assert "last 3, best 1 by val_loss (min)" in ran.out
    assert "no rule keeps it" in ran.out
    assert "keeps 1, drops 1" in ran.out
    assert daemon.asked("retention") == [{"apply": False, "project": "imagenet"}]


HELD = {"drops": 297, "strips": 0, "live": 300, "size_bytes": 1, "why": ["the rules keep last 3"], "limits": "too many",
        "words": "it would drop 297 of 300 live checkpoints at once, more than 20 and more than 20 % of them"}  # fmt: skip
SAYS = (
    "imagenet/resnet50: held: ckptd does nothing of this by itself: it would drop 297 of 300 live checkpoints at once, "
    "more than 20 and more than 20 % of them; `ckpt retention apply imagenet/resnet50` does it"
)


def test_a_plan_that_the_daemon_holds_says_so_and_why_and_who_can_carry_it_out(run, daemon, on_terminal, answering):
    """S15."""
    daemon.replies["retention"]["plans"][0]["held"] = HELD
    assert SAYS in run("retention", "plan").out.splitlines()
    answering("n")
    ran = run("retention", "apply")
    assert (ran.code, SAYS in ran.out.splitlines()) == (1, True)
    assert run("retention", "plan", "--json").json["plans"][0]["held"] == HELD


def test_in_a_pipe_what_is_held_is_said_beside_the_lines(run, daemon):
    daemon.replies["retention"]["plans"][0]["held"] = HELD
    ran = run("retention", "plan")
    assert ran.err.splitlines() == [SAYS]
    assert len(ran.out.splitlines()) == 2
    daemon.replies["retention"]["plans"][0]["held"] = None
    assert run("retention", "plan").err == ""


def test_retention_plan_in_a_pipe_is_one_line_per_checkpoint(run, daemon):
    lines = [line.split("\t") for line in run("retention", "plan").out.splitlines()]
    assert [line[:4] for line in lines] == [
        ["drop", OTHER, "imagenet/resnet50", "100"],
        ["keep", ID, "imagenet/resnet50", "1000"],
    ]


def test_retention_apply_drops_only_what_was_shown(run, daemon, answering):
    answering("y\n")
    ran = run("retention", "apply", "imagenet/resnet50")
    assert ran.code == 0
    assert "no rule keeps it" in ran.out
    assert daemon.asked("retention")[1] == {"apply": True, "only": [OTHER], "project": "imagenet", "name": "resnet50"}


def test_retention_apply_after_a_no_drops_nothing(run, daemon, answering):
    answering("n\n")
    assert run("retention", "apply").code == 1
    assert [asked["apply"] for asked in daemon.asked("retention")] == [False]


def test_retention_apply_without_a_terminal_needs_yes(run, daemon, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run("retention", "apply").code == 2
    assert [asked["apply"] for asked in daemon.asked("retention")] == [False]


def test_retention_apply_with_nothing_to_drop_asks_nothing(run, daemon, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    daemon.replies["retention"]["plans"][0]["drop"] = []
    ran = run("retention", "apply")
    assert ran.code == 0
    assert "would drop 0" in ran.err
    assert len(daemon.asked("retention")) == 1


def test_a_plan_of_very_many_drops_is_applied_in_frames_that_fit(run, daemon, monkeypatch):
    monkeypatch.setattr(retaining, "DROPS_PER_REQUEST_MAX", 2)
    drops = [{"checkpoint": f"{n:032x}", "step": n, "size_bytes": 1, "why": []} for n in range(5)]
    daemon.replies["retention"]["plans"][0]["drop"] = drops
    run("retention", "apply", "--yes")
    assert [len(asked.get("only", ())) for asked in daemon.asked("retention")] == [0, 2, 2, 1]


def test_without_rules_the_plan_says_that_nothing_goes(run, daemon, on_terminal):
    daemon.replies["retention"]["plans"] = []
    assert "no experiment has rules" in run("retention", "plan").out


def test_submit_sends_what_is_known_and_prints_the_id(run, daemon, tmp_path, monkeypatch):
    (tmp_path / "last.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    words = ["-p", "imagenet", "-e", "resnet50", "--step", "3", "--epoch", "0.5", "-m", "loss=0.5", "-m", "acc=nan"]
    ran = run("submit", "last.ckpt", *words, "--note", "n")
    assert (ran.code, ran.out) == (0, f"{ID}\n")
    (asked,) = daemon.asked("submit")
    assert len(asked.pop("checkpoint")) == 32
    assert asked == {
        "path": str(tmp_path / "last.ckpt"),
        "project": "imagenet",
        "experiment": "resnet50",
        "step": 3,
        "epoch": 0.5,
        "metrics": {"loss": 0.5, "acc": "NaN"},
        "note": "n",
    }


def test_submit_does_not_follow_a_link_that_the_person_named(run, daemon, tmp_path):
    """`last.ckpt` as a link is the name people know; where it leads is the daemon's to judge."""
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "gone")
    run("submit", str(tmp_path / "last.ckpt"))
    assert daemon.asked("submit")[0]["path"] == str(tmp_path / "last.ckpt")


@pytest.mark.parametrize("kind", ["device", "pipe", "socket"])
def test_submit_of_what_is_neither_file_nor_directory_is_refused_at_once(run, daemon, short_dir, kind):
    """The daemon would refuse it later, where nobody looks; it is not opened here either."""
    path = short_dir / kind
    if kind == "device":
        path = Path("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    ran = run("submit", str(path))
    assert ran.code == 2
    assert f"{path} is neither a file nor a directory [bad_path]" in ran.err
    assert daemon.asked("submit") == []


def test_submit_of_nothing_is_exit_code_3(run, daemon, tmp_path):
    assert run("submit", str(tmp_path / "nothing")).code == 3
    assert daemon.asked("submit") == []


@pytest.mark.parametrize("metric", ["loss", "loss=", "=1", "loss=high"])
def test_submit_with_a_metric_that_is_none_is_a_usage_error(run, daemon, tmp_path, metric):
    assert run("submit", str(tmp_path), "-m", metric).code == 2
    assert daemon.asked("submit") == []


def test_submit_and_wait_comes_back_when_it_is_durable(run, daemon, tmp_path):
    ran = run("submit", str(tmp_path), "--wait", "durable", "--json")
    assert (ran.code, ran.json["level"]) == (0, "durable")
    (asked,) = daemon.asked("wait")
    assert (asked["selector"], asked["level"]) == (ID, "durable")


def test_submit_without_a_daemon_is_exit_code_5_and_names_the_way_out(run, tmp_path):
    ran = run("submit", str(tmp_path))
    assert ran.code == 5
    assert "--spool" in ran.err


def test_submit_with_spool_leaves_an_offer_for_the_next_daemon(run, tmp_path, short_dir):
    ran = run("submit", str(tmp_path), "--step", "7", "--spool")
    assert ran.code == 0
    (left,) = spool.entries(str(short_dir / "state" / "spool"))
    assert left.checkpoint == ran.out.strip()
    assert spool.read_offer(left.path) == {
        "path": str(tmp_path),
        "step": 7,
        "metrics": {},
        "checkpoint": left.checkpoint,
    }


def test_submit_with_spool_still_asks_a_daemon_that_is_there(run, daemon, tmp_path, short_dir):
    assert run("submit", str(tmp_path), "--spool").code == 0
    assert len(daemon.asked("submit")) == 1
    assert list(spool.entries(str(short_dir / "state" / "spool"))) == []


def test_a_refusal_is_not_spooled(run, daemon, tmp_path, short_dir):
    """What the daemon refused would be refused again: only its absence leads to the spool."""
    daemon.replies["submit"] = NotFound("outside of every root")
    assert run("submit", str(tmp_path), "--spool").code == 3
    daemon.replies["submit"] = Busy("later")
    assert run("submit", str(tmp_path), "--spool").code == 1
    assert list(spool.entries(str(short_dir / "state" / "spool"))) == []
