"""The one door: every hand-off, whichever way it came, becomes rows and a job here, once.

Limits, names and paths are checked before anything is believed. A checkpoint's id decides what is
a repeat: a commit sent again, an arena found after a crash and the same image in the spool are one
checkpoint. The row and its job are made in one transaction.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ckptd import failpoint
from ckptd.catalog import Catalog, checkpoints, experiments, listing, roots
from ckptd.catalog.checkpoints import NewCheckpoint
from ckptd.catalog.experiments import NewExperiment, Opened
from ckptd.catalog.roots import NewRoot, Root
from ckptd.catalog.tx import Tx
from ckptd.clock import Clock
from ckptd.config import Settings
from ckptd.errors import BadPath, BadRequest, NotAuthorized
from ckptd.intake import descriptor as descriptors
from ckptd.intake import manifest
from ckptd.intake.arenas import Arena, ArenaPool, Use
from ckptd.intake.descriptor import Descriptor, check_directory, check_name
from ckptd.intake.requests import ExperimentOpen
from ckptd.jobs import Jobs, NewJob
from ckptd.model import Checkpoint, Level, Origin, RootKind, State, new_id
from ckptd.worker.protocol import Candidate, IdentityRecord
from ckptd_client.wire import from_number


@dataclass(frozen=True, kw_only=True)
class FileOffer:
    """A claim that a finished checkpoint lies at `path`."""

    id: str
    path: str
    uid: int
    origin: Origin
    told: bool
    project: str | None = None
    experiment: str | None = None
    step: int | None = None
    epoch: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    update_best: bool = True


class Admission:
    """Checks hand-offs and enters them into the catalog and the queue."""

    def __init__(self, catalog: Catalog, jobs: Jobs, pool: ArenaPool, clock: Clock) -> None:
        """Keep what it works with; `current` and `on_root` are set by whoever composes the daemon."""
        self._catalog = catalog
        self._jobs = jobs
        self._pool = pool
        self._clock = clock
        self.current = Settings()
        self.on_root: Callable[[Root], None] = lambda _: None

    def settings(self) -> Settings:
        """Return the settings in force; a reload replaces them as a whole."""
        return self.current

    # -- roots and experiments ---------------------------------------------------------------

    async def managed_root(self, directory: str, uid: int) -> Root:
        """Return the root for a trainer's `dir`: made on the spot in user mode, configured in system mode."""
        path = check_directory(directory)
        settings = self.settings()
        if settings.mode == "system":
            known = await self._catalog.read(roots.all_roots)
            inside = [r for r in known if r.kind is RootKind.MANAGED and _under(path, r.path)]
            if not inside:
                raise BadPath(
                    f"{path} is under no configured root", hint="ask for a [[roots]] entry in the configuration"
                )
        elif uid not in {os.getuid(), 0}:
            raise NotAuthorized(f"this daemon serves uid {os.getuid()}, not {uid}")
        return await self._ensure_root(NewRoot(path=path, kind=RootKind.MANAGED, uid=uid))

    async def _ensure_root(self, new: NewRoot) -> Root:
        known = await self._catalog.read(lambda conn: roots.by_path(conn, new.path))
        if known is not None and known.kind is new.kind:
            return known
        root = await self._catalog.write(lambda tx: roots.ensure(tx, new))
        self.on_root(root)
        return root

    async def open_experiment(
        self, request: ExperimentOpen, uid: int, *, join: bool
    ) -> tuple[Opened, Checkpoint | None]:
        """Open or go on with an experiment; also return its newest good checkpoint."""
        check_name("project", request.project)
        check_name("experiment", request.name)
        root = await self.managed_root(request.dir, uid)
        new = NewExperiment(
            id=request.experiment,
            uid=uid,
            project=request.project,
            name=request.name,
            root=root.path,
            config=request.config,
            tags=tuple(request.tags),
            parent_id=request.parent,
            facts=request.facts,
            resume=request.resume,
        )
        opened = await self._catalog.write(lambda tx: experiments.open_experiment(tx, new, join=join))
        newest = await self._catalog.read(lambda conn: listing.latest(conn, opened.experiment.id))
        return opened, newest

    # -- memory hand-offs --------------------------------------------------------------------

    async def arena(self, arena: Arena, uid: int) -> Checkpoint:
        """Take over what a trainer committed in `arena`; safe to repeat.

        The arena counts as BUSY from the first moment, so nobody lends it; when the rows can't be
        made (a full disk), it goes back to a lease without a holder, which the reaper brings here again.
        """
        raw = arena.descriptor()
        if raw is None:
            raise BadRequest(f"arena {arena.id.hex()[:12]} holds no committed save")
        found = descriptors.decode(raw, arena.size_bytes)
        experiment_before = arena.experiment_id
        self._pool.commit(arena, found.experiment.id, found.checkpoint)
        try:
            checkpoint = await self.memory(found, uid, arena=arena.id.hex(), size_bytes=arena.size_bytes)
        except BaseException:
            arena.use, arena.holder, arena.experiment_id = Use.LEASED, None, experiment_before
            raise
        arena.experiment_id = checkpoint.experiment_id
        if checkpoint.state is State.LIVE:
            self._pool.published(checkpoint.id)
        elif checkpoint.state is not State.PENDING:
            self._pool.free(arena)
        return checkpoint

    async def memory(self, found: Descriptor, uid: int, *, arena: str | None, size_bytes: int) -> Checkpoint:
        """Make the rows and the job of one memory hand-off."""
        root = await self.managed_root(found.experiment.dir, uid)
        metrics = {name: from_number(value) for name, value in found.metrics.items()}
        who = found.experiment

        async def admit(tx: Tx) -> Checkpoint:
            experiment = await experiments.ensure(
                tx,
                NewExperiment(
                    id=who.id,
                    uid=uid,
                    project=who.project,
                    name=who.name,
                    root=root.path,
                    config=who.config,
                    tags=tuple(who.tags),
                    parent_id=who.parent,
                    facts=who.facts,
                ),
            )
            staged = await checkpoints.stage(
                tx,
                NewCheckpoint(
                    id=found.checkpoint,
                    experiment_id=experiment.id,
                    origin=Origin.MEMORY,
                    root_id=root.id,
                    step=found.step,
                    epoch=found.epoch,
                    segment=found.segment,
                    size_bytes=sum(f.size_bytes for f in found.files),
                    format=found.format,
                    created_at=found.created_at,
                    metrics=metrics,
                    note=found.note,
                    meta=found.meta,
                    parent_id=found.parent,
                    update_best=found.update_best,
                    arena=arena,
                ),
            )
            if not staged.existed:
                payload = {"descriptor": {"files": msgspec.to_builtins(found.files)}, "image_bytes": size_bytes}
                lane = experiment.id
                await self._jobs.enqueue(
                    tx, NewJob(checkpoint_id=found.checkpoint, lane=lane, stage="publish", payload=payload)
                )
            return staged.checkpoint

        checkpoint = await self._catalog.write(admit)
        failpoint.hit("job.committed")
        return checkpoint

    # -- files -------------------------------------------------------------------------------

    async def file(self, offer: FileOffer) -> Checkpoint:
        """Take in files that lie where they lie; the job waits until their writer is done."""
        path = check_directory(offer.path)
        root = await self._root_of_file(path, offer.uid)

        async def admit(tx: Tx) -> Checkpoint:
            known = await listing.by_path(tx.conn, path)
            if known is not None and known.id != offer.id and known.state is State.PENDING:
                # A watched root saw it first: the writer's word only adds what it knows.
                if offer.metrics:
                    known = await checkpoints.add_metrics(tx, known.id, offer.metrics)
                await self._jobs.wake(tx, checkpoint_id=known.id)
                return known
            return await self._enter(tx, root, offer, path)

        return await self._catalog.write(admit)

    async def candidates(self, root: Root, found: Sequence[Candidate]) -> int:
        """Take in what a scan of a watched root found and the catalog does not know; return how many are new."""

        async def admit(tx: Tx) -> int:
            new = 0
            for candidate in found:
                known = await listing.by_path(tx.conn, candidate.path)
                if known is not None:
                    if known.state is State.PENDING or not await self._overwritten(tx, known, candidate.identity):
                        continue
                    await checkpoints.mark_missing(tx, known.id, "its writer put another file in its place")
                offer = FileOffer(
                    id=new_id(),
                    path=candidate.path,
                    uid=root.uid,
                    origin=Origin.WATCH,
                    told=False,
                    project=root.project or None,
                    step=candidate.step,
                )
                await self._enter(tx, root, offer, candidate.path, fmt=candidate.format)
                new += 1
            return new

        return await self._catalog.write(admit)

    async def _overwritten(self, tx: Tx, known: Checkpoint, seen: IdentityRecord) -> bool:
        """Whether other bytes lie at a known path. ctime is left out: a chmod is no new checkpoint."""
        recorded = await checkpoints.identity(tx.conn, known.id)
        if recorded is None or known.state is State.MISSING:
            return True
        return (recorded.dev, recorded.ino, recorded.size_bytes, recorded.mtime_ns) != (
            seen.dev,
            seen.ino,
            seen.size_bytes,
            seen.mtime_ns,
        )

    async def _enter(self, tx: Tx, root: Root, offer: FileOffer, path: str, fmt: str = "opaque") -> Checkpoint:
        project, name = _names(root, path)
        experiment = await experiments.ensure(
            tx,
            NewExperiment(
                id=new_id(),
                uid=offer.uid,
                project=offer.project or project,
                name=offer.experiment or name,
                root=root.path,
            ),
        )
        staged = await checkpoints.stage(
            tx,
            NewCheckpoint(
                id=offer.id,
                experiment_id=experiment.id,
                origin=offer.origin,
                root_id=root.id,
                level=Level.NONE,
                step=offer.step,
                epoch=offer.epoch,
                path=path,
                format=fmt,
                metrics=offer.metrics,
                note=offer.note,
                meta=offer.meta,
                update_best=offer.update_best,
            ),
        )
        if not staged.existed:
            payload: dict[str, Any] = {"root": root.path, "path": path, "told": offer.told}
            for configured in self.settings().roots:
                if str(configured.path) == root.path and configured.quiet_s is not None:
                    payload["quiet_s"] = configured.quiet_s
            await self._jobs.enqueue(tx, NewJob(checkpoint_id=offer.id, lane=path, stage="settle", payload=payload))
        return staged.checkpoint

    async def _root_of_file(self, path: str, uid: int) -> Root:
        known = await self._catalog.read(roots.all_roots)
        inside = [root for root in known if _under(path, root.path) and path != root.path]
        if inside:
            return max(inside, key=lambda root: len(root.path))
        if self.settings().mode == "system":
            raise BadPath(f"{path} is under no configured root", hint="ask for a [[roots]] entry in the configuration")
        return await self._ensure_root(NewRoot(path=os.path.dirname(path), kind=RootKind.SUBMITTED, uid=uid))

    async def recheck(self, row: Checkpoint) -> None:
        """Have one checkpoint read back soon; a job it has already does that anyway."""
        job = NewJob(checkpoint_id=row.id, lane=f"{row.experiment_id}/recheck", stage="verify")
        await self._catalog.write(lambda tx: self._jobs.enqueue(tx, job))

    # -- manifests ---------------------------------------------------------------------------

    async def manifest(self, root: Root, found: Candidate) -> bool:
        """Take a checkpoint of ours back into a catalog that forgot it; False when it is known or no manifest."""
        if found.manifest is None:
            return False
        return await self._catalog.write(lambda tx: manifest.enter(tx, self._jobs, root, found))


def _under(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _names(root: Root, path: str) -> tuple[str, str]:
    """Project and experiment of a file that nobody named: the root's name, and its directory below it."""
    base = os.path.basename(root.path) or "root"
    below = os.path.dirname(path)[len(root.path.rstrip("/")) + 1 :]
    name = below.replace("/", ".").lstrip(".")[:128] or base
    plain = "".join(c if c.isprintable() else "_" for c in name)
    return root.project or base.lstrip(".")[:128] or "root", plain
