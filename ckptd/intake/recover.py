"""After a start: what an earlier daemon, or trainers without one, left behind.

arena word COMMITTED, no row       admitted now                     (the daemon died before it could)
arena word COMMITTED, row PENDING  its job goes on                  (died before or in the publish)
arena word RELEASED                hot copy again                   (died after the publish)
the same, row CORRUPT or MISSING   kept until its repair has ended  (died in the repair)
arena word LEASED or WRITING       stays lent while its holder lives, else freed; of one nobody ever saw: forgotten
a reader's hold                    renewed while its process lives, else ended
spool image, spool offer           admitted now
row PENDING, bytes nowhere         its job finds that out and the checkpoint FAILS, visibly
"""

import os

import structlog

from ckptd.catalog import Catalog, checkpoints, readholds, roots
from ckptd.catalog.roots import NewRoot
from ckptd.catalog.tx import Tx
from ckptd.config import Settings
from ckptd.errors import CkptdError, Refused
from ckptd.intake import descriptor
from ckptd.intake.admit import Admission
from ckptd.intake.arenas import FD_PREFIX, Arena, ArenaPool, Use
from ckptd.intake.reconcile import Reconciler
from ckptd.intake.spooled import Spool
from ckptd.model import Level, State
from ckptd_client import control

log = structlog.get_logger()

_COPIED = {State.LIVE, State.CORRUPT, State.MISSING}  # of damage, too, the copy in memory is whole


def adopt(pool: ArenaPool, passed: list[tuple[str, int]]) -> list[Arena]:
    """Take the arenas out of the descriptors that the service manager passed; close and forget what is unknown."""
    adopted = []
    for name, fd in passed:
        arena = pool.adopt(name, fd)
        if arena is not None:
            adopted.append(arena)
        elif not name.startswith(FD_PREFIX):
            log.warning("fd.unknown", name=name)
    return adopted


async def recover(catalog: Catalog, admission: Admission, pool: ArenaPool, spool: Spool) -> int:
    """Admit and sort everything that was left; return how many saves were found in arenas and spool."""
    await _hold_on(catalog)
    found = 0
    for arena in pool.all():
        page = control.read(arena.page)
        raw = arena.descriptor()
        if page is None or raw is None:
            if arena.use is Use.LEASED:
                pool.take_back(arena)
        elif page.state == control.COMMITTED:
            # What can't be admitted now (a full disk) stays with the reaper, which tries again.
            await admission.rescue(arena)
            found += 1
        else:
            await _hot_again(catalog, pool, arena, raw)
    return found + await spool.take_in()


async def _hold_on(catalog: Catalog) -> None:
    """Before anything is retired: what living processes read stays, however long no daemon was there to renew it."""
    try:
        await catalog.write(readholds.look_after)
    except CkptdError as error:
        log.warning("hold.not_looked_after", cause=error.code, **error.to_wire())  # the reaper tries again


async def _hot_again(catalog: Catalog, pool: ArenaPool, arena: Arena, raw: bytes) -> None:
    try:
        saved = descriptor.decode(raw, arena.size_bytes)
    except Refused as error:
        # Only a copy of what is on disk already: nothing is lost with it.
        log.warning("arena.refused", arena=arena.id.hex(), **error.to_wire())
        pool.free(arena)
        return
    rows = await catalog.read(lambda conn: checkpoints.get_many(conn, [saved.checkpoint]))
    row = rows.get(saved.checkpoint)
    if row is None or row.state not in _COPIED or row.level.rank < Level.DURABLE.rank:
        pool.free(arena)
        return
    arena.use = Use.HOT
    arena.experiment_id, arena.checkpoint_id = row.experiment_id, row.id
    if row.state is not State.LIVE:  # its repair goes on, if it has one; else upkeep lets go of it
        arena.kept_for = row.id


async def enter_roots(catalog: Catalog, reconciler: Reconciler, settings: Settings) -> None:
    """Bring the configured roots into the catalog, and have every known one looked after."""
    configured = [
        NewRoot(
            path=str(root.path),
            kind=root.kind,
            uid=os.getuid(),
            project=root.project,
            allow_delete=root.allow_delete,
            allow_links=root.allow_links,
        )
        for root in settings.roots
    ]

    async def ensure(tx: Tx) -> None:
        for new in configured:
            await roots.ensure(tx, new)

    if configured:
        await catalog.write(ensure)
    for known in await catalog.read(roots.all_roots):
        reconciler.add(known)
