"""The loop around the stages: what is tried again, what ends, and what nothing may end (handoff.md)."""

import os
from pathlib import Path

import anyio
import pytest

from ckptd import daemon as composition
from ckptd import pipeline
from ckptd.catalog import checkpoints
from ckptd.errors import (
    BadPath,
    Bug,
    Corrupt,
    Denied,
    DiskFault,
    Exists,
    Missing,
    NoSpace,
    NotFound,
    RootDegraded,
    TimedOut,
)
from ckptd.model import State, new_id
from ckptd.pipeline import publish
from ckptd.pipeline.tools import Outcome
from tests.support.in_process import Training, a_tensor, daemon, eventually


def failing(monkeypatch, stage: str, *errors: Exception) -> list[Exception]:
    """Let a stage fail with each of the errors, then work; return what is left of them."""
    real, left = pipeline.STAGES[stage], list(errors)

    async def run(job, tools) -> Outcome:
        if left:
            raise left.pop(0)
        return await real(job, tools)

    monkeypatch.setitem(pipeline.STAGES, stage, run)
    return left


@pytest.mark.parametrize(
    "error", [NoSpace("full"), DiskFault("EIO"), RootDegraded("hangs"), TimedOut("slow")], ids=lambda e: e.code
)
async def test_what_a_disk_does_never_ends_an_acknowledged_save(short_dir, monkeypatch, error):
    """Its bytes are in the arena, and are written when the disk takes them: retries_max tries and far beyond."""
    failing(monkeypatch, "publish", *[error] * 5)
    async with daemon(short_dir, jobs={"retries_max": 2, "backoff_s_max": 0.1}) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).save(1)
        assert (await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30))["state"] == "live"


async def test_doctor_and_status_name_a_save_that_goes_on_failing_until_it_is_written(short_dir, monkeypatch):
    """It is never parked: "jobs ok, 1 queued" was all that anybody was told."""
    denied = Denied("uid 7 may not make /runs/x", hint="let uid 7 write to /runs")
    left = failing(monkeypatch, "publish", *[NoSpace("full")] * 2, *[denied] * 10_000)
    async with daemon(short_dir, jobs={"retries_max": 2, "backoff_s_max": 0.1}) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).save(1)

        async def named() -> bool:
            (found,) = [check for check in (await line.ask("doctor"))["checks"] if check["name"] == "jobs"]
            return (found["status"], found["detail"]) == (
                "warn",
                f"1 failing again and again ({checkpoint[:12]} in publish: uid 7 may not make /runs/x)",
            ) and found["hint"].startswith("let uid 7 write to /runs; ")

        await eventually(named)

        await node.parts.troubles.pulse._beat()
        degraded = (await line.ask("status"))["daemon"]["degraded"]
        assert [trouble["what"] for trouble in degraded if "may not make /runs/x" in trouble["why"]] == ["jobs"]
        left.clear()
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
        (found,) = [check for check in (await line.ask("doctor"))["checks"] if check["name"] == "jobs"]
        assert found["status"] == "ok"


OUTSIDE = [
    Missing("somebody removed the directory"),
    BadPath("a symlink"),
    Exists("taken"),
    Corrupt("cut"),
    NotFound("x"),
]


@pytest.mark.parametrize("error", OUTSIDE, ids=lambda e: e.code)
async def test_nothing_from_outside_ends_an_acknowledged_save_whose_bytes_are_there(short_dir, monkeypatch, error):
    """M022. It passes, and one more try is all that it takes."""
    left = failing(monkeypatch, "publish", error, error)
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).save(1)
        assert (await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30))["state"] == "live"
        assert left == []


async def test_a_save_that_nothing_lets_through_is_kept_told_spooled_at_a_stop_and_tried_by_the_next_daemon(
    short_dir, monkeypatch
):
    """Parked, with its bytes; another save of the experiment does not wait for it."""
    monkeypatch.setattr(pipeline, "PARKED_FIRST_S", 0.1)
    failing(monkeypatch, "publish", *[BadPath("a symlink lies on the way")] * 3)
    async with daemon(short_dir, jobs={"retries_max": 2}) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        checkpoint = await training.save(1)

        async def parked() -> bool:
            return (await line.ask("status"))["jobs"]["parked"] == 1

        await eventually(parked)
        assert (await node.read(lambda conn: checkpoints.state_of(conn, checkpoint))) is State.PENDING
        assert [check["status"] for check in (await line.ask("doctor"))["checks"] if check["name"] == "jobs"] == [
            "warn"
        ]
        assert composition._undone(node.parts)
        await composition._spill(node.parts)
        assert [path.name for path in (short_dir / "state/spool").iterdir()] == [f"{checkpoint}.arena"]
    async with daemon(short_dir) as node, node.connect() as line:  # and the memory is gone
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)
        await eventually(lambda: not list((short_dir / "state/spool").iterdir()))


async def test_a_refusal_ends_a_file_visibly(short_dir, monkeypatch):
    failing(monkeypatch, "publish", BadPath("a symlink lies on the way"))
    async with daemon(short_dir) as node, node.connect() as line:
        path = short_dir / "mine/a.safetensors"
        path.parent.mkdir()
        path.write_bytes(a_tensor())
        one = (await line.ask("submit", path=str(path), checkpoint=new_id()))["checkpoint"]
        answer = await line.ask("wait", checkpoint=one, level="durable", timeout_s=30)
        assert (answer["state"], answer["error"]["code"]) == ("failed", "bad_path")


async def test_a_hundred_strange_directories_in_the_way_of_a_step_end_no_save(short_dir, monkeypatch):
    """Somebody moves one away, and it is written."""
    monkeypatch.setattr(publish, "COLLISIONS_MAX", 1)
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        taken = node.runs / "demo/run/step_0000000001"
        taken.mkdir(parents=True)
        checkpoint = await training.save(1)

        async def refused() -> bool:
            jobs = await node.parts.jobs.unfinished()
            return any((job.error or {}).get("code") == "exists" for job in jobs)

        await eventually(refused)
        taken.rmdir()
        assert (await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30))["state"] == "live"


async def test_a_defect_of_ours_never_ends_a_hand_off_its_bytes_wait_for_a_better_daemon(short_dir, monkeypatch):
    failing(monkeypatch, "publish", ZeroDivisionError("oops"))
    async with daemon(short_dir) as node, node.connect() as line:
        checkpoint = await (await Training(line, str(node.runs)).open()).save(1)

        async def parked() -> bool:
            return (await line.ask("status"))["jobs"]["parked"] == 1

        await eventually(parked)
        assert (await node.read(lambda conn: checkpoints.state_of(conn, checkpoint))) is State.PENDING
        assert await node.parts.jobs.try_parked() == 1
        await line.ask("wait", checkpoint=checkpoint, level="verified", timeout_s=30)


async def test_one_checkpoint_that_meets_a_defect_stops_no_other(short_dir, monkeypatch):
    failing(monkeypatch, "verify", Bug("oops"))
    async with daemon(short_dir) as node, node.connect() as line:
        first = await (await Training(line, str(node.runs), name="a").open()).save(1)
        await line.push("level", checkpoint=first, level="durable")
        await (await Training(line, str(node.runs), name="b").open()).saved(1)


async def test_a_catalog_that_refuses_claims_for_a_while_ends_nothing(short_dir, monkeypatch):
    """A full disk under the catalog must not take the daemon, and all staged saves, with it."""
    monkeypatch.setattr(pipeline, "CLAIM_AGAIN_S", 0.05)
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        claim, left = node.parts.jobs.claim, [NoSpace("full")] * 3

        async def refuse(limit=1):
            if left:
                raise left.pop()
            return await claim(limit)

        monkeypatch.setattr(node.parts.jobs, "claim", refuse)
        await training.saved(1)
        assert left == []


async def test_a_failure_that_can_not_be_recorded_is_carried_on_when_the_lease_ends(short_dir, monkeypatch):
    failing(monkeypatch, "verify", DiskFault("EIO"))
    async with daemon(short_dir) as node, node.connect() as line:
        record, left = node.parts.pipeline._record_failure, [NoSpace("full")]

        async def refuse(*given, **more):
            if left:
                raise left.pop()
            return await record(*given, **more)

        monkeypatch.setattr(node.parts.pipeline, "_record_failure", refuse)
        one = await (await Training(line, str(node.runs)).open()).save(1)
        await eventually(lambda: not left)
        jobs = node.parts.jobs
        jobs._leases_s = dict.fromkeys(jobs._leases_s, 0.0)  # its end comes
        jobs._wake()
        await line.push("level", checkpoint=one, level="verified")


async def test_a_lease_that_can_not_be_renewed_once_does_not_abort_the_stage(short_dir, monkeypatch):
    monkeypatch.setattr(pipeline, "RENEW_SHARE", 6000)  # of the ten minutes that a lease has: ten times a second
    async with daemon(short_dir) as node, node.connect() as line:
        real, runs, renewed = pipeline.STAGES["verify"], [], anyio.Event()

        async def slow(job, tools):
            runs.append(job.id)
            await renewed.wait()
            return await real(job, tools)

        renew, left = node.parts.jobs.renew, [NoSpace("full")]

        async def refuse(job):
            if left and runs:
                raise left.pop()
            found = await renew(job)
            if runs:
                renewed.set()
            return found

        monkeypatch.setitem(pipeline.STAGES, "verify", slow)
        monkeypatch.setattr(node.parts.jobs, "renew", refuse)
        await (await Training(line, str(node.runs)).open()).saved(1)
        assert (left, len(runs)) == ([], 1)


async def test_the_next_save_is_written_while_the_one_before_is_read_back(short_dir, monkeypatch):
    """M208: stages in order for one checkpoint; the memory of the next does not wait for a read-back."""
    gate = anyio.Event()
    real = pipeline.STAGES["verify"]

    async def held(job, tools):
        await gate.wait()
        return await real(job, tools)

    monkeypatch.setitem(pipeline.STAGES, "verify", held)
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        ids = [await training.save(step) for step in (1, 2, 3)]
        for one in ids:
            await line.push("level", checkpoint=one, level="durable")
        gate.set()
        verified = [(await line.push("level", level="verified"))["checkpoint"] for _ in ids]
        assert verified == ids


async def test_each_stage_runs_once_and_in_order(short_dir, monkeypatch):
    """M208, M023: one traced save shows every stage once."""
    trace: list[str] = []
    for name, real in dict(pipeline.STAGES).items():

        async def traced(job, tools, name=name, real=real):
            trace.append(name)
            return await real(job, tools)

        monkeypatch.setitem(pipeline.STAGES, name, traced)
    async with daemon(short_dir) as node, node.connect() as line:
        await (await Training(line, str(node.runs)).open()).saved(1)
        await eventually(lambda: trace[-1:] == ["retain"])
        assert trace == ["publish", "verify", "link", "retain"]
        trace.clear()
        path = short_dir / "single" / "a.safetensors"
        path.parent.mkdir()
        path.write_bytes(a_tensor())
        one = (await line.ask("submit", path=str(path), checkpoint=new_id()))["checkpoint"]
        await line.ask("wait", checkpoint=one, level="verified", timeout_s=30)
        assert trace == ["settle", "publish", "verify"], "where no link and no rule applies, nothing more is asked"


async def test_no_transaction_ever_asks_a_worker(short_dir, monkeypatch):
    """A transaction that waited for a disk would stop every trainer's commit."""
    from ckptd.catalog.writer import Writer

    async with daemon(short_dir, retention={"keep_last": 1}) as node, node.connect() as line:
        inside = 0
        run, call = Writer._run, node.parts.workers.call

        async def counted(self, *given):
            nonlocal inside
            inside += 1
            try:
                await run(self, *given)
            finally:
                inside -= 1

        asked = []

        async def watched(request, **more):
            import traceback

            asked.append(any("writer.py" in frame.filename for frame in traceback.extract_stack()))
            return await call(request, **more)

        monkeypatch.setattr(Writer, "_run", counted)
        monkeypatch.setattr(node.parts.workers, "call", watched)
        training = await Training(line, str(node.runs)).open()
        for step in range(1, 4):
            await training.saved(step)
        assert asked
        assert not any(asked)


async def test_descriptors_of_images_are_closed_whatever_a_stage_does(short_dir, monkeypatch):
    from tests.support.in_process import open_fds

    failing(monkeypatch, "verify", *[TimedOut("slow")] * 3)
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await training.saved(1)
        before = open_fds()
        call, left = node.parts.workers.call, [NoSpace("full")] * 4

        async def flaky(request, **more):
            if left:
                raise left.pop()
            return await call(request, **more)

        monkeypatch.setattr(node.parts.workers, "call", flaky)
        await training.saved(2)
        # One more arena: its memfd, its control page, the store's copy. A thread of the catalog may have one in hand.
        with anyio.fail_after(30):
            while open_fds() > before + 3:
                await anyio.sleep(0.05)
        assert Path(node.runs / "demo/run/step_0000000002").is_dir()
        assert os.path.exists(node.runs / "demo/run/latest")
