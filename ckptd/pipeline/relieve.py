"""Budgets of roots and projects, and the free-space floor: what is spare goes, and nothing else ever does.

Below the floor `disk.relief` comes first, an event in the log, before anything is touched; one tells of every root
with that floor on that mount. (`disk.low` is another matter: the alarm of [alerts].) Then, in this
order and only until there is room again: what lies in the trash already, the oldest first, whatever is
left of its grace; then checkpoints that no rule and no promise holds (retention/shed.py has the order),
which are unlinked at once. Over a budget they go to the trash as usual. When only protected ones are
left nothing more is deleted, and the alarm says so. What the brake holds (retention/brake.py) is protected
by nothing else, so it goes as well, after everything else that may (docs/decisions/0010).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import anyio.to_thread
import structlog

from ckptd import failpoint, retention
from ckptd.catalog import figures, roots
from ckptd.catalog.roots import Root
from ckptd.catalog.tombstones import under_root
from ckptd.catalog.tx import Tx
from ckptd.config import Settings
from ckptd.errors import CkptdError
from ckptd.model import ExperimentStatus, RootKind
from ckptd.pipeline import retain, trash
from ckptd.pipeline.tools import Tools
from ckptd.retention import Spare
from ckptd.rules import Rules
from ckptd.worker import mounts
from ckptd.worker.protocol import Usage, Used

log = structlog.get_logger()

TOLD_AGAIN_S = 3600.0  # an alarm that lasts is told once an hour


@dataclass(frozen=True, slots=True)
class Relief:
    """What one look has done about one root or project: bytes that were asked for, and those that went."""

    what: str
    wanted_bytes: int
    freed_bytes: int


async def run(tools: Tools) -> list[Relief]:
    """Look at every root and project that has a limit, and make room where one is passed."""
    settings = tools.settings()
    found = []
    known = await tools.catalog.read(roots.all_roots)
    for root in known:
        if root.kind is not RootKind.SUBMITTED:
            found += await _root(tools, settings, root, known)
    if settings.retention.project_bytes_max or any(one.project_bytes_max for one in settings.experiments):
        found += await _projects(tools, settings)
    return found


async def _root(tools: Tools, settings: Settings, root: Root, known: Sequence[Root]) -> list[Relief]:
    floor_bytes, bytes_max = settings.disk_limits(root.path)
    done = []
    if floor_bytes:
        try:
            used: Used = await tools.workers.call(Usage(root=root.path))
        except CkptdError as error:
            log.debug("space.unknown", root=root.path, **error.to_wire())
        else:
            if used.free_bytes < floor_bytes:
                await _tell(tools, settings, known, (root, used, floor_bytes))
                done.append(await _below_floor(tools, root, used, floor_bytes))
            elif tools.low.told_s:
                mount = mounts.find(root.path, await anyio.to_thread.run_sync(mounts.read)).point
                tools.low.told_s.pop((mount, floor_bytes), None)
                tools.low.held_s.pop(root.path, None)
    if bytes_max:
        _, on_disk = await tools.catalog.read(lambda conn: figures.on_disk(conn, root_id=root.id))
        if on_disk > bytes_max:
            spare = await _spare(tools, await tools.catalog.read(lambda conn: figures.under(conn, root.id)), root.path)
            why = f"over the budget of {root.path}, {bytes_max} bytes, and nothing holds it"
            done.append(await _shed(tools, spare, on_disk - bytes_max, why))
    return done


async def _projects(tools: Tools, settings: Settings) -> list[Relief]:
    done = []
    for project, experiments, on_disk in await tools.catalog.read(figures.by_project):
        limits = [settings.rules_for(project, name).project_bytes_max for _, name in experiments]
        limit = min((each for each in limits if each), default=0)
        if limit and on_disk > limit:
            rows = [(experiment_id, project, name) for experiment_id, name in experiments]
            why = f"over the budget of project {project}, {limit} bytes, and nothing holds it"
            done.append(await _shed(tools, await _spare(tools, rows), on_disk - limit, why))
    return done


async def _below_floor(tools: Tools, root: Root, used: Used, floor_bytes: int) -> Relief:
    wanted = floor_bytes - used.free_bytes
    failpoint.hit("space.alarmed")
    freed = 0
    for one, size_bytes in await tools.catalog.read(lambda conn: under_root(conn, root.id)):
        if freed >= wanted:
            break
        if await trash.unlink(tools, [one], 1):
            freed += size_bytes
    if freed < wanted:
        spare = await _spare(tools, await tools.catalog.read(lambda conn: figures.under(conn, root.id)), root.path)
        why = f"{root.path} has {used.free_bytes} bytes free, below its floor of {floor_bytes}, and nothing holds it"
        done = await _shed(tools, spare, wanted - freed, why)
        freed += done.freed_bytes
        gone = [one for one, _ in await tools.catalog.read(lambda conn: under_root(conn, root.id))]
        if done.freed_bytes:
            await trash.unlink(tools, gone, len(gone))
    if freed < wanted:
        _say_held(tools, root, free_bytes=used.free_bytes, floor_bytes=floor_bytes, freed_bytes=freed)
    return Relief(root.path, wanted, freed)


def _say_held(tools: Tools, root: Root, **sizes: int) -> None:
    """Log that only protected checkpoints are left on a root: once an hour, for a look comes every few seconds."""
    now_s = tools.clock.monotonic_s()
    if now_s - tools.low.held_s.get(root.path, -TOLD_AGAIN_S) < TOLD_AGAIN_S:
        return
    tools.low.held_s[root.path] = now_s
    log.error("disk.held", root=root.path, **sizes, why="what is left is protected: nothing more is deleted")


async def _tell(tools: Tools, settings: Settings, known: Sequence[Root], low: tuple[Root, Used, int]) -> None:
    """Tell that room is made on a mount, once an hour for each floor on it. Emits disk.relief."""
    root, used, floor_bytes = low
    table = await anyio.to_thread.run_sync(mounts.read)
    mount = mounts.find(root.path, table).point
    now_s = tools.clock.monotonic_s()
    told_s = tools.low.told_s.get((mount, floor_bytes))
    if told_s is not None and now_s - told_s < TOLD_AGAIN_S:
        return
    alike = [one for one in known if one.kind is not RootKind.SUBMITTED]
    alike = [one for one in alike if settings.disk_limits(one.path)[0] == floor_bytes]
    data = {
        "mount": mount,
        "filesystem": used.filesystem,
        "roots": sorted(one.path for one in alike if mounts.find(one.path, table).point == mount),
        "free_bytes": used.free_bytes,
        "floor_bytes": floor_bytes,
    }

    async def tell(tx: Tx) -> None:
        tx.tell("disk.relief", data)

    await tools.catalog.write(tell)
    tools.low.told_s[mount, floor_bytes] = now_s


async def _spare(
    tools: Tools, experiments: Sequence[tuple[str, str, str]], root: str | None = None
) -> list[tuple[Spare, str, Rules]]:
    """Find what no rule and no promise holds, with the experiment and the rules that say so."""
    running = await tools.catalog.read(
        lambda conn: figures.in_status(conn, [one for one, _, _ in experiments], ExperimentStatus.RUNNING)
    )
    found = []
    for experiment_id, project, name in experiments:
        rules = tools.settings().rules_for(project, name)
        decided = await retain.plan(tools, experiment_id, rules)
        is_running = experiment_id in running
        spare = [Spare(each.checkpoint, is_running) for each in decided.keep if each.spare]
        if retention.brake(decided, rules) is not None:  # what it drops would be gone by now
            spare += [Spare(each.checkpoint, is_running, is_braked=True) for each in decided.drop]
        found += [(one, experiment_id, rules) for one in spare if root in {None, one.checkpoint.root}]
    return found


async def _shed(tools: Tools, spare: Sequence[tuple[Spare, str, Rules]], excess_bytes: int, why: str) -> Relief:
    """Retire the least of what is spare, experiment by experiment, each under its own plan."""
    of = {one.checkpoint.id: (experiment_id, rules) for one, experiment_id, rules in spare}
    taken = retention.shed([one for one, _, _ in spare], excess_bytes)
    by_experiment: defaultdict[str, list[str]] = defaultdict(list)
    for one in taken:
        by_experiment[of[one.checkpoint.id][0]].append(one.checkpoint.id)
    freed = 0
    for experiment_id, ids in by_experiment.items():
        gone = await retain.retire_spare(tools, experiment_id, of[ids[0]][1], ids, why)
        freed += sum(row.size_bytes for row in gone)
    if taken:
        log.info("space.shed", wanted_bytes=excess_bytes, freed_bytes=freed, checkpoints=len(taken), why=why)
    return Relief(why, excess_bytes, freed)
