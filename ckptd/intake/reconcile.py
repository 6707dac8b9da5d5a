"""Truth about what lies under the roots: scans compared with the catalog.

Events of a watcher are hints: they may be late, lost or swallowed by a full queue, and cost time
then, never a checkpoint. Each root is scanned when it is opened, when a hint names a directory,
and on a timer whatever the hints said. Scans run in the root's I/O worker; a hung mount holds up
its own root only.
"""

import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

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
from ckptd.model import RootKind, State
from ckptd.worker import Workers, mounts
from ckptd.worker.mark import KNOWN_MAX, mark
from ckptd.worker.protocol import Hints, Scan, Scanned, Sweep, Watch

log = structlog.get_logger()

RETRY_S, RETRY_S_MAX = 1.0, 60.0
RESTS = 300  # lengths of a scan between two scans of a root whose events are all seen: a third of a per cent of a core
REST_S_MAX = 2.0  # between two scans of a root, so that hints cost at most half of a worker's time
DIRECTORIES_MAX = 256  # more hinted directories than this: one scan of the whole root is cheaper
BATCH_MAX = 250
OPEN_S = 10.0  # how long a run that opens waits until what lies in its directory is known


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


@dataclass
class _Standing:
    """What should lie under a root. `marked` are the rows of `marks`, in their order; `others` can't be marked."""

    under: str = ""
    marks: bytearray = field(default_factory=bytearray)
    marked: "array[int]" = field(default_factory=partial(array, "q"))
    others: "array[int]" = field(default_factory=partial(array, "q"))

    def __bool__(self) -> bool:
        return bool(self.marked or self.others)

    def add(self, page: Sequence[arrivals.Standing], *, marked: bool) -> None:
        """Take in one page of rows."""
        for sequence, path, ino, size_bytes, mtime_ns in page:
            if marked and ino is not None and size_bytes is not None and mtime_ns is not None:
                self.marks += mark(path, ino, size_bytes, mtime_ns)
                self.marked.append(sequence)
            else:
                self.others.append(sequence)


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

    def __init__(self, catalog: Catalog, workers: Workers, files: Files, settings: Callable[[], Settings]) -> None:
        """No root yet: `add()` brings them, before and while `run()` runs."""
        self._catalog = catalog
        self._workers = workers
        self._files = files
        self._all_settings = settings
        self._roots: dict[str, _Watched] = {}
        self._group: anyio.abc.TaskGroup | None = None

    @property
    def _settings(self) -> Watching:
        return self._all_settings().watching

    def add(self, root: Root) -> None:
        """Look after one more root."""
        known = self._roots.get(root.path)
        if known is not None:
            rested = known.root.kind is RootKind.SUBMITTED
            known.root = root
            if not rested or root.kind is RootKind.SUBMITTED:
                return
            known.everything = True
            if self._group is not None:
                self._group.start_soon(self._look_after, known)
            return
        watched = _Watched(root)
        self._roots[root.path] = watched
        if self._group is not None:
            self._group.start_soon(self._look_after, watched)

    def state_of(self, path: str) -> tuple[bool, str]:
        """Whether a root is being scanned, and what is wrong with it."""
        watched = self._roots.get(path)
        return (watched.scanning, watched.problem) if watched is not None else (False, "")

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
        """How long a root may rest without a hint: longer than `reconcile_s` only while its events are all seen."""
        try:
            remote = mounts.find(watched.root.path, await anyio.to_thread.run_sync(mounts.read)).remote
        except CkptdError:
            remote = True  # not known now: look as often as any root may need it
        settings = self._settings
        if remote:
            return settings.reconcile_remote_s
        rest_s = min(watched.took_s * RESTS, settings.reconcile_max_s) if watched.seen else 0.0
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
                await self.scan(watched.root)
                watched.took_s = anyio.current_time() - begun_s
                watched.looked = True
                return
            for directory in sorted(directories):
                if not any(directory != above and directory.startswith(above + "/") for above in directories):
                    await self._scan_under(watched.root, directory)
        finally:
            watched.scanning = False

    async def scan(self, root: Root) -> Reconciled:
        """Compare everything under one root with the catalog."""
        result = Reconciled()
        standing = await self._standing(root)
        unseen = set(standing.others)
        try:
            scanned = await self._take(root, standing, result, unseen)
        except CkptdError as error:
            if error.code in {"not_found", "missing"} and not standing:
                return result  # a root nobody has written to yet
            raise  # never "all its checkpoints are missing": a disk that is not mounted looks just like this
        if scanned.complete:
            await self._missing(root, unseen, scanned, result)
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

    async def _standing(self, root: Root) -> _Standing:
        """Which files should lie under the root now, as far as their rows say: 24 bytes each, for a scan's time."""
        found = _Standing()
        after = 0
        while True:
            page = await self._catalog.read(lambda conn, at=after: arrivals.standing(conn, root.id, at))  # type: ignore[misc]
            if not page:
                return found
            # A managed root is told with its manifests, always: they are what the catalog is made from again.
            found.add(page, marked=root.kind is RootKind.WATCHED and len(found.marked) < KNOWN_MAX)
            after = page[-1][0]

    async def _scan_under(self, root: Root, directory: str) -> None:
        below = os.path.relpath(directory, root.path)  # noqa: ASYNC240 - text only
        await self._take(root, _Standing(under="" if below == "." else below), Reconciled(), set())

    async def _take(self, root: Root, standing: _Standing, result: Reconciled, unseen: set[int]) -> Scanned:
        """Scan and take in what is new. Rows in `standing` that were not met go to `unseen`, less what was told."""
        managed = root.kind is RootKind.MANAGED
        request = Scan(
            root=root.path,
            managed=managed,
            under=standing.under,
            entries_max=self._settings.entries_max,
            known=bytes(standing.marks),
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
                    told.update(taken.sequences)
            scanned: Scanned = parts.reply
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
