"""Acting, with every verb of `ckpt` that changes something: the real command, the real daemon, a small real history. M155"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.history import RULES, History
from tests.support.node import eventually
from tests.support.onlooker import CKPT, Onlooker, end, make

pytestmark = pytest.mark.xdist_group("cli_for_real")


def test_verify_reads_everything_back(ckpt: Any, history: History) -> None:
    one = ckpt("verify", history.ids[100], "--json").json
    assert (one["ok"], one["results"][0]["damage"], one["results"][0]["step"]) == (True, [], 100)
    everything = ckpt("verify", "--all", "-p", "imagenet", "--jsonl").out.splitlines()
    assert [json.loads(line)["ok"] for line in everything] == [True] * 3
    alone = ckpt("verify", str(history.path(100)))
    assert (alone.code, alone.out.split()[0]) == (0, "ok")


def test_damage_exits_4_names_file_mib_and_tensor_and_is_repaired_from_the_hot_copy(
    ckpt: Any, history: History
) -> None:
    """M073: repaired means bit for bit what the digest says, from the arena that still holds it."""
    node = history.node
    trainer = history.nursery.trainer(node.environ)
    trainer.open(name="hurt", project="damage", dir=str(node.runs))
    assert trainer.prepare(seed=1)["ready"]  # through the spool there would be no hot copy
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


def test_wait_and_submit(ckpt: Any, history: History) -> None:
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


def test_pin_unpin_rm_and_their_trail(ckpt: Any, history: History) -> None:
    node = history.node
    trainer = history.nursery.trainer(node.environ)
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


def test_a_file_that_somebody_still_writes_can_not_be_removed(ckpt: Any, history: History) -> None:
    node = history.node
    writer = history.writer
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


def test_what_is_gone_can_be_forgotten(ckpt: Any, history: History) -> None:
    node = history.node
    trainer = history.nursery.trainer(node.environ)
    trainer.open(name="lost", project="removing", dir=str(node.runs))
    made = [trainer.save(seed=step, step=step)["id"] for step in (1, 2)]
    row, _ = [node.wait_level(checkpoint) for checkpoint in made]
    trainer.end()
    shutil.rmtree(row["path"])
    node.wait_state(row["checkpoint"], "missing")
    assert ckpt("path", row["checkpoint"]).code == 3
    assert ckpt("wait", row["checkpoint"]).code == 4
    assert ckpt("rm", "--yes", "--json", row["checkpoint"]).json["removed"][0]["action"] == "forget"
    assert row["checkpoint"] not in ckpt("ls", "removing", "--state", "missing", "-q").out
    assert ckpt("show", row["checkpoint"], "--json").json["checkpoint"]["state"] == "dropped"


def test_retention_shows_first_and_does_what_it_showed(ckpt: Any, history: History) -> None:
    node = history.node
    node.configure(RULES.replace('project = "short"\nkeep_last = 1', 'project = "short"\nkeep_last = 9'))
    assert "experiments" in ckpt("reload", "--json").json["changed"]
    trainer = history.nursery.trainer(node.environ)
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
    assert sorted(ckpt("retention", "apply", "short", "--yes", "-q").out.split()) == sorted(made[:2])
    assert [p.name for p in (node.runs / "short" / "run").glob("step_*")] == ["step_0000000003"]
    assert ckpt("retention", "plan", "short", "--json").json["plans"][0]["drop"] == []


def test_log_tells_what_happened_and_follows_over_a_restart(ckpt: Any, history: History) -> None:
    """None is told twice and none left out, although more happen while it is away than it asks for at once."""
    node = history.node
    events = ckpt("log", "-n", "500", "--json").json["events"]
    told = [event["event"] for event in events if event["checkpoint"] == history.ids[100]]
    assert [event for event in told if event.startswith("checkpoint.")][:3] == [
        "checkpoint.staged",
        "checkpoint.published",
        "checkpoint.verified",
    ]
    assert [e["seq"] for e in events] == sorted(e["seq"] for e in events)
    since = events[-1]["seq"]
    trainer = history.nursery.trainer(node.environ)
    follower = subprocess.Popen(
        [str(CKPT), "log", "-f", "--jsonl", "--since", str(since), "-n", "2"],
        env=node.shell,
        stdout=subprocess.PIPE,
        text=True,
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
        assert follower.wait(timeout=60) == 130
        follower.stdout.close()
        trainer.end()
    numbers = [
        e["seq"] for e in heard if e["seq"] is not None
    ]  # without one: what the daemon says, but does not record
    assert numbers == sorted(set(numbers))
    told = [e["event"] for e in heard if e["step"] == 2]
    assert told.count("checkpoint.published") == told.count("checkpoint.verified") == 1


def test_rebuild_makes_the_same_list_from_the_disk_alone(history: History) -> None:
    """The catalog is deleted: manifests bring back everything a row says, and every byte is read again."""
    node = make(more=RULES).start()
    try:
        trainer = history.nursery.trainer(node.environ)
        trainer.open(name="run", project="lost", dir=str(node.runs), tags=["t"], config={"lr": 1})
        made = [
            trainer.save(
                seed=step, step=step, epoch=float(step), metrics={"val_loss": loss}, note=f"n{step}", meta={"k": [1]}
            )["id"]
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
