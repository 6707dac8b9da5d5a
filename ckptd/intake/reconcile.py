"""Truth about what lies under the roots: scans compared with the catalog.

Events of a watcher are hints: they may be late, lost or swallowed by a full queue, and cost time
then, never a checkpoint. Each root is scanned when it is opened, when a hint names a directory,
and on a timer whatever the hints said. Scans run in the root's I/O worker; a hung mount holds up
its own root only.
"""

import heapq
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from ckptd.catalog import Catalog, arrivals, checkpoints, queue, roots
from ckptd.catalog.roots import Root
from ckptd.catalog.tx import Tx
from ckptd.config import Settings, Watching
from ckptd.errors import CkptdError, RootDegraded
from ckptd.intake.files import Files
from ckptd.intake.standing import Standing, of_root
from ckptd.model import RootKind, State
from ckptd.worker import Workers, mounts
from ckptd.worker.protocol import Hints, RootMark, Scan, Scanned, Sweep, Watch

log = structlog.get_logger()

RETRY_S, RETRY_S_MAX = 1.0, 60.0
RESTS = 600  # lengths of a scan between two scans of a root whose events are all seen: a sixth of a per cent of a core
REST_S_MAX = 2.0  # between two scans of a root, so that hints cost at most half of a worker's time
DIRECTORIES_MAX = 256  # more hinted directories than this: one scan of the whole root is cheaper
BATCH_MAX = 250
COPIES_NAMED_MAX = 3  # of a tree that somebody copied as a whole; the others are counted
SAME_MAX = 16  # doublings
OPEN_S = 10.0  # how long a run that opens waits until what lies in its directory is known


@dataclass(frozen=True)
class Copies:
    """Directories that name a checkpoint which lies elsewhere: how many, and the first COPIES_NAMED_MAX."""

    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass(eq=False)
class _Watched:
    root: Root
    directories: set[str] = field(default_factory=set)
    everything: bool = True
    hinted: anyio.Event = field(default_factory=anyio.Event)
    scanning: bool = False
    problem: str = ""
    unseen: str = ""  # why its changes make no events
    seen: bool = False  # all its changes make events now, as far as its watcher knows
    took_s: float = 0.0  # the last scan of all of it
    looked: bool = False  # at all of it, since this daemon started
    same: int = 0  # so many scans of all of it, one after the other, found what the catalog knew
    copies: Copies = field(default_factory=Copies)


@dataclass
class Reconciled:
    """What one scan found."""

    found: int = 0
    added: int = 0
    known: int = 0
    damaged: int = 0
    missing: int = 0
    problem: str = ""
    copies: dict[str, int] = field(default_factory=dict)  # as Taken has them
    mark: RootMark = field(default_factory=RootMark)  # what the root is known by, if that was looked at


class Reconciler:
    """Keeps the catalog true to the disks."""

    def __init__(self, catalog: Catalog, workers: Workers, files: Files, settings: Callable[[], Settings]) -> None:
        """No root yet: `add()` brings them, before and while `run()` runs."""
        self._catalog = catalog
        self._workers = workers
        self._files = files
        self._all_settings = settings
        self._roots: dict[str, _Watched] = {}
        self._group: anyio.abc.TaskGroup | None = None
        workers.marks.remember = self._remember

    @property
    def _settings(self) -> Watching:
        return self._all_settings().watching

    async def _remember(self, path: str, mark: RootMark) -> None:
        await self._catalog.write(lambda tx: roots.remember_mark(tx, path, mark.id, mark.device))

    def add(self, root: Root) -> None:
        """Look after one more root. Nothing is changed under a managed one that is not what it was.

        The directory of a single file that was handed over is not looked after, and each of them may be another one.
        """
        if root.kind is RootKind.SUBMITTED:
            return
        # In the roots of others nothing is written, so they have no mark, and `_missing` alone looks out for them.
        mark = RootMark(id=root.mark, device=root.device) if root.kind is RootKind.MANAGED else None
        self._workers.marks.know(root.path, mark)
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
        refused = self._workers.marks.refused().get(path)
        if watched is None:
            return False, refused.message if refused is not None else ""
        return watched.scanning, refused.message if refused is not None else watched.problem

    def unseen(self) -> list[tuple[str, str]]:
        """Name the watched roots whose changes make no events, and why: they are found by scans alone."""
        return [(w.root.path, w.unseen) for w in self._roots.values() if w.unseen]

    def owner(self, path: str) -> int | None:
        """Return the uid whose root this is; None when nobody's."""
        watched = self._roots.get(path)
        return watched.root.uid if watched is not None else None

    def problems(self) -> list[tuple[str, str]]:
        """Name the roots that can't be scanned now, and why."""
        return [(w.root.path, w.problem) for w in self._roots.values() if w.problem]

    def copies(self, path: str) -> Copies:
        """Tell of the directories under a root that are copies of checkpoints: they are left alone."""
        watched = self._roots.get(path)
        return watched.copies if watched is not None else Copies()

    async def run(self) -> None:
        """Look after every root until cancelled."""
        async with anyio.create_task_group() as group:
            self._group = group
            for watched in self._roots.values():
                group.start_soon(self._look_after, watched)
            await anyio.sleep_forever()

    async def _look_after(self, watched: _Watched) -> None:
        async with anyio.create_task_group() as group:
            if watched.root.kind is RootKind.WATCHED:
                group.start_soon(self._listen, watched)
            pause_s = RETRY_S
            while True:
                begun_s = anyio.current_time()
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
                # A tree that never rests is scanned for half of the time at most.
                await anyio.sleep(min(anyio.current_time() - begun_s, REST_S_MAX))
                with anyio.move_on_after(await self._interval_s(watched)) as timer:
                    await watched.hinted.wait()
                watched.everything = watched.everything or timer.cancelled_caught
                watched.hinted = anyio.Event()

    async def _interval_s(self, watched: _Watched) -> float:
        """How long a root may rest without a hint: longer than `reconcile_s` only while its events are all seen, or it is ours."""
        try:
            remote = mounts.find(watched.root.path, await anyio.to_thread.run_sync(mounts.read)).remote
        except CkptdError:
            remote = True  # not known now: look as often as any root may need it
        settings = self._settings
        if remote:
            return settings.reconcile_remote_s
        rest_s = min(watched.took_s * RESTS, settings.reconcile_max_s) if watched.seen else 0.0
        if watched.root.kind is RootKind.MANAGED:
            # Nobody but ckptd writes there, and runs with a directory each leave one behind each: it rests longer and longer.
            rest_s = min(settings.reconcile_s * 2 ** min(watched.same, SAME_MAX), settings.reconcile_max_s)
        return max(settings.reconcile_s, rest_s)

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
            watched.seen = False
            watched.everything = True
            watched.hinted.set()
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_S_MAX)

    def _hint(self, watched: _Watched, hints: Hints) -> None:
        unseen = hints.problem if hints.blind else ""
        if unseen and not watched.unseen:
            log.warning("watch.blind", root=watched.root.path, why=unseen)
        watched.unseen = unseen
        watched.seen = not hints.problem
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
                begun_s = anyio.current_time()
                result = await self.scan(watched.root)
                watched.same = 0 if result.added or result.missing else watched.same + 1
                watched.took_s = anyio.current_time() - begun_s
                watched.looked = True
                return
            for directory in sorted(directories):
                if not any(directory != above and directory.startswith(above + "/") for above in directories):
                    await self._scan_under(watched.root, directory)
        finally:
            watched.scanning = False

    async def scan(self, root: Root, *, adopt: bool = False) -> Reconciled:
        """Compare everything under one root with the catalog. `adopt`: a person says that it is the right one."""
        result = Reconciled()
        standing = await of_root(self._catalog, root)
        standing.adopt = adopt
        unseen = set(standing.others)
        try:
            scanned = await self._take(root, standing, result, unseen)
        except CkptdError as error:
            if error.code in {"not_found", "missing"} and not standing:
                return result  # a root nobody has written to yet
            raise  # never "all its checkpoints are missing": a disk that is not mounted looks just like this
        if scanned.complete:
            self._note_copies(root, result, unseen)
            await self._missing(root, unseen, scanned, result)
        if adopt:
            await self._workers.marks.adopt(root.path, result.mark)
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

    def _note_copies(self, root: Root, result: Reconciled, unseen: set[int]) -> None:
        """Remember what is left alone. Where the row itself was not met, it was moved there, and is followed."""
        watched = self._roots.get(root.path)
        paths = [path for path, row in result.copies.items() if row not in unseen]
        copies = Copies(len(paths), heapq.nsmallest(COPIES_NAMED_MAX, paths))
        if watched is not None and watched.copies != copies:
            watched.copies = copies
            log.info("reconcile.copies", root=root.path, count=copies.count, first=copies.first)

    async def look_before_open(self, root: Root, directory: str) -> None:
        """Take in what lies in the directory of a run that opens, where this daemon has not looked yet.

        A catalog that was lost, or put back from a copy, would number the run's execution below those whose
        checkpoints lie there, and retention would take what it saves for the oldest. Waits OPEN_S at most: on a
        disk that hangs or is in trouble the run opens all the same.
        """
        watched = self._roots.get(root.path)
        if watched is not None and watched.looked:
            return
        try:
            with anyio.fail_after(OPEN_S):
                await self._scan_under(root, os.path.join(root.path, directory))
        except TimeoutError:
            log.warning("open.unseen", root=root.path, directory=directory, waited_s=OPEN_S)
        except CkptdError as error:
            if error.code not in {"not_found", "missing"}:  # nobody has saved there yet
                log.warning("open.unseen", root=root.path, directory=directory, **error.to_wire())

    async def _scan_under(self, root: Root, directory: str) -> None:
        below = os.path.relpath(directory, root.path)  # noqa: ASYNC240 - text only
        await self._take(root, Standing(under="" if below == "." else below), Reconciled(), set())

    async def _take(self, root: Root, standing: Standing, result: Reconciled, unseen: set[int]) -> Scanned:
        """Scan and take in what is new. Rows in `standing` that were not met go to `unseen`, less what was told."""
        managed = root.kind is RootKind.MANAGED
        request = Scan(
            root=root.path,
            managed=managed,
            under=standing.under,
            entries_max=self._settings.entries_max,
            known=bytes(standing.marks),
            adopt=standing.adopt,
        )
        others = [path for path, w in self._roots.items() if path != root.path and w.root.kind is RootKind.MANAGED]
        told: set[int] = set()
        async with self._workers.parts(request) as parts:
            async for part in parts:
                found = [c for c in part.found if managed or not _inside(c.path, others)]
                result.found += len(found)
                for start in range(0, len(found), BATCH_MAX):
                    some = found[start : start + BATCH_MAX]
                    taken = await (self._files.manifests(root, some) if managed else self._files.candidates(root, some))
                    result.added += taken.added
                    result.known += taken.known
                    result.damaged += taken.damaged
                    result.copies.update(taken.copies)
                    told.update(taken.sequences)
            scanned: Scanned = parts.reply
            result.mark = parts.root or RootMark()
        unseen.update(standing.marked[at] for at in scanned.unmet)
        unseen.difference_update(told)
        result.found += scanned.same
        result.known += scanned.same
        result.problem = scanned.problem
        return scanned

    async def _missing(self, root: Root, unseen: set[int], scanned: Scanned, result: Reconciled) -> None:
        """Mark what a complete scan did not see. Rows that changed since are looked at again, not marked.

        When nothing at all was seen of what should be there, and it was recorded on another file
        system than the root is on now, then a disk is not mounted: its directory is there, and empty.
        """
        gone = sorted(unseen)
        if gone and not result.known:
            sample = await self._catalog.read(lambda conn: arrivals.at_sequences(conn, gone[:BATCH_MAX]))
            devices = {one.identity.dev for one in sample if one.identity is not None}
            if devices and scanned.device not in devices | {0}:
                raise RootDegraded(
                    f"{root.path} holds none of its {len(gone)} checkpoints, and is on another file system than they were",
                    hint="is its disk mounted? `ckpt verify` tells of single checkpoints",
                )
        for start in range(0, len(gone), BATCH_MAX):
            some = gone[start : start + BATCH_MAX]

            async def mark(tx: Tx, some: list[int] = some) -> int:
                marked = []
                for one in await arrivals.at_sequences(tx.conn, some):
                    if one.state in {State.LIVE, State.CORRUPT}:
                        why = f"a scan of {root.path} did not find it"
                        marked.append(await checkpoints.mark_missing(tx, one.id, why))
                await self._files.decide_again(tx, marked)
                return len(marked)

            result.missing += await self._catalog.write(mark)

    async def sweep(self, older_s: float) -> None:
        """Remove our own temporary directories that no running job can own any more."""
        keep = [job.checkpoint_id for job in await self._catalog.read(queue.running)]
        for watched in tuple(self._roots.values()):
            if watched.root.kind is RootKind.MANAGED:
                try:
                    await self._workers.call(Sweep(root=watched.root.path, older_s=older_s, keep=keep))
                except CkptdError as error:
                    # One disk's trouble is no reason to leave the others' litter.
                    log.warning("sweep.failed", root=watched.root.path, **error.to_wire())


def _inside(path: str, roots_of_ours: list[str]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots_of_ours)
