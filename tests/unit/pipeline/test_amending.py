"""What is said after the manifest was written follows to the disk, into late.json beside it."""

import json
from pathlib import Path

import anyio
import pytest

from ckptd import pipeline
from ckptd.catalog import checkpoints, queue
from ckptd.errors import WorkerLost
from ckptd.worker.protocol import Publish
from tests.support.in_process import Training, daemon, eventually


async def late_metrics(node, checkpoint: str) -> dict | None:
    """What a rebuild would know: the manifest's metrics and those beside it."""
    row = await node.read(lambda conn: checkpoints.get(conn, checkpoint))
    late = Path(row.path) / "late.json"
    beside = json.loads(late.read_text())["metrics"] if row.path and late.exists() else {}
    return {**json.loads((Path(row.path) / "manifest.json").read_text())["metrics"], **beside}


@pytest.mark.parametrize("moment", ["while it is published", "between the publish and its note", "once verified"])
async def test_a_metric_said_at_any_moment_follows_to_the_disk(short_dir, monkeypatch, moment):
    """I5: the catalog may be lost, and what was said after the manifest was made with it."""
    said = {"val_loss": 0.5}
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        call = node.parts.workers.call

        async def wrapped(request, **more):
            if isinstance(request, Publish) and moment == "while it is published":
                await node.parts.admission.late_metrics(request.manifest["checkpoint"], said)
            answer = await call(request, **more)
            if isinstance(request, Publish) and moment == "between the publish and its note":
                await node.parts.admission.late_metrics(request.manifest["checkpoint"], said)
            return answer

        monkeypatch.setattr(node.parts.workers, "call", wrapped)
        one = await training.saved(1, metrics={"loss": 1.0})
        if moment == "once verified":
            await line.ask("checkpoint.metrics", checkpoint=one, metrics=said)

        async def there() -> bool:
            return await late_metrics(node, one) == {"loss": 1.0, "val_loss": 0.5}

        await eventually(there)


async def test_a_publish_found_done_after_a_crash_gets_what_was_said_since(short_dir, monkeypatch):
    """The manifest was written by an earlier try, before the metric was known."""
    async with daemon(short_dir) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        real, dies = checkpoints.mark_durable, [True]

        async def crash(*arguments):
            if dies:
                dies.pop()
                raise WorkerLost("the daemon dies between the publish and its note")
            return await real(*arguments)

        monkeypatch.setattr(checkpoints, "mark_durable", crash)
        one = await training.save(1)
        await eventually(lambda: not dies)
        await node.parts.admission.late_metrics(one, {"val_loss": 0.5})
        await line.push("level", checkpoint=one, level="verified")
        assert json.loads((node.runs / "demo/run/step_0000000001/manifest.json").read_text())["metrics"] == {}

        async def there() -> bool:
            return await late_metrics(node, one) == {"val_loss": 0.5}

        await eventually(there)


async def test_a_flood_of_late_metrics_waits_as_one_job_and_holds_up_no_other_job(short_dir, monkeypatch):
    gate, written = anyio.Event(), []
    real = pipeline.STAGES["amend"]

    async def held(job, tools):
        written.append(job.id)
        await gate.wait()
        return await real(job, tools)

    monkeypatch.setitem(pipeline.STAGES, "amend", held)
    async with daemon(short_dir) as node, node.connect() as line:
        one = await (await Training(line, str(node.runs)).open()).saved(1)
        for number in range(20):
            await line.ask("checkpoint.metrics", checkpoint=one, metrics={"val_loss": float(number)})
        await eventually(lambda: written)
        await node.parts.admission.recheck(await node.read(lambda conn: checkpoints.get(conn, one)))
        own = await node.read(lambda conn: queue.of_checkpoint(conn, one))
        assert own is None or own.stage != "amend", "a job beside stands for nothing, and hides nothing"

        async def only_amends() -> bool:
            return {job.stage for job in await node.parts.jobs.unfinished()} == {"amend"}

        await eventually(only_amends)
        gate.set()

        async def there() -> bool:
            return (await late_metrics(node, one)).get("val_loss") == 19.0

        await eventually(there)
        assert len(written) <= 2
