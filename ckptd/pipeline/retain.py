"""Retire what no rule, hold or promise keeps: plan, ask, write tombstones; pipeline/trash.py moves the files.

The plan is made from one view of the catalog. Its tombstones are written some at a time, so that ten
thousand of them hold up no save, and each batch looks again whether the plan still stands: so a pin, a
lease or a late metric either comes before the tombstone and counts, or after it and finds the
checkpoint in the trash, from where it can be restored. Then the rename, then nothing until the grace
has passed; then the note that the unlink begins, the unlink, and the last note. A crash between any two
leaves a row that trash.resume() carries on from: a tombstone whose files still stand under their name,
or a purge to be repeated.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import anyio
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd import failpoint, retention
from ckptd.catalog import audits, bests, burials, checkpoints, holds, listing, queue
from ckptd.catalog.tx import Tx
from ckptd.errors import Busy, Changed, Held, NotFound
from ckptd.jobs import Job, NewJob
from ckptd.model import Checkpoint, JobState, State
from ckptd.pipeline import asking, braking, strip, trash
from ckptd.pipeline.history import History, planned, read, still_holds
from ckptd.pipeline.tools import Ended, Outcome, Tools
from ckptd.retention import Dropped, Kept, Plan
from ckptd.rules import Rules

log = structlog.get_logger()

TOMBSTONES_MAX = 20  # in one transaction: some ten milliseconds, for which no save can be recorded
REST_TIMES = 4.0  # as long as a transaction took, its wait for others included, none of ours follows: saves go first
REST_S_MAX = 1.0
MOVES_MAX = 16  # renames before a job goes on to the next save; the rest follow beside it
TRIES_MAX = 8  # plans made for one call, each because what the one before was made from had changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How far an apply may go.

    only    the ids that a person saw and agreed to: what the plan drops or strips beside them stays
    digest  of the plan that a person saw; another one is Changed, and nothing is done
    linked  where links lead: a metric that came since they were placed must not leave one dangling, so
            these stay until the links have followed
    by_itself  nobody asked for it: the brake may hold it (pipeline/braking.py)
    at_once  how many, the oldest, are retired now; a job beside carries on with the rest (pipeline/rest.py), so that
            no save waits behind it
    past    of these, the oldest, hooks were asked already, and objected
    """

    only: Sequence[str] | None = None
    digest: str | None = None
    linked: Sequence[str] = ()
    by_itself: bool = False
    at_once: int | None = None
    past: int = 0

    def narrowed(self, decided: Plan) -> tuple[Plan, bool]:
        """Leave out of a plan what it may not do, and say whether `at_once` left something out.

        What is left out of `drop` is in neither list.
        """

        def may(one: Checkpoint) -> bool:
            return one.id not in self.linked and (self.only is None or one.id in self.only)

        drop = [each for each in decided.drop if may(each.checkpoint)]
        drop = drop[: max(0, len(drop) - self.past)]
        first = 0 if self.at_once is None else max(0, len(drop) - self.at_once)
        strip = tuple(one for one in decided.strip if may(one))
        return replace(decided, drop=tuple(drop[first:]), strip=strip), first > 0


ANYTHING = Wanted()


@dataclass(frozen=True, slots=True)
class Carried:
    """What an apply did: the plan with the drops and strips that were done, how many of those it tried hooks
    objected to, and whether the plan holds more than it was to do at once.
    """

    plan: Plan
    objected: int
    leaves: bool


async def run(job: Job, tools: Tools) -> Outcome:
    """Apply the rules of the job's experiment; the last stage of every job."""

    async def look(conn: AsyncConnection) -> tuple[Checkpoint, bool]:
        row = await checkpoints.get(conn, job.checkpoint_id)
        return row, await _has_rest(conn, row.experiment_id)

    checkpoint, has_rest = await tools.catalog.read(look)
    rules = tools.settings().rules_for(checkpoint.project, checkpoint.experiment)
    # A rest of this experiment on its way, or one that follows it, sees to what this save makes spare.
    leaves = rules.deletes and has_rest
    if not rules.deletes:
        braking.forget(tools, checkpoint.experiment_id)
    elif not leaves:
        wanted = Wanted(linked=tuple(job.payload.get("linked", ())), by_itself=True, at_once=TOMBSTONES_MAX)
        leaves = (await carry_out(tools, checkpoint.experiment_id, rules, wanted)).leaves
    tools.space.ring()

    async def end(tx: Tx) -> None:
        if leaves:
            lane = rest_lane(checkpoint.experiment_id)
            # Not behind thousands of files: until it has run no save of this experiment makes a plan.
            await tools.jobs.enqueue_aside(tx, NewJob(checkpoint_id=checkpoint.id, lane=lane, stage="rest"))
        await tools.jobs.finish(tx, job)

    await tools.catalog.write(end)
    return Ended()


def rest_lane(experiment_id: str) -> str:
    """Name the lane where what jobs leave over of an experiment's plans is carried out."""
    return f"{experiment_id}/rest"


async def _has_rest(conn: AsyncConnection, experiment_id: str) -> bool:
    return any(job.state is not JobState.PARKED for job in await queue.in_lane(conn, rest_lane(experiment_id)))


async def plan(tools: Tools, experiment_id: str, rules: Rules) -> Plan:
    """Plan for one experiment from what the catalog says now; changes nothing."""
    return await planned(await _read(tools, experiment_id, rules), rules)


async def apply(tools: Tools, experiment_id: str, rules: Rules, wanted: Wanted = ANYTHING) -> Plan:
    """Plan and carry it out. Returns the plan with the drops and strips that were done; see carry_out."""
    return (await carry_out(tools, experiment_id, rules, wanted)).plan


async def carry_out(tools: Tools, experiment_id: str, rules: Rules, wanted: Wanted) -> Carried:
    """Plan and carry it out.

    Changed  the plan is another one than `wanted.digest` names
    Busy     the experiment changed faster than it could be planned for; what was done stays done

    What can't be moved now (a hung disk) is moved by trash.resume(), and holds up nothing else. A plan that
    the brake holds is not carried out, nor is any hook asked about it.
    """
    await tools.catalog.follow_clock()
    history = await _read(tools, experiment_id, rules)
    decided = await planned(history, rules)
    if wanted.digest is not None and retention.digest([decided]) != wanted.digest:
        raise Changed(
            "the plan is another one now than the one that was named", hint="look at it again, and name that one"
        )
    if wanted.by_itself and await braking.stops(tools, experiment_id, decided, rules):
        return Carried(Plan(decided.keep, ()), 0, leaves=False)
    narrowed, leaves = wanted.narrowed(decided)
    allowed = await _allowed(tools, experiment_id, narrowed)
    if allowed.drop:
        failpoint.hit("retain.planned")
    done = await _bury(tools, history, rules, list(allowed.drop))
    if done:
        failpoint.hit("retain.tombstone")
        for each in done[:MOVES_MAX]:
            await trash.try_to_move(tools, each.checkpoint)
        if len(done) > MOVES_MAX:
            tools.trashed.ring()
        await _tell(tools, experiment_id, decided, done)
    stripped = await strip.begin_all(tools, allowed.strip, rules)
    if not wanted.by_itself:
        await braking.look_again(tools, [experiment_id])
    return Carried(Plan(allowed.keep, tuple(done), stripped), len(narrowed.drop) - len(allowed.drop), leaves)


async def retire_spare(
    tools: Tools, experiment_id: str, rules: Rules, ids: Sequence[str], why: str
) -> list[Checkpoint]:
    """Retire those of `ids` that nothing holds in a plan made now: something wants their room. Returns which went."""
    await tools.catalog.follow_clock()
    history = await _read(tools, experiment_id, rules)
    decided = await planned(history, rules)
    free = [each.checkpoint for each in decided.keep if each.spare] + [each.checkpoint for each in decided.drop]
    wanted = tuple(Dropped(row, why) for row in free if row.id in ids)
    allowed = await _allowed(tools, experiment_id, Plan((), wanted))
    done = await _bury(tools, history, rules, list(allowed.drop))
    for each in done:
        await trash.try_to_move(tools, each.checkpoint)
    if done:
        await _tell(tools, experiment_id, decided, done)
    return [each.checkpoint for each in done]


async def _read(tools: Tools, experiment_id: str, rules: Rules) -> History:
    return await tools.catalog.read(lambda conn: read(conn, tools.clock, experiment_id, rules))


async def _allowed(tools: Tools, experiment_id: str, decided: Plan) -> Plan:
    """Keep what hooks object to, with what they say as the reason."""
    rows = [each.checkpoint for each in decided.drop]
    if not rows:
        return decided
    objection = await asking.about_plan(tools, experiment_id, rows)
    if objection:
        log.warning("retention.vetoed", experiment=experiment_id, drops=len(rows), why=objection)
        stays = dict.fromkeys((row.id for row in rows), objection)
    else:
        stays = await asking.about_each(tools, rows, "no rule keeps it")
    kept = (Kept(row, (stays[row.id],)) for row in rows if row.id in stays)
    drop = tuple(each for each in decided.drop if each.checkpoint.id not in stays)
    return replace(decided, keep=(*decided.keep, *kept), drop=drop)


async def _bury(tools: Tools, history: History, rules: Rules, drops: list[Dropped]) -> list[Dropped]:
    """Write tombstones, the oldest first, TOMBSTONES_MAX in a transaction; return those that were written.

    Where the plan does not stand any more it is made again, and of the first one's drops those go on that
    the new one drops as well: nothing goes that was not agreed to at the beginning.
    """
    left = drops[::-1]
    done: list[Dropped] = []
    buried = 0
    for _ in range(TRIES_MAX):
        while left:
            batch = left[:TOMBSTONES_MAX]
            async with _turn(tools, is_last=len(left) <= TOMBSTONES_MAX):
                stands = await _bury_some(tools, history, rules, batch, buried)
            if not stands:
                break
            done += batch
            buried += len(batch)
            left = left[TOMBSTONES_MAX:]
        if not left or tools.settings().rules_for(*_names(drops)) != rules:
            return done
        history, buried = await _read(tools, history.experiment_id, rules), 0
        again = await planned(history, rules)
        free = {one.checkpoint.id for one in again.drop} | {one.checkpoint.id for one in again.keep if one.spare}
        still = {each.checkpoint.id: each for each in left if each.checkpoint.id in free}
        left = [still[each.checkpoint.id] for each in left if each.checkpoint.id in still]
    if left and not done:
        raise Busy(f"the experiment changed {TRIES_MAX} times while it was planned for", retry_after_s=1.0)
    return done


def _names(drops: Sequence[Dropped]) -> tuple[str, str]:
    return drops[0].checkpoint.project, drops[0].checkpoint.experiment


@asynccontextmanager
async def _turn(tools: Tools, *, is_last: bool) -> AsyncIterator[None]:
    """One transaction of a large plan at a time, and a rest after it. A small plan, and the end of one, waits for nobody."""
    if is_last:
        yield
        return
    async with tools.burying:
        begun_s = tools.clock.monotonic_s()
        yield
        await anyio.sleep(min(REST_TIMES * (tools.clock.monotonic_s() - begun_s), REST_S_MAX))


async def _bury_some(tools: Tools, history: History, rules: Rules, batch: Sequence[Dropped], buried: int) -> bool:
    async def tombstones(tx: Tx) -> bool:
        if not await still_holds(tx, history, rules, [each.checkpoint for each in batch], buried):
            return False
        await burials.bury(tx, {each.checkpoint.id: each.why for each in batch})
        return True

    return await tools.catalog.write(tombstones)


async def _tell(tools: Tools, experiment_id: str, decided: Plan, done: Sequence[Dropped]) -> None:
    rows = [each.checkpoint for each in done]
    data = {
        "project": rows[0].project,
        "name": rows[0].experiment,
        "retired": len(rows),
        "kept": len(decided.keep),
        "size_bytes": sum(row.size_bytes for row in rows),
        "checkpoints": [row.id for row in rows[: asking.NAMED_MAX]],
    }

    async def tell(tx: Tx) -> None:
        tx.tell("retention.applied", data, experiment=experiment_id)

    await tools.catalog.write(tell)


async def remove(tools: Tools, checkpoint: Checkpoint, uid: int, pid: int) -> None:
    """Move one checkpoint to the trash because a person said so. Held names what forbids it.

    Changed  it is in another state than `checkpoint` says: it was read back meanwhile
    """

    async def tombstone(tx: Tx) -> None:
        why = await kept_by(tx, checkpoint)
        if why:
            raise Held(f"checkpoint {checkpoint.id} is kept: {', '.join(why)}", holds=why)
        state = await checkpoints.state_of(tx.conn, checkpoint.id)
        if state is not checkpoint.state:
            raise Changed(f"checkpoint {checkpoint.id} is {state} now, not {checkpoint.state}: nothing was done")
        await checkpoints.mark_trashed(tx, checkpoint.id, checkpoint.id, f"removed by uid {uid}")
        await audits.record(tx, audits.Deed(uid=uid, pid=pid, verb="remove", subject=checkpoint.id))

    await tools.catalog.write(tombstone)
    failpoint.hit("retain.tombstone")
    await trash.try_to_move(tools, checkpoint)


async def kept_by(tx: Tx, checkpoint: Checkpoint) -> list[str]:
    """Promises that hold a checkpoint whatever the rules say (design 2.3), as reasons.

    NotFound  nothing of it is on disk: it is on its way, gone, or retired already
    """
    state = (await checkpoints.get(tx.conn, checkpoint.id)).state
    if state not in {State.LIVE, State.CORRUPT}:
        raise NotFound(f"checkpoint {checkpoint.id} is {state}: there is nothing to remove")
    why = [f"{hold.kind} of {hold.by}" for hold in await holds.of_checkpoint(tx.conn, checkpoint.id, tx.clock.now())]
    why += [winner.words for winner in await bests.of_checkpoints(tx.conn, [checkpoint.id])]
    newest = await listing.latest(tx.conn, checkpoint.experiment_id)
    if newest is not None and newest.id == checkpoint.id:
        why.append("newest verified of its experiment")
    elif newest is None and checkpoint.is_whole and await listing.newest_whole(tx.conn, checkpoint) == checkpoint.id:
        why.append("the newest that is whole, although a hook objects: there is no better one")
    return why
