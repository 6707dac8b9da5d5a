"""Is the writer of a file done? Until then the job waits, and holds up nobody: its lane is its path.

What was found out goes on in memory only: a publish that fails, or a crash, begins here again.
"""

from dataclasses import replace
from typing import Any

from ckptd.catalog import checkpoints
from ckptd.catalog.tx import Tx
from ckptd.errors import BadPath
from ckptd.jobs import Job
from ckptd.pipeline.tools import Ended, Onward, Outcome, Tools
from ckptd.worker.protocol import IdentityRecord, Settle, Settlement

NEXT = "publish"


async def run(job: Job, tools: Tools) -> Outcome:
    """Ask the worker once. Settled: on to digesting. Not yet: again after the time it names."""
    known = job.payload
    settings = tools.settings().watching
    now_s = tools.clock.monotonic_s()
    # Monotonic times of another process mean nothing here, so the stillness starts anew with it.
    still_s = now_s - known["since_s"] if known.get("boot") == tools.jobs.boot and "since_s" in known else 0.0
    last = IdentityRecord(**known["last"]) if known.get("last") else None
    answer: Settlement = await tools.workers.call(
        Settle(
            root=known["root"],
            path=known["path"],
            quiet_s=known.get("quiet_s", settings.quiet_s),
            last=last,
            still_s=still_s if last is not None else 0.0,
            told=bool(known.get("told")),
            owner_uid=known.get("owner_uid"),
        )
    )
    if answer.settled:
        settled = {
            "reason": answer.reason,
            "identity": _plain(answer.identity),
            "format": answer.format,
            "step": answer.step,
            "epoch": answer.epoch,
            "metrics": answer.metrics,
        }
        return Onward(replace(job, stage=NEXT, payload={**known, "settled": settled}))
    if answer.reason == "gone":
        return await _gone(job, tools)
    if answer.reason.startswith("refused"):
        raise BadPath(f"{known['path']}: {answer.reason}", hint="ckptd takes plain files and directories in its roots")
    unchanged = last is not None and answer.identity == last
    waiting: dict[str, Any] = {
        **known,
        "boot": tools.jobs.boot,
        "last": _plain(answer.identity),
        "since_s": known["since_s"] if unchanged and "since_s" in known and still_s else now_s,
        "reason": answer.reason,
    }

    async def again(tx: Tx) -> None:
        # A writer may stop for an hour and then finish: that is found within one reconcile as well.
        await tools.jobs.postpone(tx, job, min(answer.retry_after_s, settings.reconcile_s), waiting)

    await tools.catalog.write(again)
    return Ended()


async def _gone(job: Job, tools: Tools) -> Outcome:
    async def gone(tx: Tx) -> None:
        await checkpoints.mark_missing(tx, job.checkpoint_id, "it vanished before it was complete")
        await tools.jobs.finish(tx, job)

    await tools.catalog.write(gone)
    return Ended()


def _plain(identity: IdentityRecord | None) -> dict[str, int] | None:
    if identity is None:
        return None
    return {
        "dev": identity.dev,
        "ino": identity.ino,
        "size_bytes": identity.size_bytes,
        "mtime_ns": identity.mtime_ns,
        "ctime_ns": identity.ctime_ns,
    }
