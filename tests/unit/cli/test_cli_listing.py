"""ls, experiments, show, path against a daemon; what they print for people and for programs. M155, M166"""

import copy
import json
import os
import pty
import subprocess
import sys

import pytest

from ckptd.errors import NotFound

ID = "6f1c0e3a9b7d4c52a1e8f00d5b6c7a89"
ENTRY = [sys.executable, "-c", "import sys; from ckptd.cli import main; sys.exit(main())"]


def _rows(daemon, count):
    row = daemon.replies["list"]["checkpoints"][0]
    return [{**copy.deepcopy(row), "checkpoint": f"{n:032x}", "step": n} for n in range(count)]


def test_ls_on_a_terminal_is_a_table_with_short_ids(run, daemon, on_terminal):
    ran = run("ls")
    header, line = ran.out.splitlines()
    assert header.split("  ")[0] == "ID"
    assert line.startswith(ID[:12] + "  imagenet/resnet50")
    assert ID not in ran.out
    assert "97.7 MiB" in line
    assert "latest best:val_loss pin" in line
    assert "val_loss=0.31" in line


def test_ls_in_a_pipe_is_tab_separated_with_whole_ids(run, daemon):
    fields = run("ls").out.rstrip("\n").split("\t")
    assert fields[:6] == [ID, "imagenet/resnet50", "1000", "live", "verified", "102400000"]
    assert fields[6].startswith("2026-11-20T12:00:00")
    assert fields[8] == "/data/runs/imagenet/resnet50/step_0000001000"


def test_ls_json_is_one_versioned_object(run, daemon):
    body = run("ls", "--json").json
    assert body["v"] == 1
    assert body["source"] == "daemon"
    assert body["next"] is None
    assert [row["checkpoint"] for row in body["checkpoints"]] == [ID]


def test_ls_jsonl_is_one_object_per_line(run, daemon):
    daemon.replies["list"] = {"checkpoints": _rows(daemon, 3), "next": None}
    lines = [json.loads(line) for line in run("ls", "--jsonl").out.splitlines()]
    assert [(line["v"], line["step"]) for line in lines] == [(1, 0), (1, 1), (1, 2)]


def test_ls_quiet_prints_ids_only(run, daemon):
    assert run("ls", "-q").out == f"{ID}\n"


def test_ls_sends_what_narrows_it(run, daemon):
    run("ls", "imagenet/resnet50", "--state", "live", "--level", "durable", "--tag", "t", "--sort", "step", "-n", "7")
    (asked,) = daemon.asked("list")
    assert asked == {
        "project": "imagenet",
        "name": "resnet50",
        "state": "live",
        "level": "durable",
        "tag": "t",
        "sort": "step",
        "limit": 7,
    }


def test_ls_all_follows_the_cursor_to_its_end(run, daemon):
    rows = _rows(daemon, 5)
    pages = [
        {"checkpoints": rows[:2], "next": "a"},
        {"checkpoints": [], "next": "b"},
        {"checkpoints": rows[2:], "next": None},
    ]
    daemon.replies["list"] = pages
    assert len(run("ls", "--all", "-q").out.splitlines()) == 5
    assert [asked.get("after") for asked in daemon.asked("list")] == [None, "a", "b"]


def test_ls_says_that_there_is_more_and_never_more_than_asked(run, daemon):
    """A page may come short of its limit; the limit still holds over pages."""
    rows = _rows(daemon, 4)
    daemon.replies["list"] = [{"checkpoints": rows[:2], "next": "a"}, {"checkpoints": rows[2:3], "next": "b"}]
    ran = run("ls", "-n", "3", "-q")
    assert len(ran.out.splitlines()) == 3
    assert [asked["limit"] for asked in daemon.asked("list")] == [3, 1]
    daemon.replies["list"] = {"checkpoints": rows[:3], "next": "b"}
    assert "--all" in run("ls", "-n", "3").err


@pytest.mark.parametrize("scope", ["a/b/c", "/a", "a/", ""])
def test_ls_refuses_a_scope_that_is_none(run, daemon, scope):
    assert run("ls", scope).code == 2


def test_ls_of_nothing_is_no_error_and_prints_nothing(run, daemon):
    daemon.replies["list"] = {"checkpoints": [], "next": None}
    assert run("ls") == run("ls").__class__(0, "", "")
    assert run("ls", "--json").json["checkpoints"] == []


def test_a_hostile_name_is_escaped_in_every_form(run, daemon, on_terminal):
    row = daemon.replies["list"]["checkpoints"][0]
    row.update(name="x\x1b[2Jy\n\u202ez", metrics={"a\x1b": 1.0}, path="/p\x07")
    for words in (["ls"], ["ls", "--json"], ["ls", "--jsonl"], ["show", ID]):
        out = run(*words).out
        assert not set(out) & set("\x1b\x07\u202e"), words


def test_ls_summary_counts_and_names_the_best(run, daemon):
    """M155: counts, size, best, newest, oldest."""
    ran = run("ls", "imagenet", "--summary")
    assert "14 checkpoints, 1.3 GiB" in ran.out
    assert "12 valid" in ran.out
    assert f"best val_loss: imagenet/resnet50 step 1000 {ID}" in ran.out
    assert daemon.asked("summary") == [{"project": "imagenet"}]
    assert run("ls", "--summary", "--json").json["invalid"] == 1


def test_ls_summary_with_a_filter_it_would_ignore_is_refused(run, daemon):
    assert run("ls", "--summary", "--state", "live").code == 2


def test_experiments_for_people_programs_and_pipes(run, daemon, on_terminal, monkeypatch):
    table = run("experiments").out
    assert "imagenet/resnet50  running  1200     12" in table
    assert "val_loss=0.31@1000" in table
    body = run("experiments", "imagenet", "--json").json
    assert body["experiments"][0]["last_step"] == 1200
    assert daemon.asked("experiments")[-1]["project"] == "imagenet"
    assert run("experiments", "-q").out == "0a1b2c3d4e5f60718293a4b5c6d7e8f9\n"


def test_show_tells_everything_there_is(run, daemon):
    ran = run("show", "latest", "-p", "imagenet")
    for said in (
        ID,
        "safetensors",
        "val_loss=0.31",
        "model.safetensors",
        "for the paper",
        "durable",
        "a copy is still in memory",
    ):
        assert said in ran.out
    assert daemon.asked("show") == [{"selector": "latest", "project": "imagenet"}]


def test_show_json_has_files_holds_copies_and_history(run, daemon):
    body = run("show", "latest", "--json").json
    assert {"v", "source", "checkpoint", "experiment", "files", "files_total", "holds", "copies", "history"} <= set(
        body
    )


def test_show_of_a_failed_checkpoint_says_why(run, daemon):
    row = daemon.replies["show"]["checkpoint"]
    row.update(state="failed", error={"code": "no_space", "message": "disk full", "hint": ""})
    assert "disk full [no_space]" in run("show", ID).out


def test_show_lists_some_of_very_many_files_and_says_how_many_more(run, daemon):
    daemon.replies["show"]["files"] = [{"path": f"f{n}", "size_bytes": 1, "sha256": "0" * 64} for n in range(100)]
    daemon.replies["show"]["files_total"] = 5000
    ran = run("show", ID)
    assert "f39" in ran.out
    assert "f40" not in ran.out
    assert "and 4960 more files" in ran.out


def test_path_prints_the_path_and_nothing_else(run, daemon):
    ran = run("path", "imagenet/resnet50@best:val_loss")
    assert (ran.code, ran.out, ran.err) == (0, "/data/runs/imagenet/resnet50/step_0000001000\n", "")
    assert daemon.asked("resolve") == [{"selector": "imagenet/resnet50@best:val_loss", "level": "verified"}]


def test_path_gives_a_program_the_very_bytes_of_a_name(daemon):
    """A name that is not UTF-8, or holds an escape sequence, must still be opened by a script."""
    daemon.replies["resolve"]["path"] = os.fsdecode(b"/data/\xff\x1b[31m")
    ran = subprocess.run([*ENTRY, "path", "latest"], capture_output=True, timeout=60, check=False)
    assert ran.stdout == b"/data/\xff\x1b[31m\n"


def test_path_on_a_terminal_is_escaped(daemon):
    daemon.replies["resolve"]["path"] = "/data/\x1b[31m"
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm"}
    subprocess.run([*ENTRY, "path", "latest"], stdout=theirs, env=env, check=True, timeout=60)
    os.close(theirs)
    assert os.read(ours, 4096).strip() == rb"/data/\x1b[31m"
    os.close(ours)


def test_path_without_a_checkpoint_is_exit_code_3(run, daemon):
    daemon.replies["resolve"] = NotFound("no verified checkpoint")
    ran = run("path", "latest")
    assert (ran.code, ran.out) == (3, "")


def test_path_of_what_is_still_in_memory_is_exit_code_3(run, daemon):
    daemon.replies["resolve"]["path"] = ""
    ran = run("path", ID)
    assert (ran.code, ran.out) == (3, "")
    assert "ckpt wait" in ran.err


def test_a_relative_path_as_selector_is_made_absolute(run, daemon, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("show", "./x")
    assert daemon.asked("show")[0]["selector"] == str(tmp_path / "x")
