"""Every verb of `ckpt` as people and scripts run it: the real command, the real daemon, a small real history. M155"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import eventually
from tests.support.onlooker import CKPT, Onlooker, end, make
from tests.support.trainer import Nursery, Trainer
from tests.support.writer import Writer

pytestmark = pytest.mark.xdist_group("cli_for_real")

RULES = """
[retention]
keep_best = { metric = "val_loss", mode = "min" }
keep_last = 50

[[experiments]]
project = "short"
keep_last = 1
"""
LOSSES = {100: 0.9, 200: 0.3, 300: 0.5}


class History:
    """What the node of this module has: imagenet/resnet50 (three saves), a file that was submitted, one that was found."""

    def __init__(self, node: Onlooker, trainer: Trainer, writer: Writer) -> None:
        self.node = node
        trainer.open(name="resnet50", project="imagenet", dir=str(node.runs), config={"lr": 0.1}, tags=["baseline"])
        self.ids = {
            step: str(trainer.save(seed=step, step=step, epoch=step / 100, metrics={"val_loss": loss}, note=f"n{step}")["id"])
            for step, loss in LOSSES.items()
        }
        self.submitted = node.dir / "own" / "model_7.pt"
        self.submitted.parent.mkdir()
        writer.torch_save(path=self.submitted, seed=7)
        self.found = node.watch(node.dir / "watched", "old") / "run" / "model_9.pt"
        self.found.parent.mkdir()
        writer.torch_save(path=self.found, seed=9)
        for checkpoint in self.ids.values():
            node.wait_level(checkpoint)
        node.wait_done(self.found)
        trainer.close()
        node.wait_idle()

    def path(self, step: int) -> Path:
        return self.node.runs / "imagenet" / "resnet50" / f"step_{step:010d}"


@pytest.fixture(scope="module")
def writer() -> Iterator[Writer]:
    with Writer() as made:
        yield made


@pytest.fixture(scope="module")
def node() -> Iterator[Onlooker]:
    """Without the fail points of other tests: `ckpt doctor` would rightly complain of them."""
    made = make(more=RULES, prefix=("env", "-u", "CKPTD_FAIL")).start()
    yield made
    end(made)


@pytest.fixture(scope="module")
def nursery_here() -> Iterator[Nursery]:
    directory = make().dir
    with Nursery(directory) as made:
        yield made
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def history(node: Onlooker, nursery_here: Nursery, writer: Writer) -> History:
    return History(node, nursery_here.trainer(node.environ), writer)


@pytest.fixture
def ckpt(node: Onlooker, history: History) -> Iterator[Any]:
    yield node.run
    print(node.tail())


def ids(text: str) -> list[str]:
    return text.splitlines()


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
    assert ids(ckpt("ls", "imagenet", "-q", "--sort", "step").out) == [history.ids[step] for step in (300, 200, 100)]
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
    assert "val_loss" in ckpt("show", history.ids[200][:8]).out


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


def test_verify_reads_everything_back(ckpt: Any, history: History) -> None:
    one = ckpt("verify", history.ids[100], "--json").json
    assert (one["ok"], one["results"][0]["damage"], one["results"][0]["step"]) == (True, [], 100)
    everything = ckpt("verify", "--all", "-p", "imagenet", "--jsonl").out.splitlines()
    assert [json.loads(line)["ok"] for line in everything] == [True] * 3
    alone = ckpt("verify", str(history.path(100)))
    assert (alone.code, alone.out.split()[0]) == (0, "ok")


def test_damage_exits_4_names_file_mib_and_tensor_and_is_repaired_from_the_hot_copy(
    ckpt: Any, history: History, node: Onlooker, nursery_here: Nursery
) -> None:
    """M073: repaired means bit for bit what the digest says, from the arena that still holds it."""
    trainer = nursery_here.trainer(node.environ)
    trainer.open(name="hurt", project="damage", dir=str(node.runs))
    made = trainer.save(seed=1, step=1)["id"]
    row = node.wait_level(made)
    trainer.end()
    file = Path(row["path"]) / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    for words in ((row["path"],), (made,)):  # here, which tells nobody; then by the daemon, which remembers
        said = ckpt("verify", *words)
        assert said.code == 4
        assert "model.safetensors: digest MiB 0 in " in said.out
    eventually(lambda: ckpt("verify", made).code == 0, "the repair")
    assert file.read_bytes() == before
    after = node.row(made)
    assert after is not None
    assert (after["state"], after["level"]) == ("live", "verified")


def test_wait_and_submit(ckpt: Any, history: History, node: Onlooker) -> None:
    told = ("-p", "mine", "-e", "files", "--step", "7", "-m", "val_loss=0.25", "-m", "odd=NaN", "--note", "by hand")
    said = ckpt("submit", str(history.submitted), *told, "--wait", "verified")
    assert said.code == 0, said.err
    checkpoint, level, state, path = said.out.rstrip("\n").split("\t")
    assert (level, state, path) == ("verified", "live", str(history.submitted))
    row = ckpt("show", checkpoint, "--json").json["checkpoint"]
    assert (row["project"], row["name"], row["step"], row["note"]) == ("mine", "files", 7, "by hand")
    assert row["metrics"] == {"val_loss": 0.25, "odd": "NaN"}
    assert ckpt("wait", checkpoint, "--level", "verified", "--json").json["level"] == "verified"
    assert ckpt("wait", "mine/files@step:7", "-q").out == f"{checkpoint}\n"
    held = ckpt("rm", "--yes", checkpoint)
    assert held.code == 7  # somebody else's file: ckptd never deletes it
    assert history.submitted.exists()


def test_pin_unpin_rm_and_their_trail(ckpt: Any, node: Onlooker, history: History, nursery_here: Nursery) -> None:
    trainer = nursery_here.trainer(node.environ)
    trainer.open(name="run", project="removing", dir=str(node.runs))
    made = [trainer.save(seed=step, step=step)["id"] for step in (1, 2)]
    paths = [Path(node.wait_level(checkpoint)["path"]) for checkpoint in made]
    trainer.end()
    assert "pinned" in ckpt("pin", made[0], "--note", "mine").err
    assert ckpt("show", made[0], "--json").json["holds"][0]["note"] == "mine"
    assert ckpt("rm", "--yes", made[0]).code == 7
    assert ckpt("unpin", made[0], "-q").out == f"{made[0]}\n"
    assert ckpt("unpin", made[0], "--json").json["changed"] is False
    assert ckpt("rm", made[0]).code == 2  # nobody is there to be asked
    looked = ckpt("rm", "--dry-run", made[0], "--json").json
    assert (looked["dry_run"], looked["removed"][0]["path"]) == (True, str(paths[0]))
    assert paths[0].exists()
    assert ckpt("rm", "--yes", made[0], made[1]).code == 7  # the newest: then neither goes
    assert paths[0].exists()
    assert ckpt("rm", "--yes", "-q", made[0]).out == f"{made[0]}\n"
    assert not paths[0].exists()
    assert paths[1].exists()
    assert ckpt("rm", "--yes", made[0]).code == 3  # gone already
    trail = ckpt("log", "--audit", "--json").json["entries"]
    acts = [entry["action"] for entry in trail if entry["checkpoint"] == made[0]]
    assert acts == ["pin", "unpin", "remove"]
    assert {entry["uid"] for entry in trail if entry["checkpoint"] == made[0]} == {os.getuid()}


def test_a_file_that_somebody_still_writes_can_not_be_removed(
    ckpt: Any, node: Onlooker, history: History, writer: Writer
) -> None:
    path = node.dir / "watched" / "torn_1.pt"
    writer.make(name="torn", form="torch", seed=1)
    writer.open(path=path)
    writer.write(name="torn", path=path, part=0, of=2)
    row = node.wait_found(path)
    for words in (("--dry-run",), ("--yes",)):
        assert ckpt("rm", *words, row["checkpoint"]).code == 7
    assert path.exists()
    writer.close(path=path)
    path.unlink()
    node.wait_state(row["checkpoint"], "missing")


def test_what_is_gone_can_be_forgotten(ckpt: Any, node: Onlooker, history: History, nursery_here: Nursery) -> None:
    trainer = nursery_here.trainer(node.environ)
    trainer.open(name="lost", project="removing", dir=str(node.runs))
    made = [trainer.save(seed=step, step=step)["id"] for step in (1, 2)]
    row = [node.wait_level(checkpoint) for checkpoint in made][0]
    trainer.end()
    shutil.rmtree(row["path"])
    node.wait_state(row["checkpoint"], "missing")
    assert ckpt("path", row["checkpoint"]).code == 3
    assert ckpt("wait", row["checkpoint"]).code == 4
    assert ckpt("rm", "--yes", "--json", row["checkpoint"]).json["removed"][0]["action"] == "forget"
    assert row["checkpoint"] not in ckpt("ls", "removing", "--state", "missing", "-q").out
    assert ckpt("show", row["checkpoint"], "--json").json["checkpoint"]["state"] == "dropped"


def test_retention_shows_first_and_does_what_it_showed(
    ckpt: Any, node: Onlooker, history: History, nursery_here: Nursery
) -> None:
    node.configure(RULES.replace('project = "short"\nkeep_last = 1', 'project = "short"\nkeep_last = 9'))
    assert "experiments" in ckpt("reload", "--json").json["changed"]
    trainer = nursery_here.trainer(node.environ)
    trainer.open(name="run", project="short", dir=str(node.runs))
    made = [trainer.save(seed=step, step=step)["id"] for step in (1, 2, 3)]
    for checkpoint in made:
        node.wait_level(checkpoint)
    node.wait_idle()
    trainer.end()
    node.configure(RULES)
    ckpt("reload")
    plan = ckpt("retention", "plan", "short", "--json").json
    assert plan["applied"] is False
    (found,) = plan["plans"]
    assert ([e["step"] for e in found["keep"]], [e["step"] for e in found["drop"]]) == ([3], [2, 1])
    assert found["rules"] == ["last 1"]
    assert "newest verified" in found["keep"][0]["why"]
    assert {line.split("\t")[0] for line in ckpt("retention", "plan", "short/run").out.splitlines()} == {"keep", "drop"}
    assert len(list((node.runs / "short" / "run").glob("step_*"))) == 3
    assert sorted(ids(ckpt("retention", "apply", "short", "--yes", "-q").out)) == sorted(made[:2])
    assert [p.name for p in (node.runs / "short" / "run").glob("step_*")] == ["step_0000000003"]
    assert ckpt("retention", "plan", "short", "--json").json["plans"][0]["drop"] == []


def test_log_tells_what_happened_and_follows_over_a_restart(
    ckpt: Any, node: Onlooker, history: History, nursery_here: Nursery
) -> None:
    events = ckpt("log", "-n", "500", "--json").json["events"]
    told = [event["event"] for event in events if event["checkpoint"] == history.ids[100]]
    assert [event for event in told if event.startswith("checkpoint.")][:3] == ["checkpoint.staged", "checkpoint.published", "checkpoint.verified"]
    assert [e["seq"] for e in events] == sorted(e["seq"] for e in events)
    since = events[-1]["seq"]
    trainer = nursery_here.trainer(node.environ)
    follower = subprocess.Popen(
        [str(CKPT), "log", "-f", "--jsonl", "--since", str(since)], env=node.shell, stdout=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    heard: list[dict[str, Any]] = []

    def hear(event: str, checkpoint: str) -> None:
        assert follower.stdout is not None
        while not heard or (heard[-1]["event"], heard[-1]["checkpoint"]) != (event, checkpoint):
            line = follower.stdout.readline()
            assert line, "the follower ended"
            heard.append(json.loads(line))

    try:
        trainer.open(name="followed", project="followed", dir=str(node.runs))
        hear("checkpoint.verified", trainer.save(seed=1, step=1)["id"])
        node.kill_daemon()
        hear("checkpoint.verified", trainer.save(seed=2, step=2)["id"])
    finally:
        follower.send_signal(signal.SIGINT)
        assert follower.wait(timeout=20) == 130
        follower.stdout.close()
        trainer.end()
    numbers = [e["seq"] for e in heard if e["seq"] is not None]  # without one: what the daemon says, but does not record
    assert numbers == sorted(set(numbers))
    told = [e["event"] for e in heard if e["step"] == 2]
    assert told.count("checkpoint.published") == told.count("checkpoint.verified") == 1


def test_status_experiments_and_roots_describe_the_node(ckpt: Any, node: Onlooker, history: History) -> None:
    status = ckpt("status", "--json").json
    assert status["daemon"]["pid"] == node.daemon_pid
    assert status["jobs"]["parked"] == 0
    assert {root["path"]: root["kind"] for root in status["roots"]}[str(node.runs)] == "managed"
    assert {worker["state"] for worker in status["workers"]} <= {"ok", "idle", "running"}
    assert str(node.runs) in ckpt("status").out
    (found,) = ckpt("experiments", "imagenet", "--json").json["experiments"]
    assert (found["name"], found["status"], found["checkpoints"]) == ("resnet50", "completed", 3)
    assert (found["latest"]["step"], found["best"][0]["step"], found["best"][0]["value"]) == (300, 200, 0.3)
    assert {line.split("\t")[0] for line in ckpt("roots").out.splitlines()} >= {str(node.runs), str(node.dir / "watched")}
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


def test_config_show_and_check_read_what_the_daemon_reads(ckpt: Any, node: Onlooker, history: History) -> None:
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


def test_rebuild_makes_the_same_list_from_the_disk_alone(nursery_here: Nursery) -> None:
    """The catalog is deleted: manifests bring back everything a row says, and every byte is read again."""
    node = make(more=RULES).start()
    try:
        trainer = nursery_here.trainer(node.environ)
        trainer.open(name="run", project="lost", dir=str(node.runs), tags=["t"], config={"lr": 1})
        made = [
            trainer.save(seed=step, step=step, epoch=float(step), metrics={"val_loss": loss}, note=f"n{step}", meta={"k": [1]})["id"]
            for step, loss in ((1, 0.5), (2, 0.25), (3, float("nan")))
        ]
        made.append(trainer.save(seed=9, step=3, metrics={"val_loss": 0.75})["id"])  # a second one of that step
        for checkpoint in made:
            node.wait_level(checkpoint)
        trainer.close()
        trainer.end()
        node.wait_idle()
        before = listed(node)
        assert len(before) == len(made)
        assert node.stop() == 0
        for file in node.state.glob("catalog.sqlite*"):
            file.unlink()
        assert node.run("ls", "--json").code == 5
        node.start()
        assert node.run("ls", "-q").out == ""
        said = node.run("rebuild", str(node.runs), "--json")
        assert said.code == 0, said.err
        (root,) = said.json["roots"]
        assert (root["found"], root["added"] + root["known"], root["damaged"], root["problem"]) == (4, 4, 0, "")
        eventually(lambda: [r["level"] for r in listed(node)] == ["verified"] * len(made), "all to be read back")
        assert listed(node) == before
        assert node.run("rebuild", "--json").json["roots"][0]["added"] == 0
        assert node.run("path", "lost/run@best").out == f"{node.runs}/lost/run/step_0000000002\n"
        assert node.run("path", "lost/run").out == f"{node.runs}/lost/run/step_0000000003_r2\n"
    finally:
        end(node)


def listed(node: Onlooker) -> list[dict[str, Any]]:
    """What `ckpt ls` and `ckpt show` say of everything, but for what the catalog alone can know."""
    rows = node.run("ls", "--json", "--all").json["checkpoints"]
    own = {"sequence", "staged_at", "durable_at", "verified_at", "origin", "hot"}
    return [
        {**{key: value for key, value in row.items() if key not in own}, "files": node.digests(row["checkpoint"])}
        for row in sorted(rows, key=lambda row: (row["step"], row["revision"]))
    ]


def test_looking_works_without_a_daemon_and_acting_says_that_there_is_none(nursery_here: Nursery) -> None:
    node = make().start()
    try:
        trainer = nursery_here.trainer(node.environ)
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
