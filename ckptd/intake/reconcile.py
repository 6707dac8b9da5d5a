"""Truth about what lies under the roots: scans compared with the catalog.

Events of a watcher are hints: they may be late, lost or swallowed by a full queue, and cost time
then, never a checkpoint. Each root is scanned when it is opened, when a hint names a directory,
and on a timer whatever the hints said. Scans run in the root's I/O worker; a hung mount holds up
its own root only.
"""

import os
from dataclasses import dataclass, field

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from ckptd.catalog import Catalog, checkpoints, listing, roots
from ckptd.catalog.roots import Root
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.config import Watching
from ckptd.errors import CkptdError
from ckptd.intake.admit import Admission
from ckptd.jobs import Jobs, NewJob
from ckptd.model import Checkpoint, RootKind, State
from ckptd.pipeline.verify import refresh_best
from ckptd.worker import Workers, mounts
from ckptd.worker.protocol import Candidate, Hints, Scan, Sweep, Watch

log = structlog.get_logger()

RETRY_S, RETRY_S_MAX = 1.0, 60.0
DIRECTORIES_MAX = 256  # more hinted directories than this: one scan of the whole root is cheaper
BATCH_MAX = 250


@dataclass(eq=False)
class _Watched:
    root: Root
    directories: set[str] = field(default_factory=set)
    everything: bool = True
    hinted: anyio.Event = field(default_factory=anyio.Event)
    scanning: bool = False
    problem: str = ""


@dataclass
class Reconciled:
    """What one scan found."""

    found: int = 0
    added: int = 0
    known: int = 0
    damaged: int = 0
    missing: int = 0
    problem: str = ""


class Reconciler:
    """Keeps the catalog true to the disks."""

    def __init__(self, catalog: Catalog, workers: Workers, admission: Admission, jobs: Jobs, clock: Clock) -> None:
        """No root yet: `add()` brings them, before and while `run()` runs."""
        self._catalog = catalog
        self._workers = workers
        self._admission = admission
        self._jobs = jobs
        self._clock = clock
        self._roots: dict[str, _Watched] = {}
        self._group: anyio.abc.TaskGroup | None = None

    @property
    def _settings(self) -> Watching:
        return self._admission.settings().watching

    def add(self, root: Root) -> None:
        """Look after one more root."""
        known = self._roots.get(root.path)
        if known is not None:
            known.root = root
            return
        watched = _Watched(root)
        self._roots[root.path] = watched
        if self._group is not None:
            self._group.start_soon(self._look_after, watched)

    def state_of(self, path: str) -> tuple[bool, str]:
        """Whether a root is being scanned, and what is wrong with it."""
        watched = self._roots.get(path)
        return (watched.scanning, watched.problem) if watched is not None else (False, "")

    async def run(self) -> None:
        """Look after every root until cancelled."""
        async with anyio.create_task_group() as group:
            self._group = group
            for watched in self._roots.values():
                group.start_soon(self._look_after, watched)
            await anyio.sleep_forever()

    async def _look_after(self, watched: _Watched) -> None:
        if watched.root.kind is RootKind.SUBMITTED:
            return
        async with anyio.create_task_group() as group:
            if watched.root.kind is RootKind.WATCHED:
                group.start_soon(self._listen, watched)
            pause_s = RETRY_S
            while True:
                try:
                    await self._scan_hinted(watched)
                    watched.problem, pause_s = "", RETRY_S
                except CkptdError as error:
                    watched.problem = error.message
                    log.warning("reconcile.failed", root=watched.root.path, **error.to_wire())
                    await anyio.sleep(pause_s)
                    pause_s = min(pause_s * 2, RETRY_S_MAX)
                    watched.everything = True
                    continue
                with anyio.move_on_after(await self._interval_s(watched.root)) as timer:
                    await watched.hinted.wait()
                watched.everything = watched.everything or timer.cancelled_caught
                watched.hinted = anyio.Event()

    async def _interval_s(self, root: Root) -> float:
        remote = mounts.find(root.path, await anyio.to_thread.run_sync(mounts.read)).remote
        return self._settings.reconcile_remote_s if remote else self._settings.reconcile_s

    async def _listen(self, watched: _Watched) -> None:
        """Collect hints; a watcher that ends is started again and everything is scanned once more."""
        pause_s = RETRY_S
        while True:
            try:
                async with self._workers.parts(Watch(root=watched.root.path)) as parts:
                    async for part in parts:
                        pause_s = RETRY_S
                        self._hint(watched, part)
            except CkptdError as error:
                log.warning("watch.failed", root=watched.root.path, **error.to_wire())
            watched.everything = True
            watched.hinted.set()
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_S_MAX)

    def _hint(self, watched: _Watched, hints: Hints) -> None:
        watched.directories.update(hints.directories)
        if hints.lost or len(watched.directories) > DIRECTORIES_MAX:
            watched.everything = True
            watched.directories.clear()
        watched.hinted.set()

    async def _scan_hinted(self, watched: _Watched) -> None:
        directories, watched.directories = watched.directories, set()
        everything, watched.everything = watched.everything, False
        watched.scanning = True
        try:
            if everything:
                await self.scan(watched.root)
                return
            for directory in sorted(directories):
                if not any(directory != above and directory.startswith(above + "/") for above in directories):
                    await self._scan_under(watched.root, directory)
        finally:
            watched.scanning = False

    async def scan(self, root: Root) -> Reconciled:
        """Compare everything under one root with the catalog."""
        result = Reconciled()
        unseen: dict[str, str] = {}

        cursor: int | None = 0
        while cursor is not None:
            page, cursor = await self._catalog.read(lambda conn, at=cursor: listing.known(conn, root.id, after=at))  # type: ignore[misc]
            unseen.update({k.path: k.checkpoint_id for k in page if k.state in {State.LIVE, State.CORRUPT}})
        try:
            complete = await self._take(root, "", result, unseen)
        except CkptdError as error:
            if error.code in {"not_found", "missing"} and not unseen:
                return result  # a root nobody has written to yet
            raise  # never "all its checkpoints are missing": a disk that is not mounted looks just like this
        if complete:
            await self._missing(root, unseen, result)
        await self._catalog.write(lambda tx: roots.mark_reconciled(tx, root.id))
        log.info(
            "reconcile.done",
            root=root.path,
            found=result.found,
            added=result.added,
            missing=result.missing,
            problem=result.problem,
        )
        return result

    async def _scan_under(self, root: Root, directory: str) -> None:
        below = os.path.relpath(directory, root.path)  # noqa: ASYNC240 - text only
        await self._take(root, "" if below == "." else below, Reconciled(), {})

    async def _take(self, root: Root, under: str, result: Reconciled, unseen: dict[str, str]) -> bool:
        """Scan and take in what is new; strike what was seen from `unseen`. Returns whether the scan was complete."""
        managed = root.kind is RootKind.MANAGED
        request = Scan(root=root.path, managed=managed, under=under, entries_max=self._settings.entries_max)
        others = [path for path, w in self._roots.items() if path != root.path and w.root.kind is RootKind.MANAGED]
        async with self._workers.parts(request) as parts:
            async for part in parts:
                found = [c for c in part.found if managed or not _inside(c.path, others)]
                result.found += len(found)
                for candidate in found:
                    unseen.pop(candidate.path, None)
                for start in range(0, len(found), BATCH_MAX):
                    await self._enter(root, found[start : start + BATCH_MAX], result)
            scanned = parts.reply
        result.problem = scanned.problem
        return bool(scanned.complete)

    async def _enter(self, root: Root, found: list[Candidate], result: Reconciled) -> None:
        if root.kind is RootKind.MANAGED:
            for candidate in found:
                added = await self._admission.manifest(root, candidate)
                result.added += int(added)
                result.known += int(not added and candidate.manifest is not None)
                result.damaged += int(candidate.manifest is None)
            return
        new = await self._admission.candidates(root, found)
        result.added += new
        result.known += len(found) - new

    async def _missing(self, root: Root, unseen: dict[str, str], result: Reconciled) -> None:
        """Mark what a complete scan did not see. Rows that changed since are looked at again, not marked."""
        gone = list(unseen.items())
        for start in range(0, len(gone), BATCH_MAX):
            some = gone[start : start + BATCH_MAX]

            async def mark(tx: Tx, some: list[tuple[str, str]] = some) -> int:
                rows = await checkpoints.get_many(tx.conn, [checkpoint_id for _, checkpoint_id in some])
                marked = []
                for path, checkpoint_id in some:
                    row = rows.get(checkpoint_id)
                    if row is not None and row.path == path and row.state in {State.LIVE, State.CORRUPT}:
                        await checkpoints.mark_missing(tx, checkpoint_id, f"a scan of {root.path} did not find it")
                        marked.append(row)
                await self._decide_again(tx, marked)
                return len(marked)

            result.missing += await self._catalog.write(mark)

    async def _decide_again(self, tx: Tx, gone: list[Checkpoint]) -> None:
        """What was the best or the newest may be among what is gone: flags now, links and rules by a job."""
        for row in {row.experiment_id: row for row in gone}.values():
            rules = self._admission.settings().rules_for(row.project, row.experiment)
            await refresh_best(tx, row.experiment_id, rules)
            lane = f"{row.experiment_id}/after"
            await self._jobs.enqueue(tx, NewJob(checkpoint_id=row.id, lane=lane, stage="link"))

    async def sweep(self, older_s: float) -> None:
        """Remove our own temporary directories that no running job can own any more."""
        keep = [job.checkpoint_id for job in await self._jobs.unfinished()]
        for watched in tuple(self._roots.values()):
            if watched.root.kind is RootKind.MANAGED:
                await self._workers.call(Sweep(root=watched.root.path, older_s=older_s, keep=keep))


def _inside(path: str, roots_of_ours: list[str]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots_of_ours)
