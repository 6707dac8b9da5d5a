"""After a restart: every word in every arena means what it meant before."""

import anyio

from ckptd import pipeline
from ckptd.catalog import checkpoints
from ckptd.errors import NoSpace
from ckptd.intake.arenas import Use
from ckptd.model import State, new_id
from tests.support.in_process import Keeper, Training, a_tensor, daemon, eventually, open_fds, size_for


async def test_a_commit_the_daemon_never_heard_of_is_admitted_by_the_next(short_dir):
    """M021: H2, the daemon died between the trainer's word and the catalog's row."""
    keeper = Keeper()
    checkpoint = new_id()
    async with daemon(short_dir, keeper, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        lease = await training.lease(size_for({"a.safetensors": a_tensor()}))
        training.write(lease, checkpoint, {"a.safetensors": a_tensor()}, step=1)
        lease.close()
    async with daemon(short_dir, keeper) as node, node.connect() as line:
        assert (await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30))["step"] == 1
    keeper.close()


async def test_a_staged_save_is_published_by_the_next_daemon_and_then_hot(short_dir):
    keeper = Keeper()
    async with daemon(short_dir, keeper, front=False) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).save(1)
    async with daemon(short_dir, keeper) as node, node.connect() as line:
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
        assert [arena.use for arena in node.parts.pool.all()] == [Use.HOT]
    async with daemon(short_dir, keeper, front=False) as node, node.connect() as line:
        arena = node.parts.pool.of_checkpoint(checkpoint)
        assert arena is not None
        assert arena.use is Use.HOT
        assert (await line.ask("attach", selector=checkpoint))["hot"]
    keeper.close()


async def test_a_lease_of_a_living_trainer_outlives_the_daemon_and_can_still_be_committed(short_dir):
    keeper = Keeper()
    async with daemon(short_dir, keeper, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        lease = await training.lease(size_for({"a.safetensors": a_tensor()}))
    async with daemon(short_dir, keeper) as node, node.connect() as line:
        training.line = line
        checkpoint = new_id()
        training.write(lease, checkpoint, {"a.safetensors": a_tensor()}, step=2)
        await line.ask("commit", **lease.names(), experiment=training.experiment, checkpoint=checkpoint)
        await line.push("level", checkpoint=checkpoint, level="verified")
        lease.close()
    keeper.close()


async def test_a_full_disk_at_start_costs_no_acknowledged_save(short_dir, monkeypatch):
    """The arena is kept, not freed, and admitted as soon as the catalog takes rows again."""
    keeper = Keeper()
    checkpoint = new_id()
    async with daemon(short_dir, keeper, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        lease = await training.lease(size_for({"a.safetensors": a_tensor()}))
        training.write(lease, checkpoint, {"a.safetensors": a_tensor()}, step=1)
        lease.close()
    from ckptd.intake.admit import Admission

    memory = Admission.memory

    async def full(*_, **__):
        raise NoSpace("full")

    monkeypatch.setattr(Admission, "memory", full)
    async with daemon(short_dir, keeper) as node, node.connect() as line:
        assert [arena.use for arena in node.parts.pool.all()] == [Use.LEASED]
        monkeypatch.setattr(Admission, "memory", memory)
        assert (await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30))["step"] == 1
    keeper.close()


async def test_a_save_whose_memory_is_gone_fails_visibly(short_dir):
    """After a reboot: STAGED survives processes, not the machine."""
    keeper = Keeper()
    async with daemon(short_dir, keeper, front=False) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).save(1)
    keeper.close()
    async with daemon(short_dir) as node, node.connect() as line:
        answer = await line.ask("wait", checkpoint=checkpoint, level="durable", timeout_s=30)
        assert answer["state"] == "failed"
        assert "memory" in answer["error"]["message"]


async def test_a_job_that_took_the_daemon_down_again_and_again_still_has_its_bytes_and_one_more_try(
    short_dir, monkeypatch
):
    """A hand-off must never be stranded: PENDING for ever, with its arena held."""
    keeper = Keeper()
    async with daemon(short_dir, keeper, front=False) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).save(1)
    for _ in range(3):
        async with daemon(short_dir, keeper, front=False, jobs={"retries_max": 1}) as node:
            await node.parts.jobs.claim(1)  # and then the daemon ends without a word
    async with daemon(short_dir, keeper, front=False, jobs={"retries_max": 1}) as node, node.connect() as line:
        assert (await line.ask("status"))["jobs"]["parked"] == 1
        [check] = [c for c in (await line.ask("doctor"))["checks"] if c["name"] == "jobs"]
        assert check["status"] == "warn"
        assert checkpoint[:12] in check["detail"]
        assert (await node.read(lambda conn: checkpoints.state_of(conn, checkpoint))) is State.PENDING
    monkeypatch.setattr(pipeline, "PARKED_FIRST_S", 0.2)
    async with daemon(short_dir, keeper, jobs={"retries_max": 1}) as node, node.connect() as line:
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
    keeper.close()


async def test_restarts_leak_no_descriptor(short_dir):
    keeper = Keeper()
    counts = []
    for step in range(1, 5):
        async with daemon(short_dir, keeper) as node, node.connect() as line:
            await (await Training(line, str(node.runs)).open()).saved(step)
        counts.append(open_fds() - len(keeper.kept))
    await eventually(lambda: open_fds() - len(keeper.kept) <= counts[1])  # a thread may have some in hand
    assert len(keeper.kept) <= 2
    keeper.close()


async def test_a_drain_that_is_cut_short_costs_its_jobs_no_try(short_dir, monkeypatch):
    """A clean stop is no crash: nine restarts must not park a job."""
    monkeypatch.setattr(pipeline, "LAST_WORD_S", 60.0)
    async with daemon(short_dir) as node, node.connect() as line:
        started = anyio.Event()

        async def hang(*_, **__):
            started.set()
            await anyio.sleep_forever()

        node.parts.workers.call = hang  # type: ignore[method-assign]
        await (await Training(line, str(node.runs)).open()).save(1)
        await started.wait()
    async with daemon(short_dir, front=False) as node:
        [job] = await node.parts.jobs.unfinished()
        assert (str(job.state), job.attempts) == ("queued", 0)
