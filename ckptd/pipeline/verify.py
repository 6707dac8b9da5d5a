"""Read back what was published, past the page cache, and compare digests: the rung VERIFIED.

In the same transaction the best of each rule is decided again, so that no reader ever sees a
verified checkpoint whose best flag is still open, and nothing can retire a winner in between.
"""

from dataclasses import dataclass, replace

import structlog

from ckptd import failpoint
from ckptd.catalog import arrivals, checkpoints, roots
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError, SourceChanged
from ckptd.hooks.points import HookEvent
from ckptd.jobs import Job
from ckptd.model import Checkpoint, Damage, FileEntry, Identity, JobState, Origin, State
from ckptd.pipeline import asking
from ckptd.pipeline.tools import Ended, Fresh, Onward, Outcome, Tools
from ckptd.pipeline.winners import refresh_best
from ckptd.rules import Rules
from ckptd.worker.protocol import DamageRecord, FileRecord, Purge, Settle, Settlement, Verified, Verify

log = structlog.get_logger()

NEXT = "link"
REPAIR = "repair"
REPAIRS_MAX = 2  # times a damaged publish is written again from its arena
DAMAGED_MIB_MAX = 1000  # named of one file; a terabyte of noise must not become an event of megabytes
DAMAGE_MAX = 100  # files named
READABLE = frozenset({State.LIVE, State.CORRUPT, State.MISSING})


@dataclass(frozen=True, slots=True)
class Subject:
    """One checkpoint as it is to be read back."""

    checkpoint: Checkpoint
    files: tuple[FileEntry, ...]
    recorded: Identity | None
    manifest_sha256: str = ""  # "" where there is no manifest of ours


async def subject(tools: Tools, checkpoint_id: str) -> Subject:
    """Read everything that the catalog knows of one checkpoint's bytes. NotFound."""
    return Subject(*await tools.catalog.read(lambda conn: checkpoints.whole(conn, checkpoint_id)))


async def run(job: Job, tools: Tools) -> Outcome:
    """Verify one checkpoint. Damage while its arena still holds the bytes: written again to new inodes."""
    fresh: Fresh | None = job.fresh
    read = _just_digested(fresh) if fresh is not None else await subject(tools, job.checkpoint_id)
    if job.payload.get("repaired"):
        return await _clear(job, tools, read.checkpoint)
    if fresh is None and (read.checkpoint.state not in READABLE or not read.files):
        tools.sources.let_go(job.checkpoint_id)
        if job.payload.get("repairs"):  # retired since: what was moved aside goes all the same
            return await _clear(job, tools, read.checkpoint)
        await tools.catalog.write(lambda tx: tools.jobs.finish(tx, job))
        return Ended()
    if await _is_postponed(job, tools, read):
        return Ended()
    damage, seen = await read_back(tools, read)
    if damage:
        return await _damaged(job, tools, read, damage)
    rules = tools.settings().rules_for(read.checkpoint.project, read.checkpoint.experiment)

    async def record(tx: Tx) -> Job:
        if fresh is not None:
            await fresh.record(tx)
        await good(tx, read, seen, rules)
        if job.payload.get("repairs"):
            return await tools.jobs.advance(tx, job, job.stage, {**job.payload, "repaired": True})
        return await _onward(tx, job, tools, read.checkpoint)

    onward = await tools.catalog.write(record)
    failpoint.hit("verify.recorded")
    tools.sources.let_go(job.checkpoint_id)
    return Ended() if onward.state is JobState.DONE else Onward(onward)


async def _onward(tx: Tx, job: Job, tools: Tools, checkpoint: Checkpoint) -> Job:
    rules = tools.settings().rules_for(checkpoint.project, checkpoint.experiment)
    root = await roots.by_path(tx.conn, checkpoint.root)
    linked = rules.links and root is not None and root.may_link
    if linked or rules.deletes:
        return await tools.jobs.advance(tx, job, NEXT)
    await tools.jobs.finish(tx, job)  # of the stages that follow, none has anything to do
    return replace(job, state=JobState.DONE)


async def _clear(job: Job, tools: Tools, checkpoint: Checkpoint) -> Outcome:
    """Unlink what repairs moved aside, now that what they wrote is verified. Only this job knows of it: it is
    repeated until it is done, and then goes on.
    """
    async with tools.emptying[checkpoint.root]:
        for number in range(1, REPAIRS_MAX + 1):
            await tools.workers.call(Purge(root=checkpoint.root, trash=_evidence(checkpoint.id, number)))
    failpoint.hit("repair.cleared")
    onward = await tools.catalog.write(lambda tx: _onward(tx, job, tools, checkpoint))
    return Ended() if onward.state is JobState.DONE else Onward(onward)


async def _is_postponed(job: Job, tools: Tools, read: Subject) -> bool:
    """Ask hooks whether this is a time to read so much; a veto puts the job off, for a bounded time in all.

    What was digested and is not written down yet is written down first: durable is not for a hook to delay.
    """
    postponed = int(job.payload.get("postponed", 0))
    if postponed >= asking.VERIFY_POSTPONED_MAX:
        return False
    why = await asking.about(tools, HookEvent.BEFORE_INTEGRITY_CHECK, read.checkpoint, act=f"{job.id}-{job.claim}")
    if not why:
        return False

    async def later(tx: Tx) -> None:
        if job.fresh is not None:
            await job.fresh.record(tx)
        onward = await tools.jobs.advance(tx, job, "verify", {**job.payload, "postponed": postponed + 1})
        await tools.jobs.postpone(tx, onward, asking.VERIFY_AGAIN_S)

    await tools.catalog.write(later)
    log.info("verify.postponed", checkpoint=read.checkpoint.id, why=why)
    return True


def _just_digested(fresh: Fresh) -> Subject:
    return Subject(
        replace(fresh.checkpoint, path=fresh.durable.path, state=State.LIVE),
        tuple(fresh.durable.files),
        fresh.durable.identity,
    )


async def read_back(tools: Tools, read: Subject) -> tuple[list[Damage], Identity | None]:
    """Compare, and say which inode was read when the row may tell of another: after a repair, a restore or a rebuild.

    It is looked at before and after: a file that its writer puts there in between would be recorded as what was
    read, and never be found to be another one.
    SourceChanged  something else lies there than before
    """
    if read.checkpoint.state is State.LIVE:
        return await compare(tools, read), None
    try:
        before = await look(tools, read)
    except CkptdError:
        before = None  # a disk that can't read a header: comparing says what is wrong with it
    damage = await compare(tools, read)
    after = None if damage else await look(tools, read)
    if after is not None and (before is None or not before.means(after)):
        raise SourceChanged(f"{read.checkpoint.path} was replaced while it was read back", hint="verify it once more")
    return damage, after


async def compare(tools: Tools, read: Subject) -> list[Damage]:
    """Ask the worker to read a checkpoint back; return what is wrong with it, DAMAGE_MAX files at most."""
    answer: Verified = await tools.workers.call(
        Verify(
            root=read.checkpoint.root,
            path=read.checkpoint.path,
            files=[FileRecord(f.path, f.size_bytes, f.sha256, list(f.xxh3)) for f in read.files],
            manifest_sha256=read.manifest_sha256,
        )
    )
    return [_damage(record) for record in answer.damage[:DAMAGE_MAX]]


async def look(tools: Tools, read: Subject) -> Identity | None:
    """Ask which bytes lie at the path now; None when nothing does, or it can't be said."""
    row = read.checkpoint
    answer: Settlement = await tools.workers.call(Settle(root=row.root, path=row.path, quiet_s=0.0, told=True))
    seen = answer.identity
    return None if seen is None else Identity(seen.dev, seen.ino, seen.size_bytes, seen.mtime_ns, seen.ctime_ns)


async def good(tx: Tx, read: Subject, seen: Identity | None, rules: Rules) -> Checkpoint:
    """Record that every digest was equal, whatever was thought of the checkpoint before.

    seen  the inode that was read, when it may be another than the recorded one. What was retired
          meanwhile stays retired, and what another row took the place of stays missing.
    """
    row = read.checkpoint
    state = await checkpoints.state_of(tx.conn, row.id)
    if state not in READABLE or (state is State.MISSING and await _is_succeeded(tx, row)):
        return await checkpoints.get(tx.conn, row.id)
    found = seen or read.recorded
    if state is State.MISSING and found is not None:
        await checkpoints.mark_restored(tx, row.id, row.path, found)
    elif seen is not None and seen != read.recorded:
        await checkpoints.set_identity(tx, row.id, seen)
    verified = await checkpoints.mark_verified(tx, row.id)
    await refresh_best(tx, row, rules)
    return verified


async def _is_succeeded(tx: Tx, row: Checkpoint) -> bool:
    """Whether what lies at its path is another row's now, however equal its bytes: a rule that retired this one
    would remove the file of that one, pinned or not.
    """
    newest = (await arrivals.at_paths(tx.conn, [row.path])).get(row.path)
    return newest is not None and newest.id != row.id and newest.state in {State.PENDING, State.LIVE, State.CORRUPT}


async def bad(tx: Tx, read: Subject, damage: list[Damage], rules: Rules) -> Checkpoint:
    """Record damage, or that nothing is there any more. What was retired meanwhile stays retired."""
    row = await checkpoints.get(tx.conn, read.checkpoint.id)
    if row.state not in READABLE:
        return row
    if all(d.kind == "missing" for d in damage):
        after = await checkpoints.mark_missing(tx, row.id, "its files are gone")
    else:
        after = await checkpoints.mark_corrupt(tx, row.id, damage)
    await refresh_best(tx, row, rules)
    return after


async def is_overwritten(tools: Tools, read: Subject) -> bool:
    """Whether somebody else's file changed because its writer put another in its place: that is no damage."""
    if read.checkpoint.origin in {Origin.MEMORY, Origin.REBUILD} or read.recorded is None:
        return False
    try:
        seen = await look(tools, read)
    except CkptdError:
        return False
    return seen is not None and not read.recorded.means(seen)


async def _damaged(job: Job, tools: Tools, read: Subject, damage: list[Damage]) -> Outcome:
    """Say what is wrong; while an arena still holds the bytes, send the job to be written again."""
    checkpoint = read.checkpoint
    repairs = int(job.payload.get("repairs", 0))
    # At once, with nothing awaited since the damage was told: from here on nobody is lent this memory.
    kept = checkpoint.origin is Origin.MEMORY and tools.sources.keep(checkpoint.id)
    repairable = kept and repairs < REPAIRS_MAX and "descriptor" in job.payload
    overwritten = not repairable and await is_overwritten(tools, read)
    rules = tools.settings().rules_for(checkpoint.project, checkpoint.experiment)
    trash = _evidence(checkpoint.id, repairs + 1)

    async def record(tx: Tx) -> Job:
        if job.fresh is not None:
            await job.fresh.record(tx)
        state = await checkpoints.state_of(tx.conn, checkpoint.id)
        if overwritten and state in READABLE:
            await checkpoints.mark_missing(tx, checkpoint.id, "its writer put another file in its place")
            await refresh_best(tx, checkpoint, rules)
        else:
            await bad(tx, read, damage, rules)
        if repairable:
            return await tools.jobs.advance(tx, job, REPAIR, {**job.payload, "repairs": repairs + 1, "trash": trash})
        # The links must not lead here any more.
        return await tools.jobs.advance(tx, job, NEXT)

    onward = await tools.catalog.write(record)
    if not repairable:
        tools.sources.let_go(checkpoint.id)
    return Onward(onward)


def _evidence(checkpoint_id: str, number: int) -> str:
    """Name in the trash of what a repair moved aside; it goes when the repair is verified."""
    return f"repair-{checkpoint_id}-{number}"


def _damage(record: DamageRecord) -> Damage:
    mib = tuple(record.mib[:DAMAGED_MIB_MAX])
    detail = record.detail
    if len(record.mib) > len(mib):
        detail = f"{detail}; {len(record.mib)} MiB in all".lstrip("; ")
    return Damage(record.file, record.kind, detail, mib, tuple(record.tensors[:DAMAGED_MIB_MAX]))  # type: ignore[arg-type]
