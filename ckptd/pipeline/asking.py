"""Hooks are asked before an act. What a veto does is decided here and in docs/decisions/0006, nowhere else.

    before_save     it is published all the same, as durable as any, and is neither latest nor best
    before_verify   read back later, VERIFY_POSTPONED_MAX times; a person who asks is told why not
    before_delete   it stays, and whoever asked for it is told why
    before_apply    nothing of the plan is carried out this time
    before_load     the reader gets an error, never another checkpoint

An act waits for all its hooks together at most hooks_defaults.ask_s_max; then it goes on as if nobody
had been asked. Only an explicit veto counts: an error, a timeout or a dead hook is none.
"""

from collections.abc import Sequence
from typing import Any

import anyio
import structlog

from ckptd.hooks.context import Context
from ckptd.hooks.points import HookEvent
from ckptd.model import Checkpoint, new_id
from ckptd.pipeline.telling import bounded, question
from ckptd.pipeline.tools import Tools

log = structlog.get_logger()

VERIFY_AGAIN_S = 30.0
VERIFY_POSTPONED_MAX = 120  # an hour in all: VERIFIED is a promise, and a hook can't withhold it for ever
NAMED_MAX = 1000  # checkpoints of a plan that a hook is told of; the count is of all


async def about(tools: Tools, point: HookEvent, row: Checkpoint, *, act: str = "", **more: Any) -> str:
    """Ask before an act on one checkpoint; return why it must not be, "" when it may. Never raises.

    act  names this very act where it can come again (a job's number), so that a repeat has the same key
    """
    if tools.ask is None:
        return ""
    return await _bounded(tools, question(point, f"{point}-{row.id}-{act or new_id()}", row, more))


async def about_plan(tools: Tools, experiment_id: str, rows: Sequence[Checkpoint]) -> str:
    """Ask before a plan retires these checkpoints of one experiment; return why it must not, "" when it may. Never raises."""
    if tools.ask is None or not rows:
        return ""
    data = {
        "project": rows[0].project,
        "name": rows[0].experiment,
        "checkpoints": [{"checkpoint": row.id, "step": row.step, "path": row.path} for row in rows[:NAMED_MAX]],
        "size_bytes": sum(row.size_bytes for row in rows),
        "why": f"no rule keeps these {len(rows)}",
    }
    point = HookEvent.BEFORE_RETENTION
    context = Context(point, f"{point}-{experiment_id}-{new_id()}", tools.clock.now(), experiment_id, "", data)
    return await _bounded(tools, bounded(context))


async def about_each(tools: Tools, rows: Sequence[Checkpoint], why: str) -> dict[str, str]:
    """Ask before each of these is retired; return the reasons of those that must stay, by id. Never raises.

    All of them together have hooks_defaults.ask_s_max; what there was no time to ask about stays until the next time.
    """
    if tools.ask is None:
        return {}
    end_s = tools.clock.monotonic_s() + tools.settings().hooks_defaults.ask_s_max
    kept: dict[str, str] = {}
    for row in rows:
        if tools.clock.monotonic_s() >= end_s:
            kept[row.id] = "hooks were not asked yet: there was no time for all"
            continue
        objection = await about(tools, HookEvent.BEFORE_CHECKPOINT_DELETE, row, why=why)
        if objection:
            kept[row.id] = objection
    return kept


async def _bounded(tools: Tools, context: Context) -> str:
    limit_s = tools.settings().hooks_defaults.ask_s_max
    if tools.ask is None:
        return ""
    try:
        with anyio.move_on_after(limit_s):
            return (await tools.ask(context)).why
    except Exception:
        # Hooks are other people's code: a defect in how they are run must not be what stops a checkpoint.
        log.exception("hooks.not_asked", cause=context.event, checkpoint=context.checkpoint_id)
        return ""
    log.warning("hooks.slow", cause=context.event, checkpoint=context.checkpoint_id, waited_s=limit_s)
    return ""
