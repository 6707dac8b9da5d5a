"""The one door: every hand-off, whichever way it came, becomes rows and a job here, once.

Limits, names and paths are checked before anything is believed. A checkpoint's id decides what is
a repeat: a commit sent again, an arena found after a crash and the same image in the spool are one
checkpoint. The row and its job are made in one transaction. Files have a door of their own: files.py.
"""

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import structlog

from ckptd import failpoint
from ckptd.catalog import Catalog, audits, checkpoints, experiments, listing, roots
from ckptd.catalog.audits import Deed
from ckptd.catalog.checkpoints import NewCheckpoint
from ckptd.catalog.experiments import NewExperiment, Opened
from ckptd.catalog.roots import NewRoot, Root
from ckptd.catalog.tx import Tx
from ckptd.config import Settings
from ckptd.errors import BadPath, BadRequest, CkptdError, Exists, GivenUp, NotAuthorized, NotFound, Refused
from ckptd.intake import descriptor as descriptors
from ckptd.intake.arena import owner_of
from ckptd.intake.arenas import Arena, ArenaPool, Use
from ckptd.intake.descriptor import Descriptor, check_directory, check_name
from ckptd.intake.follow import sees_all
from ckptd.intake.requests import ExperimentOpen
from ckptd.jobs import Jobs, NewJob
from ckptd.model import Checkpoint, Origin, RootKind, State
from ckptd.pipeline import winners
from ckptd.pipeline.manifest import amend
from ckptd.pipeline.winners import refresh_best
from ckptd_client.wire import from_number

log = structlog.get_logger()


class Admission:
    """Checks hand-offs and enters them into the catalog and the queue."""

    def __init__(self, catalog: Catalog, jobs: Jobs, pool: ArenaPool) -> None:
        """Keep what it works with; `current`, `on_root` and `before_open` are set by whoever composes the daemon."""
        self._catalog = catalog
        self._jobs = jobs
        self._pool = pool
        self.current = Settings()
        self.on_root: Callable[[Root], None] = lambda _: None
        self.before_open: Callable[[Root, str], Awaitable[None]] | None = None

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
            if not any(r.kind is RootKind.MANAGED and under(path, r.path) for r in known):
                raise BadPath(
                    f"{path} is under no configured root", hint="ask for a [[roots]] entry in the configuration"
                )
            foreign = [r.path for r in known if not sees_all(r.uid) and r.uid != uid]
            if not sees_all(uid) and any(under(path, other) or under(other, path) for other in foreign):
                raise NotAuthorized(f"{path} holds checkpoints of another user")
        elif not sees_all(uid):
            raise NotAuthorized(f"this daemon serves uid {os.getuid()}, not {uid}")
        return await self.ensure_root(NewRoot(path=path, kind=RootKind.MANAGED, uid=uid))

    async def ensure_root(self, new: NewRoot) -> Root:
        """Return the root at a path, made where there is none.

        A single file's directory becomes a managed one when a trainer saves there; a watched root never
        does: what others wrote there must stay under the rules that its entry names.
        """
        known = await self._catalog.read(lambda conn: roots.by_path(conn, new.path))
        if known is not None and (known.kind is not RootKind.SUBMITTED or new.kind is RootKind.SUBMITTED):
            return known
        root = await self._catalog.write(lambda tx: roots.ensure(tx, new))
        self.on_root(root)
        return root

    async def open_experiment(
        self, request: ExperimentOpen, uid: int, *, join: bool
    ) -> tuple[Opened, Checkpoint | None]:
        """Open or go on with an experiment; also return its newest good checkpoint."""
        uid = owner_of(uid)
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
        rules = self.settings().rules_for(new.project, new.name)
        if self.before_open is not None and not join:
            await self.before_open(root, f"{new.project}/{new.name}")

        async def make(tx: Tx) -> Opened:
            made = await experiments.open_experiment(tx, new, join=join)
            await winners.opened(tx, made.experiment.id, rules)
            return made

        opened = await self._catalog.write(make)
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
            arena.checkpoint_id = ""
            raise
        arena.experiment_id = checkpoint.experiment_id
        if checkpoint.state is State.LIVE:
            self._pool.published(checkpoint.id)
        elif checkpoint.state is not State.PENDING:
            self._pool.free(arena)
        return checkpoint

    async def rescue(self, arena: Arena) -> None:
        """Admit what was committed by a process that is gone, or before this daemon ran.

        What can never be admitted is given up, once and loudly; what a busy or full disk delays stays
        a lease without a holder, and is brought here again.
        """
        try:
            await self.arena(arena, arena.owner_uid)
        except (BadRequest, BadPath, Exists) as error:
            if isinstance(error, BadPath) and _is_sound(arena):
                log.warning("arena.not_admitted", arena=arena.id.hex(), **error.to_wire())
                return  # its root is no longer configured: a person may put that right
            log.error("arena.refused", arena=arena.id.hex(), **error.to_wire())  # noqa: TRY400 - the text says it all
            self._pool.free(arena)
        except CkptdError as error:
            log.warning("arena.not_admitted", arena=arena.id.hex(), **error.to_wire())

    async def memory(self, found: Descriptor, uid: int, *, arena: str | None, size_bytes: int) -> Checkpoint:
        """Make the rows and the job of one memory hand-off.

        One that FAILED begins again: its bytes are here after all; not one that a person gave up. Refused when its
        id is another user's.
        """
        uid = owner_of(uid)
        root = await self.managed_root(found.experiment.dir, uid)

        async def admit(tx: Tx) -> Checkpoint:
            staged = await self._stage(tx, found, uid, root, arena)
            if staged.existed and await checkpoints.uid_of(tx.conn, found.checkpoint) != uid:
                raise Exists(f"the id {found.checkpoint} belongs to another checkpoint")
            if found.step is not None and not staged.existed:
                await experiments.saved_at(tx, staged.checkpoint.experiment_id, found.step)
            failed = staged.existed and staged.checkpoint.state is State.FAILED
            revived = failed and (staged.checkpoint.error or {}).get("code") != GivenUp.code
            if revived:
                await checkpoints.mark_pending(tx, found.checkpoint)
            if revived or not staged.existed:
                payload = {"descriptor": {"files": msgspec.to_builtins(found.files)}, "image_bytes": size_bytes}
                lane = staged.checkpoint.experiment_id
                await self._jobs.enqueue(
                    tx, NewJob(checkpoint_id=found.checkpoint, lane=lane, stage="publish", payload=payload)
                )
            return await checkpoints.get(tx.conn, found.checkpoint)

        checkpoint = await self._catalog.write(admit)
        failpoint.hit("job.committed")
        return checkpoint

    async def uid_of(self, checkpoint_id: str) -> int | None:
        """Say whose a checkpoint is; None when it is not known."""
        try:
            return await self._catalog.read(lambda conn: checkpoints.uid_of(conn, checkpoint_id))
        except NotFound:
            return None

    async def _stage(self, tx: Tx, found: Descriptor, uid: int, root: Root, arena: str | None) -> checkpoints.Staged:
        who = found.experiment
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
        return await checkpoints.stage(
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
                metrics={name: from_number(value) for name, value in found.metrics.items()},
                note=found.note,
                meta=found.meta,
                parent_id=found.parent,
                update_best=found.update_best,
                arena=arena,
            ),
        )

    # -- what is said later --------------------------------------------------------------------

    async def late_metrics(self, checkpoint_id: str, values: dict[str, float]) -> None:
        """Validation ended after the save: the best is decided again in the same transaction, and what hangs on it
        (links, retention) is done anew by a job.
        """

        async def add(tx: Tx) -> None:
            await self._changed(tx, await checkpoints.add_metrics(tx, checkpoint_id, values))

        await self._catalog.write(add)

    async def unveto(self, deed: Deed) -> bool:
        """A person lets a vetoed save count: the newest and the best are decided again as after a late metric.

        False: there was no veto. NotFound.
        """

        async def lift(tx: Tx) -> bool:
            vetoed = await checkpoints.get(tx.conn, deed.subject)
            if vetoed.veto is None:
                return False
            await self._changed(tx, await checkpoints.lift_veto(tx, vetoed.id, deed.uid, deed.note))
            await audits.record(tx, replace(deed, before={"veto": vetoed.veto}))
            return True

        lifted: bool = await self._catalog.write(lift)
        return lifted

    async def _changed(self, tx: Tx, row: Checkpoint) -> None:
        rules = self.settings().rules_for(row.project, row.experiment)
        await refresh_best(tx, row, rules)
        if row.state is State.LIVE:
            lane = f"{row.experiment_id}/after"
            await self._jobs.enqueue_after(tx, NewJob(checkpoint_id=row.id, lane=lane, stage="link"))
        await amend(tx, self._jobs, row)

    async def recheck(self, row: Checkpoint) -> None:
        """Have one checkpoint read back soon, behind a job that it has: that one may have read it already.

        The job knows what the hot copy holds, so that damage can be written again from it.
        """
        if row.state not in {State.LIVE, State.CORRUPT, State.MISSING}:
            return
        held = self._pool.of_checkpoint(row.id)
        raw = held.descriptor() if held is not None else None
        payload: dict[str, Any] = {}
        if held is not None and raw is not None:
            found = descriptors.decode(raw, held.size_bytes)
            payload = {"descriptor": {"files": msgspec.to_builtins(found.files)}}
        lane = f"{row.id}/recheck"
        job = NewJob(checkpoint_id=row.id, lane=lane, stage="verify", can_wait=True, payload=payload)
        await self._catalog.write(lambda tx: self._jobs.enqueue_behind(tx, job))


def _is_sound(arena: Arena) -> bool:
    """Whether the descriptor itself makes sense."""
    raw = arena.descriptor()
    try:
        return raw is not None and bool(descriptors.decode(raw, arena.size_bytes))
    except Refused:
        return False


def under(path: str, root: str) -> bool:
    """Whether `path` is `root` or lies below it; text only."""
    return path == root or path.startswith(root.rstrip("/") + "/")
