"""What the pipeline does beside its jobs: carry out tombstones, empty the trash, watch budgets and free space."""

import anyio
import structlog

from ckptd.clock import to_tick_s
from ckptd.errors import CkptdError
from ckptd.pipeline import braking, relieve, strip, trash
from ckptd.pipeline.tools import Tools

log = structlog.get_logger()

MOVE_S = 10.0  # between two looks at what could not be moved
MOVE_AGAIN_S = 0.05  # between two rounds of a plan that strips many: saves go first
PURGE_S = 30.0
PURGE_AGAIN_S = 1.0  # between two rounds of a full trash; the first pause before what was put off is tried again
SPACE_S_MIN = 1.0  # between two looks at budgets, however often saves ask for one


async def run(tools: Tools) -> None:
    """Work until cancelled. Errors of one round are logged, and the next round tries again."""
    async with anyio.create_task_group() as group:
        group.start_soon(braking.recall, tools)
        for task in (_move, _purge, _watch_space):
            group.start_soon(task, tools)


async def _move(tools: Tools) -> None:
    """Carry out what a plan left over, what an earlier daemon left, and what could not be done at the first try."""
    nothing_at: int | None = None  # the catalog's edition when there was nothing to do: at rest nobody reads
    rung = True
    while True:
        full = False
        edition = tools.catalog.edition()
        try:
            if rung or edition is None or edition != nothing_at:
                moved, stripped = await trash.resume(tools), await strip.resume(tools)
                full = stripped >= strip.STRIPS_MAX
                nothing_at = edition if moved == stripped == 0 else None
        except CkptdError as error:
            log.warning("trash.failed", **error.to_wire())
        if full:
            await anyio.sleep(MOVE_AGAIN_S)
        else:
            rung = await tools.trashed.heard(to_tick_s(MOVE_S))


async def _purge(tools: Tools) -> None:
    """Empty the trash now and then; soon again, with growing pauses, while something of it was put off."""
    again_s = PURGE_AGAIN_S
    while True:
        purged = 0
        try:
            purged = await trash.purge(tools)
        except CkptdError as error:
            log.warning("purge.failed", **error.to_wire())
        if tools.delayed:
            await anyio.sleep(again_s)
            again_s = min(again_s * 2, PURGE_S)
        else:
            await anyio.sleep(PURGE_AGAIN_S if purged >= trash.PURGES_MAX else PURGE_S)
            again_s = PURGE_AGAIN_S


async def _watch_space(tools: Tools) -> None:
    """Look on a timer, after saves, and when a disk was full."""
    while True:
        try:
            await relieve.run(tools)
        except CkptdError as error:
            log.warning("space.not_watched", **error.to_wire())
        await anyio.sleep(SPACE_S_MIN)
        await tools.space.heard(tools.settings().disk.look_s)
