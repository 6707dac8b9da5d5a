"""Looking, with every verb of `ckpt` that only looks: the real command, the real daemon, a small real history. M155"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ckptd.cli import render
from tests.support.history import LOSSES, History
from tests.support.node import eventually
from tests.support.onlooker import end, make

pytestmark = pytest.mark.xdist_group("cli_looking")


def test_ls_lists_what_there_is_for_people_pipes_and_programs(ckpt: Any, history: History) -> None:
    rows = ckpt("ls", "imagenet", "--json").json
    assert rows["v"] == 1
    assert rows["source"] == "daemon"
    assert [row["step"] for row in rows["checkpoints"]] == [300, 200, 100]
    newest = rows["checkpoints"][0]
    assert newest["checkpoint"] == history.ids[300]
    assert (newest["project"], newest["name"], newest["origin"]) == ("imagenet", "resnet50", "memory")
    assert (newest["state"], newest["level"], newest["path"]) == ("live", "verified", str(history.path(300)))
    assert newest["metrics"] == {"val_loss": 0.5}
    assert [row["holds"] for row in rows["checkpoints"]] == [["latest"], ["best:val_loss"], []]
    piped = [line.split("\t") for line in ckpt("ls", "imagenet/resnet50").out.splitlines()]
    assert [(f[0], f[1], f[2], f[3], f[4], f[8]) for f in piped] == [
        (history.ids[step], "imagenet/resnet50", str(step), "live", "verified", str(history.path(step)))
        for step in (300, 200, 100)
    ]
    assert ckpt("ls", "imagenet", "-q", "--sort", "step").out.split() == [history.ids[step] for step in (300, 200, 100)]
    lines = [json.loads(line) for line in ckpt("ls", "--jsonl", "--all").out.splitlines()]
    assert {line["project"] for line in lines} >= {"imagenet", "old"}
    assert ckpt("ls", "--tag", "baseline", "-q").out.count("\n") == len(LOSSES)
    assert ckpt("ls", "imagenet", "--state", "corrupt", "-q").out == ""
    assert ckpt("ls", "no-such-project", "--json").json["checkpoints"] == []
    summary = ckpt("ls", "imagenet", "--summary", "--json").json
    assert (summary["count"], summary["by_level"]["verified"], summary["newest"]["step"]) == (3, 3, 300)


def test_show_tells_everything_about_one(ckpt: Any, history: History) -> None:
    shown = ckpt("show", "imagenet/resnet50@best", "--json").json
    assert shown["checkpoint"]["checkpoint"] == history.ids[200]
    assert (shown["checkpoint"]["epoch"], shown["checkpoint"]["note"]) == (2.0, "n200")
    assert shown["experiment"]["config"]["lr"] == 0.1
    files = {file["path"]: file["sha256"] for file in shown["files"]}
    assert set(files) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    for name, digest in files.items():
        said = subprocess.run(["sha256sum", history.path(200) / name], capture_output=True, text=True, check=True)
        assert said.stdout.split()[0] == digest
    assert [e["what"] for e in shown["history"] if "." not in e["what"]][:3] == ["staged", "published", "verified"]
    assert "val_loss" in ckpt("show", render.short(history.ids[200])).out


@pytest.mark.parametrize(
    ("selector", "step"),
    [
        ("imagenet/resnet50", 300),
        ("imagenet/resnet50@latest", 300),
        ("imagenet/resnet50@best", 200),
        ("imagenet/resnet50@best:val_loss", 200),
        ("imagenet/resnet50@step:100", 100),
        ("imagenet/resnet50@100", 100),
    ],
)
def test_path_prints_a_path_and_nothing_else(ckpt: Any, history: History, selector: str, step: int) -> None:
    said = ckpt("path", selector)
    assert (said.code, said.out, said.err) == (0, f"{history.path(step)}\n", "")


def test_a_prefix_and_a_path_select_too(ckpt: Any, history: History) -> None:
    assert ckpt("path", history.ids[100][:10]).out == f"{history.path(100)}\n"
    assert ckpt("path", str(history.found)).out == f"{history.found}\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("path", "imagenet/resnet50@step:999"), 3),
        (("path", "imagenet/nobody"), 3),
        (("show", "0123456789abcdef"), 3),
        (("path", "imagenet/resnet50@best:accuracy"), 3),
        (("show", "what?"), 2),
        (("path", "latest"), 2),  # of which experiment?
        (("ls", "--limit", "0"), 2),
        (("no-such-verb",), 2),
        (("verify",), 2),
        (("rm", "0123456789abcdef", "--yes"), 3),
        (("submit", "/no/such/file"), 3),
    ],
)
def test_what_is_wrong_is_said_with_the_right_exit_code(ckpt: Any, words: tuple[str, ...], code: int) -> None:
    said = ckpt(*words)
    assert (said.code, said.out) == (code, "")
    assert said.err


def test_an_error_is_one_json_object_for_a_program(ckpt: Any) -> None:
    said = ckpt("path", "imagenet/nobody", "--json")
    assert (said.code, said.out) == (3, "")
    body = json.loads(said.err)
    assert body["error"]["code"] == "not_found"


def test_status_experiments_and_roots_describe_the_node(ckpt: Any, history: History) -> None:
    node = history.node
    status = ckpt("status", "--json").json
    assert status["daemon"]["pid"] == node.daemon_pid
    assert status["jobs"]["parked"] == 0
    assert {root["path"]: root["kind"] for root in status["roots"]}[str(node.runs)] == "managed"
    assert {worker["state"] for worker in status["workers"]} <= {"ok", "idle", "running"}
    assert str(node.runs) in ckpt("status").out
    (found,) = ckpt("experiments", "imagenet", "--json").json["experiments"]
    assert (found["name"], found["status"], found["checkpoints"]) == ("resnet50", "completed", 3)
    assert (found["latest"]["step"], found["best"][0]["step"], found["best"][0]["value"]) == (300, 200, 0.3)
    assert {line.split("\t")[0] for line in ckpt("roots").out.splitlines()} >= {
        str(node.runs),
        str(node.dir / "watched"),
    }
    added = ckpt("watch-root", str(node.dir / "more"), "-p", "more", "--json").json
    assert (added["added"], added["kind"]) == (True, "watched")
    assert ckpt("watch-root", str(node.dir / "more"), "--json").json["added"] is False
    assert ckpt("watch-root", str(node.runs)).code == 2


def test_doctor_finds_nothing_wrong_here_and_the_armed_fail_points_there(ckpt: Any, history: History) -> None:
    said = ckpt("doctor", "--json")
    assert [check for check in said.json["checks"] if check["status"] == "fail"] == []
    assert said.code == 0
    assert {"daemon", "catalog", "jobs", "fd store", "fail points"} <= {check["name"] for check in said.json["checks"]}
    armed = make().start()
    try:
        said = armed.run("doctor", "-q")
        assert said.code == 1
        assert "fail points" in said.out
    finally:
        end(armed)
    gone = armed.run("doctor", "--json")
    assert gone.code == 1
    assert [c["status"] for c in gone.json["checks"] if c["name"] == "daemon"] == ["fail"]


def test_config_show_and_check_read_what_the_daemon_reads(ckpt: Any, history: History) -> None:
    node = history.node
    shown = ckpt("config", "show", "--json").json
    assert shown["settings"]["watching"]["reconcile_s"] == node.reconcile_s
    assert shown["settings"]["retention"]["keep_last"] == 50
    assert str(node.dir / "toml") in shown["files"]
    assert f"{node.dir / 'toml'}" in ckpt("config", "show", "--origin").out
    assert ckpt("config", "check").code == 0
    wrong = node.dir / "wrong.toml"
    wrong.write_text('nonsense = 1\n[watching]\nquiet_s = "soon"\n')
    said = ckpt("config", "check", str(wrong), "--json")
    assert said.code == 78
    assert len(said.json["errors"]) == 2


def test_looking_works_without_a_daemon_and_acting_says_that_there_is_none(history: History) -> None:
    node = make().start()
    try:
        trainer = history.nursery.trainer(node.environ)
        trainer.open(name="run", project="alone", dir=str(node.runs))
        row = node.wait_level(trainer.save(seed=1, step=1)["id"])
        trainer.end()
        online = node.run("show", "alone/run", "--json").json
        stopped = node.run("stop")
        assert (stopped.code, stopped.out) == (0, "")
        assert node.ended() == 0
        offline = node.run("ls", "--json")
        assert offline.json["source"] == "catalog"
        assert [r["checkpoint"] for r in offline.json["checkpoints"]] == [row["checkpoint"]]
        assert "no daemon" in offline.err
        shown = node.run("show", "alone/run", "--json").json
        assert {**shown["checkpoint"], "hot": None} == {**online["checkpoint"], "hot": None}
        assert shown["files"] == online["files"]
        assert node.run("path", "alone/run").out == f"{row['path']}\n"
        for words in (("verify", "--all"), ("pin", "alone/run"), ("status",), ("stop",), ("log",), ("rebuild",)):
            assert node.run(*words).code == 5
        assert node.run("verify", row["path"]).code == 0  # needs none
        file = node.dir / "left_3.pt"
        file.write_bytes((Path(row["path"]) / "model.safetensors").read_bytes())
        offered = node.run("submit", "--spool", str(file), "-p", "alone", "--json").json
        assert offered["state"] == "spooled"
        node.start()
        eventually(lambda: node.row(offered["checkpoint"]), "the offer to be taken in")
        assert node.wait_level(offered["checkpoint"])["step"] == 3
    finally:
        end(node)
