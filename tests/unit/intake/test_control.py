"""What people ask: every answer has the documented shape, fits into a frame, and shows a user only the own things."""

import os
from datetime import timedelta
from typing import Any

import anyio
import pytest

from ckptd.catalog import checkpoints, experiments, hookruns
from ckptd.catalog.tx import Tx
from ckptd.errors import BadRequest, CkptdError, NotFound
from ckptd.intake import control as controlling
from ckptd.intake import requests as ask
from ckptd.intake import status as conditions
from ckptd.intake.control import Control
from ckptd.intake.status import Status
from ckptd.model import new_id
from tests.support import catalog as store
from tests.support.documented_wire import documented
from tests.support.in_process import Training, daemon
from tests.support.strangers import Stranger

REQUESTS, REPLIES = documented()
# Asked elsewhere: these change or end something (test_commands.py), or belong to a training process.
READING = (
    "list",
    "summary",
    "experiments",
    "show",
    "resolve",
    "recovery",
    "events",
    "audit",
    "status",
    "health",
    "doctor",
    "roots",
    "metrics.tail",
)


def lacking(meant: Any, found: Any, where: str = "") -> list[str]:
    """Name what the documented answer has and the real one has not, down to every field."""
    if where.endswith((".by_state", ".by_level", ".data", ".metrics", ".facts")):
        return []  # whatever there is to count or to tell
    if isinstance(meant, dict) and isinstance(found, dict):
        missing = [f"{where}.{key}" for key in meant if key not in found]
        return missing + [m for key in meant if key in found for m in lacking(meant[key], found[key], f"{where}.{key}")]
    if isinstance(meant, list) and isinstance(found, list) and meant and found:
        return lacking(meant[0], found[0], f"{where}[0]")
    return []


async def found_about(tx: Tx, checkpoint: str) -> None:
    """Write down that a hook found something about a checkpoint."""
    found = hookruns.Found(at=tx.clock.now(), level="info", text="sound", facts={}, checkpoint_id=checkpoint)
    no = (await hookruns.enter(tx, ["numeric-health"]))["numeric-health"].no
    progress = hookruns.Progress(no=no, name="numeric-health", cursor=None, counts={}, findings=[found])
    await hookruns.record(tx, [progress])


@pytest.mark.parametrize("op", READING)
async def test_every_reading_op_answers_with_the_documented_fields(short_dir, op):
    """M118 and the rest of docs/reference/wire-control.md: fields may be added, none is left out."""
    rules = {"keep_best": {"metric": "val_loss", "mode": "min"}}
    async with daemon(short_dir, retention=rules) as node, node.connect() as line:
        training = await Training(line, str(node.runs), project="imagenet", name="resnet50").open()
        one = await training.saved(1000, metrics={"val_loss": 0.31})
        await line.ask("pin", selector=one, note="for the paper")
        await line.ask("metrics", experiment=training.experiment, points=[["loss", 1, 0.5, 1.7e9]])
        await node.parts.metrics.flush()
        await node.write(lambda tx: found_about(tx, one))
        wanted = {k: v for k, v in REQUESTS[op].items() if k not in {"op", "after", "since_seq", "follow", "tag"}}
        answer = await line.ask(op, **wanted)
        only_in_show = [] if op == "show" else [".checkpoints[0].meta"]
        assert [what for what in lacking(REPLIES[op], answer) if what not in only_in_show] == []
        for name, value in REPLIES[op].items():
            if isinstance(value, list) and name != "degraded":
                assert answer[name], f"{name} is empty, so its shape proves nothing"


async def test_every_documented_op_is_one_and_every_op_is_documented():
    ops = {str(kind.__struct_config__.tag) for kind in ask.ALL}
    assert set(REQUESTS) <= ops
    from pathlib import Path

    page = Path(__file__).parents[3] / "docs/reference"
    text = (page / "wire.md").read_text() + (page / "wire-control.md").read_text()
    assert sorted(op for op in ops if f"`{op}`" not in text and f'"{op}"' not in text and f", {op}\n" not in text) == []


async def filled(node, count: int, **more) -> str:
    experiment = await node.write(
        lambda tx: experiments.open_experiment(tx, store.an_experiment(uid=os.getuid(), **more))
    )
    for step in range(count):
        await node.write(lambda tx, s=step: store.climb(tx, store.a_checkpoint(experiment.experiment.id, s)))
    return experiment.experiment.id


async def test_pages_are_cut_to_fit_a_frame_and_the_cursor_goes_on_where_they_end(short_dir, monkeypatch):
    monkeypatch.setattr(controlling, "REPLY_BYTES_MAX", 4000)
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await filled(node, 17)
        for sort in ("newest", "step"):
            steps, after, pages = [], None, 0
            while pages == 0 or after:
                answer = await line.ask("list", limit=10, after=after, sort=sort)
                steps += [row["step"] for row in answer["checkpoints"]]
                after, pages = answer["next"], pages + 1
            assert steps == list(range(16, -1, -1))
            assert pages > 2


async def test_a_list_leaves_out_what_was_dropped_or_replaced_until_it_is_asked_for(short_dir):
    """Whoever lists checkpoints wants those that there are; the history is a question of its own."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        one = await filled(node, 4)
        rows = {row["step"]: row["checkpoint"] for row in (await line.ask("list"))["checkpoints"]}

        async def retire(tx):
            await checkpoints.mark_trashed(tx, rows[0], rows[0], "test")
            await checkpoints.mark_trashed(tx, rows[1], rows[1], "test")
            await checkpoints.mark_dropped(tx, rows[1])
            await checkpoints.stage(tx, store.a_checkpoint(one, 9, id="9" * 32))
            await checkpoints.mark_replaced(tx, "9" * 32)

        await node.write(retire)

        async def steps(**more) -> list[int]:
            return [row["step"] for row in (await line.ask("list", sort="step", **more))["checkpoints"]]

        assert await steps() == [3, 2, 0]
        assert await steps(state="all") == [9, 3, 2, 1, 0]
        assert await steps(state="dropped") == [1]
        assert await steps(state="replaced") == [9]
        assert await steps(limit=2) == [3, 2]


async def test_notes_of_64_kib_each_still_make_a_page(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        one = await filled(node, 0)
        for step in range(20):
            await node.write(lambda tx, s=step: store.climb(tx, store.a_checkpoint(one, s, note="x" * 65536)))
        answer = await line.ask("list", limit=20)
        assert 0 < len(answer["checkpoints"]) < 20
        assert answer["next"]


async def test_experiments_of_a_project_are_found_behind_hundreds_of_others(short_dir):
    """The filter belongs into the query: after paging, a page could be empty and `next` null."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await filled(node, 1, project="wanted", name="old")
        for number in range(12):
            await filled(node, 0, project="other", name=f"n{number}")
        answer = await line.ask("experiments", project="wanted", limit=5)
        assert [(row["project"], row["name"]) for row in answer["experiments"]] == [("wanted", "old")]
        assert answer["next"] is None


async def test_events_since_a_number_since_a_time_and_from_now_on(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await filled(node, 3)
        everything = (await line.ask("events", limit=500))["events"]
        middle = everything[5]
        after = await line.ask("events", since_seq=middle["seq"], limit=2)
        assert [e["seq"] for e in after["events"]] == [e["seq"] for e in everything[6:8]]
        assert after["next"] == everything[7]["seq"]
        now = node.parts.clock.now()
        assert (await line.ask("events", since=(now + timedelta(minutes=1)).isoformat()))["events"] == []
        at = await line.ask("events", since=(now - timedelta(minutes=5)).isoformat(), limit=500)
        assert [e["seq"] for e in at["events"]] == [e["seq"] for e in everything]
        with pytest.raises(BadRequest):
            await line.ask("events", since="2026-01-01T00:00:00")  # which zone?


async def test_a_follower_gets_every_event_after_the_page_once_and_after_it(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await filled(node, 1)

        async def make() -> None:
            for number in range(20):
                await filled(node, 1, name=f"later{number}")

        async with anyio.create_task_group() as group:
            group.start_soon(make)
            number = await line.send("events", limit=500, follow=True)
            reply = await line.reply(number)
        last = (await line.ask("events", limit=1))["events"][0]["seq"]
        seen = [event["seq"] for event in reply["events"]]
        while seen[-1] < last:
            seen.append((await line.push("event"))["event"]["seq"])
        assert seen == list(range(seen[0], last + 1))


async def test_another_user_sees_nothing_of_mine(short_dir):
    """I9: lists, status, events, audit, metrics, levels: each is filtered by the kernel's word on who asks."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        one = await training.saved(1)
        await line.ask("pin", selector=one)
        other = Stranger(os.getuid() + 4242)
        front = node.parts.service._front
        reading, condition = Control(front), node.parts.service._handlers[ask.Status].__self__
        assert isinstance(condition, Status)
        assert (await reading.page(other, ask.List(id=1)))["checkpoints"] == []
        assert (await reading.page_experiments(other, ask.Experiments(id=1)))["experiments"] == []
        assert (await reading.summary(other, ask.Summary(id=1)))["count"] == 0
        assert (await reading.events(other, ask.Events(id=1)))["events"] == []
        assert (await reading.audit(other, ask.Audit(id=1)))["entries"] == []
        state = await condition.status(other, ask.Status(id=1))
        assert (state["experiments"], state["experiments_total"]) == ([], 0)
        for wanted in (
            ask.Tail(id=1, project="demo", name="run"),
            ask.Tail(id=1, experiment=training.experiment),
        ):
            with pytest.raises(NotFound):
                await reading.tail(other, wanted)
        with pytest.raises(NotFound):
            await reading.show(other, ask.Show(id=1, selector=one))
        training_ops = node.parts.service._training
        assert (await training_ops.follow(other, ask.Follow(id=1, checkpoints=[one])))["states"] == []


async def test_levels_and_events_of_one_user_are_never_pushed_to_another(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        other = Stranger(os.getuid() + 4242)
        training = await Training(line, str(node.runs)).open()
        followers = node.parts.followers
        followers.listen(other)
        await followers.begin(other, 0)
        lease_size = 64 * 1024
        lease = await training.lease(lease_size)
        one = new_id()
        followers.add(other, [one])
        training.write(lease, one, {"a.safetensors": b"x"}, step=1)
        await line.ask("commit", **lease.names(), experiment=training.experiment, checkpoint=one)
        await line.push("level", checkpoint=one, level="verified")
        lease.close()


async def test_following_thousands_of_saves_on_one_connection_goes_on_for_ever(short_dir):
    """What has ended or is verified is let go of; beyond the limit the oldest gives way, never the newest."""
    async with daemon(short_dir, intake={"pushes_max": 16}) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await line.ask("watch", checkpoints=[new_id() for _ in range(40)])
        for step in range(3):
            await training.saved(step)
        [peer] = node.parts.listener.peers
        assert len(peer.follows) <= 16
        assert set(node.parts.followers._by_checkpoint) == set(peer.follows)


async def test_status_does_not_wait_for_a_disk_that_hangs(short_dir, monkeypatch):
    """It is asked for when nothing else works."""
    monkeypatch.setattr(conditions, "DISK_ANSWER_S", 0.2)
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await Training(line, str(node.runs)).open()
        await node.parts.workers._station(str(node.runs))

        async def hang(*_, **__):
            await anyio.sleep_forever()

        monkeypatch.setattr(node.parts.workers, "call", hang)
        with anyio.fail_after(30):  # the disk hangs for ever
            assert (await line.ask("status"))["disk"] == []
            checks = (await line.ask("doctor"))["checks"]
        [root] = [check for check in checks if check["name"].startswith("root ")]
        assert root["status"] == "fail"
        assert "did not answer" in root["detail"]


async def test_the_audit_trail_names_paths_as_subjects_and_never_as_checkpoints(short_dir):
    """M043."""
    async with daemon(short_dir) as node, node.connect() as line:
        one = await (await Training(line, str(node.runs)).open()).saved(1)
        (short_dir / "w").mkdir()
        await line.ask("root.add", path=str(short_dir / "w"))
        await line.ask("pin", selector=one, note="n")
        entries = (await line.ask("audit"))["entries"]
        assert [(e["action"], e["subject"], e["checkpoint"]) for e in entries] == [
            ("pin", one, one),
            ("root.add", str(short_dir / "w"), None),
        ]
        assert all((e["uid"], e["pid"]) == (os.getuid(), os.getpid()) for e in entries)


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        ("list", {"after": "n:" + "9" * 40}),
        ("list", {"after": "nonsense"}),
        ("list", {"state": "purple"}),
        ("experiments", {"after": "\u00b2"}),
        ("audit", {"after": "9" * 40}),
        ("show", {"selector": "step:" + "9" * 20, "project": "demo", "name": "run"}),
        ("show", {"selector": "\u0000"}),
        ("show", {"selector": "%"}),
        ("show", {"selector": ""}),
        ("metrics.tail", {}),
        ("wait", {"selector": "latest", "project": "no", "name": "no"}),
    ],
)
async def test_odd_arguments_are_coded_errors_and_never_defects(short_dir, op, fields):
    """M019: nobody sees a traceback, and nothing is called internal that a caller did wrong."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        await filled(node, 1)
        with pytest.raises(CkptdError) as caught:
            await line.ask(op, **fields)
        assert caught.value.code in {"bad_request", "not_found"}


async def test_a_bug_in_one_handler_costs_one_answer(short_dir, monkeypatch):
    async with daemon(short_dir, front=False) as node, node.connect() as line:

        async def broken(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setitem(node.parts.service._handlers, ask.List, broken)
        with pytest.raises(CkptdError) as caught:
            await line.ask("list")
        assert caught.value.code == "internal"
        await line.ask("experiments")


async def test_show_tells_everything_about_one_checkpoint(short_dir):
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open(config={"lr": 0.1})
        one = await training.saved(1, meta={"seed": 7})
        await line.ask("pin", selector=one, note="paper")
        shown = await line.ask("show", selector=one)
        assert shown["checkpoint"]["meta"] == {"seed": 7}
        assert shown["checkpoint"]["holds"] == ["latest", "pin"]
        assert shown["files_total"] == 2
        assert [entry["what"] for entry in shown["history"]][:4] == [
            "staged",
            "published",
            "latest.changed",
            "verified",
        ]
        files = await node.read(lambda conn: checkpoints.files(conn, one))
        assert [f["sha256"] for f in shown["files"]] == [f.sha256 for f in files]
