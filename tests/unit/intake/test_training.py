"""The training ops, over a real socket, into a real catalog, through a real worker."""

import itertools
import os
from dataclasses import replace

import anyio
import pytest

from ckptd.catalog import checkpoints, experiments
from ckptd.errors import BadPath, BadRequest, CkptdError, Exists, NoArena, NotFound, UnsupportedVersion
from ckptd.intake.arenas import Use
from ckptd.model import ExperimentStatus, State, new_id
from ckptd_client import control
from tests.support.catalog import StillClock
from tests.support.in_process import Training, a_tensor, daemon, eventually, open_fds, size_for
from tests.support.rungs import in_turns, rungs


async def test_hello_agrees_on_a_version_and_says_where_the_spool_is(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        answer = await line.ask("hello", versions=[1, 9])
        assert (answer["version"], answer["uid"], answer["mode"]) == (1, os.getuid(), "user")
        assert answer["spool_dir"] == str(short_dir / "state" / "spool")
        with pytest.raises(UnsupportedVersion):
            await line.ask("hello", versions=[2])


async def test_nothing_is_answered_before_hello(short_dir):
    async with daemon(short_dir, front=False):
        from tests.support.in_process import Wire

        line = Wire.to(short_dir / "s")
        with pytest.raises(BadRequest, match="hello"):
            await line.ask("status")
        line.close()


async def test_a_save_climbs_the_ladder_and_each_rung_is_pushed(short_dir, monkeypatch):
    """M007, M208: staged, durable, verified, in this order, with the file under its final name."""
    gates = in_turns(monkeypatch, "publish", "verify")
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        checkpoint = await training.save(7, metrics={"val_loss": 0.5}, note="first", meta={"seed": 3}, epoch=1.5)
        levels = [push["level"] for push in await rungs(line, checkpoint, gates)]
        assert levels == ["staged", "durable", "verified"]
        found = await line.ask("resolve", selector=checkpoint)
        assert found["path"] == str(node.runs / "demo/run/step_0000000007")
        assert (found["metrics"], found["step"]) == ({"val_loss": 0.5}, 7)
        assert sorted(os.listdir(found["path"])) == ["manifest.json", "model.safetensors", "state.json"]


async def test_a_commit_sent_again_is_the_same_save(short_dir):
    """M017: a client that lost its connection repeats itself."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        lease = await training.lease(size_for({"a.safetensors": a_tensor()}))
        checkpoint = new_id()
        training.write(lease, checkpoint, {"a.safetensors": a_tensor()}, step=1)
        again = {**lease.names(), "experiment": training.experiment, "checkpoint": checkpoint}
        first = await line.ask("commit", **again)
        await line.push("level", checkpoint=checkpoint, level="verified")
        async with node.connect() as other:
            second = await other.ask("commit", **again)
        assert (first["level"], second["level"]) == ("staged", "verified")
        assert len((await line.ask("list"))["checkpoints"]) == 1
        lease.close()


async def test_a_commit_of_another_lease_is_refused(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        lease = await training.lease(8192)
        for wrong in ({"arena": "0" * 32, "generation": 1}, {"arena": lease.arena, "generation": lease.generation + 1}):
            with pytest.raises(NoArena):
                await line.ask("commit", experiment=training.experiment, checkpoint=new_id(), **wrong)
        with pytest.raises(BadRequest, match="no committed save"):
            await line.ask("commit", experiment=training.experiment, checkpoint=new_id(), **lease.names())
        lease.close()


async def test_a_descriptor_that_lies_is_refused_and_its_arena_can_be_given_back(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        lease = await training.lease(8 * 4096)
        training.write(lease, "not an id", {"a": b"x"})
        with pytest.raises(BadRequest, match="descriptor"):
            await line.ask("commit", experiment=training.experiment, checkpoint=new_id(), **lease.names())
        arena = node.parts.pool.get(bytes.fromhex(lease.arena))
        assert arena is not None
        assert (arena.use, arena.checkpoint_id) == (Use.LEASED, "")
        lease.close()


async def test_abandon_frees_the_arena_unless_it_holds_a_save(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        lease = await training.lease(16 * 4096)
        await line.ask("abandon", **lease.names())
        with pytest.raises(NoArena):
            await line.ask("abandon", **lease.names())
        lease.close()
        lease = await training.lease(16 * 4096)
        training.write(lease, new_id(), {"a": b"x"})
        with pytest.raises(BadRequest, match="commit it"):
            await line.ask("abandon", **lease.names())
        lease.close()


async def test_a_trainer_that_dies_after_its_commit_word_loses_nothing(short_dir):
    """H2: the message never came; the reaper sees the word, with no restart and no other save between."""
    async with daemon(short_dir) as node, node.connect() as line:
        async with node.connect() as trainer:
            training = await Training(trainer, str(node.runs)).open()
            lease = await training.lease(size_for({"a.safetensors": a_tensor()}))
            checkpoint = new_id()
            training.write(lease, checkpoint, {"a.safetensors": a_tensor()}, step=5)
            lease.close()
        answer = await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
        assert answer["step"] == 5


async def test_a_save_that_can_never_be_admitted_is_given_up_once_and_its_memory_comes_back(short_dir):
    """Not tried again every half second for ever, and not held for ever."""
    async with daemon(short_dir, front=False) as node:
        async with node.connect() as trainer:
            training = await Training(trainer, str(node.runs)).open()
            lease = await training.lease(8 * 4096)
            training.write(lease, "not an id", {"a": b"x"})
            lease.close()
        await eventually(lambda: all(arena.use is Use.FREE for arena in node.parts.pool.all()))


async def test_a_save_whose_root_went_away_is_kept_and_tried_with_growing_pauses(short_dir, monkeypatch):
    async with daemon(short_dir, front=False) as node:
        tries: list[float] = []
        clock = StillClock()
        service = node.parts.service

        async def refuse(*_: object) -> None:
            tries.append(clock.monotonic_s())
            raise BadPath("under no configured root")

        async with node.connect() as trainer:
            training = await Training(trainer, str(node.runs)).open()
            lease = await training.lease(8 * 4096)
            training.write(lease, new_id(), {"a": b"x"})
            monkeypatch.setattr(node.parts.admission, "managed_root", refuse)
            monkeypatch.setattr(service, "_front", replace(service._front, clock=clock))
            lease.close()
        await eventually(lambda: tries)
        while len(tries) < 9:
            clock.pass_s(0.25)
            await service.reap()
        pauses_s = [later - earlier for earlier, later in itertools.pairwise(tries)]
        assert pauses_s == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
        assert [arena.use for arena in node.parts.pool.all()] == [Use.LEASED]


async def test_a_resumed_experiment_keeps_its_id_and_opens_a_segment(short_dir):
    """M119: two processes of one run share a segment; one that comes later opens the next."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        first = await Training(line, str(node.runs)).open()
        async with node.connect() as rank:
            second = await Training(rank, str(node.runs)).open()
        assert second.answer == {**second.answer, "experiment": first.experiment, "segment": 1, "existed": True}
        await line.ask("experiment.close", experiment=first.experiment, status="completed")
        third = await Training(line, str(node.runs)).open()
        assert third.answer["segment"] == 2
        with pytest.raises(BadRequest, match="exists"):
            await Training(line, str(node.runs)).open(resume="never")
        with pytest.raises(NotFound):
            await Training(line, str(node.runs), name="other").open(resume="must")


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a\nb", "x" * 129, "..", "\u202e"])
async def test_names_that_can_be_no_directory_are_refused(short_dir, name):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        with pytest.raises(CkptdError) as caught:
            await Training(line, str(node.runs), name=name).open()
        assert caught.value.code in {"bad_path", "bad_request"}


async def test_tags_beats_and_the_end_are_recorded(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open(tags=["a"])
        assert (await line.ask("experiment.tag", experiment=training.experiment, add=["b"], remove=["a"]))["tags"] == [
            "b"
        ]
        await line.ask("experiment.beat", experiment=training.experiment, step=12)
        await line.ask("experiment.close", experiment=training.experiment, status="failed", error="out of memory")
        row = await node.read(lambda conn: experiments.get(conn, training.experiment))
        assert (row.status, row.last_step, row.error["message"]) == (ExperimentStatus.FAILED, 12, "out of memory")


async def test_a_metric_can_be_read_soon_after_it_was_sent_with_no_save_and_no_flush_between(short_dir):
    """M111: the pause between two commits is what a reader waits for; it is far below a second."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        points = [["loss", 1, 0.5, 1.7e9], ["loss", 2, "NaN", 1.7e9]]
        await line.ask("metrics", experiment=training.experiment, points=points)
        assert node.parts.settings.catalog.metrics_flush_s < 0.5
        with anyio.fail_after(30):
            found: list[dict] = []
            while len(found) < 2:
                found = (await line.ask("metrics.tail", project="demo", name="run"))["points"]
        assert [(p["name"], p["step"], p["value"]) for p in found] == [("loss", 1, 0.5), ("loss", 2, "NaN")]
        rest = await line.ask("metrics.tail", experiment=training.experiment, after=found[-1]["id"])
        assert (rest["points"], rest["next"]) == ([], found[-1]["id"])


async def test_a_late_metric_changes_the_best_its_link_and_what_is_kept(short_dir):
    """M102, M106, M108: validation ends after the save, and after the pipeline was done with it."""
    rules = {"keep_last": 1, "keep_best": {"metric": "val_loss", "mode": "min"}, "trash_grace_s": 3600}
    async with daemon(short_dir, retention=rules) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        first = await training.saved(1, metrics={"val_loss": 0.5})
        second = await training.saved(2, metrics={"val_loss": 0.9})
        best = node.runs / "demo/run/best"
        await eventually(lambda: os.path.lexists(best) and os.readlink(best) == "step_0000000001")
        await line.ask("checkpoint.metrics", checkpoint=second, metrics={"val_loss": 0.1})
        await eventually(lambda: os.readlink(best) == "step_0000000002")
        assert (await line.ask("resolve", selector="best", project="demo", name="run"))["checkpoint"] == second

        async def retired() -> bool:
            return (await node.read(lambda conn: checkpoints.state_of(conn, first))) is State.TRASHED

        await eventually(retired)
        await eventually((node.runs / ".ckptd-trash" / first).is_dir)


async def test_replace_drops_the_oldest_staged_save_only(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        first, second = await training.save(9), await training.save(1)
        assert (await line.ask("replace", experiment=training.experiment))["replaced"] == first
        rows = await node.read(lambda conn: checkpoints.get_many(conn, [first, second]))
        assert (rows[first].state, rows[second].state) == (State.REPLACED, State.PENDING)
        assert (await line.push("level", checkpoint=first, state="replaced"))["error"] is None


async def test_a_checkpoint_id_of_another_user_is_not_taken_over(short_dir):
    """An arena with a foreign id in its descriptor must never be published as that checkpoint."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        checkpoint = await training.save(1)

        def steal(tx):
            from sqlalchemy import update

            from ckptd.catalog import schema

            return tx.conn.execute(update(schema.checkpoint).values(uid=4242))

        await node.write(steal)
        lease = await training.lease(16 * 4096)
        training.write(lease, checkpoint, {"model.safetensors": b"forged"})
        with pytest.raises(Exists):
            await line.ask("commit", **lease.names(), experiment=training.experiment, checkpoint=checkpoint)
        lease.close()


async def test_what_waits_for_memory_does_not_hold_up_the_connection(short_dir):
    """M016: a lease may wait a minute; beats and metrics go on."""
    async with daemon(short_dir, front=False, arenas={"bytes_max": 65536}) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        lease = await training.lease(65536)
        with open(f"/proc/self/fd/{lease.fd}", "r+b") as page:
            import mmap

            with mmap.mmap(page.fileno(), 4096) as view:
                control.set_state(view, control.WRITING)
        await line.send("lease", experiment=training.experiment, size_bytes=65536, wait_s=60.0)
        await eventually(lambda: node.parts.pool.waiting == 1)
        await line.ask("experiment.beat", experiment=training.experiment)
        assert node.parts.pool.waiting == 1, "the beat was answered while the lease waited"
        lease.close()


async def test_a_hundred_saves_of_many_trainers_lose_none_and_leak_nothing(short_dir):
    """M017: concurrent hand-offs, each exactly one verified row, no descriptor left."""
    async with daemon(short_dir) as node:
        before = None

        async def train(name: str) -> None:
            async with node.connect() as line:
                training = await Training(line, str(node.runs), name=name).open()
                for step in range(1, 6):
                    await training.saved(step)

        for turn in range(2):
            async with anyio.create_task_group() as group:
                for number in range(8):
                    group.start_soon(train, f"t{number}")
            await eventually(lambda: not node.parts.listener.peers)
            if turn == 0:
                before = open_fds()
        async with node.connect() as line:
            total = await line.ask("summary")
        assert (total["count"], total["valid"]) == (80, 80)
        assert before is not None
        await eventually(lambda: open_fds() <= before + 2)
