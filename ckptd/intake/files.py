"""The door for files that somebody else wrote: handed over by name, or found by a scan.

A path has one row for the bytes that lie at it, whoever saw them first. Handing over what a scan has
found (or the other way round) is the same checkpoint: its id, state and level stay, and the writer's
word wins where he gave one (project, experiment, step, epoch, note, metrics and meta by key). Only
other bytes at the path (another inode, size or time of writing) are another checkpoint. Device
numbers are left out of that question, since many file systems get new ones with each mount.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptd.catalog import Catalog, arrivals, checkpoints, experiments, roots
from ckptd.catalog.arrivals import Arrival, Recorded
from ckptd.catalog.experiments import Experiment, NewExperiment
from ckptd.catalog.relabel import Said, relabel
from ckptd.catalog.roots import NewRoot, Root
from ckptd.catalog.tx import Tx
from ckptd.config import Settings
from ckptd.errors import BadPath, Exists
from ckptd.intake import manifest
from ckptd.intake.admit import Admission
from ckptd.intake.descriptor import check_directory, check_name
from ckptd.intake.follow import sees_all
from ckptd.intake.originals import Originals, claimed_id, claims
from ckptd.jobs import Jobs, NewJob
from ckptd.model import Checkpoint, Identity, Level, Origin, RootKind, State, new_id
from ckptd.pipeline.manifest import amend
from ckptd.pipeline.winners import lost, moved, refresh_best
from ckptd.worker import Workers
from ckptd.worker.protocol import Candidate, IdentityRecord, Settle, Settlement

NAME_CHARS_MAX = 128
_OVERWRITTEN = "its writer put another file in its place"


@dataclass(frozen=True, kw_only=True)
class FileOffer:
    """A claim that a finished checkpoint lies at `path`."""

    id: str
    path: str
    uid: int
    project: str | None = None
    experiment: str | None = None
    step: int | None = None
    epoch: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    update_best: bool = True


@dataclass(slots=True)
class Taken:
    """What became of one batch of a scan. `sequences` are the rows that lie where they should.

    copies  directories that name a checkpoint which lies elsewhere, and its row: left alone, or moved since
    """

    added: int = 0
    known: int = 0
    damaged: int = 0
    sequences: list[int] = field(default_factory=list)
    copies: dict[str, int] = field(default_factory=dict)


class Files:
    """Enters files into the catalog and the queue."""

    def __init__(self, catalog: Catalog, jobs: Jobs, admission: Admission, workers: Workers) -> None:
        """Keep what it works with."""
        self._catalog = catalog
        self._jobs = jobs
        self._admission = admission
        self._workers = workers
        self._originals = Originals(catalog, workers, admission.settings)

    @property
    def _settings(self) -> Settings:
        return self._admission.settings()

    # -- handed over -------------------------------------------------------------------------

    async def file(self, offer: FileOffer) -> Checkpoint:
        """Take in files that lie where they lie; the job waits until their writer is done.

        Returns the row of what lies there, which is an older one when it was known. Exists when that
        is another user's. Asks the worker, and raises what it raises, only for a path that is known.
        """
        path = check_directory(offer.path)
        if offer.project is not None:
            check_name("project", offer.project)
        if offer.experiment is not None:
            check_name("experiment", offer.experiment)
        root = await self._root_of(path, offer.uid)
        known = (await self._catalog.read(lambda conn: arrivals.at_paths(conn, [path]))).get(path)
        seen = None
        if known is not None and known.id != offer.id and known.identity is not None:
            seen = await self._look(root.path, path)

        async def admit(tx: Tx) -> Checkpoint:
            again = (await arrivals.at_paths(tx.conn, [path])).get(path)
            if again is None or again.id == offer.id or again.state in {State.FAILED, State.TRASHED}:
                return await self._succeed(tx, again, await self._enter(tx, root, offer, path))
            if not (sees_all(offer.uid) or again.uid == offer.uid):
                raise Exists(f"{path} is catalogued for uid {again.uid}")
            if again.state is State.PENDING:
                await self._jobs.wake(tx, checkpoint_id=again.id)
                return await self._said(tx, root, again, offer)
            if again.state is State.MISSING or seen is None or is_other(again.identity, seen):
                if again.state is not State.MISSING:
                    await self.decide_again(tx, [await checkpoints.mark_missing(tx, again.id, _OVERWRITTEN)])
                return await self._succeed(tx, again, await self._enter(tx, root, offer, path))
            return await self._said(tx, root, again, offer)

        return await self._catalog.write(admit)

    async def _succeed(self, tx: Tx, known: Recorded | None, entered: Checkpoint) -> Checkpoint:
        """Let a new row have what people said of its path. What lies in the trash has its own bytes, and keeps its pin."""
        if known is None or known.id == entered.id or known.state is State.TRASHED:
            return entered
        await arrivals.inherit(tx, {known.id: entered.id})
        return await checkpoints.get(tx.conn, entered.id)

    async def _look(self, root: str, path: str) -> IdentityRecord | None:
        """What lies at a path now; None when nothing does."""
        settled: Settlement = await self._workers.call(Settle(root=root, path=path, quiet_s=0.0, told=True))
        return settled.identity

    async def _said(self, tx: Tx, root: Root, known: Recorded, offer: FileOffer) -> Checkpoint:
        """Write the writer's words into the row that a scan, or an earlier hand-over, made."""
        before = await checkpoints.get(tx.conn, known.id)
        experiment = None
        if offer.project is not None or offer.experiment is not None:
            named = NewExperiment(
                id=new_id(),
                uid=known.uid,
                project=offer.project or before.project,
                name=offer.experiment or before.experiment,
                root=root.path,
            )
            experiment = await experiments.ensure(tx, named)
        said = Said(
            experiment=experiment,
            step=offer.step,
            epoch=offer.epoch,
            metrics=offer.metrics,
            note=offer.note,
            meta=offer.meta,
            update_best=offer.update_best,
        )
        after = await relabel(tx, known.id, said)
        if after.experiment_id != before.experiment_id:
            await moved(tx, before, after)
        await refresh_best(tx, after, self._settings.rules_for(after.project, after.experiment))
        return await checkpoints.get(tx.conn, after.id)

    async def _enter(self, tx: Tx, root: Root, offer: FileOffer, path: str) -> Checkpoint:
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
            checkpoints.NewCheckpoint(
                id=offer.id,
                experiment_id=experiment.id,
                origin=Origin.FILE,
                root_id=root.id,
                level=Level.NONE,
                step=offer.step,
                epoch=offer.epoch,
                path=path,
                format="opaque",
                metrics=offer.metrics,
                note=offer.note,
                meta=offer.meta,
                update_best=offer.update_best,
            ),
        )
        if not staged.existed:
            job = self._job(root, offer.id, path, told=True)
            if self._settings.mode == "system" and not sees_all(offer.uid):
                job.payload["owner_uid"] = offer.uid  # the worker may read more than this user could
            await self._jobs.enqueue(tx, job)
        elif not sees_all(offer.uid) and await checkpoints.uid_of(tx.conn, offer.id) != offer.uid:
            raise Exists(f"the id {offer.id} belongs to another checkpoint")
        return staged.checkpoint

    def _job(self, root: Root, checkpoint_id: str, path: str, *, told: bool) -> NewJob:
        payload: dict[str, Any] = {"root": root.path, "path": path, "told": told}
        for configured in self._settings.roots:
            if str(configured.path) == root.path and configured.quiet_s is not None:
                payload["quiet_s"] = configured.quiet_s
        return NewJob(checkpoint_id=checkpoint_id, lane=path, stage="settle", can_wait=True, payload=payload)

    async def _root_of(self, path: str, uid: int) -> Root:
        above = await self._catalog.read(lambda conn: roots.above(conn, path))
        if above is not None:
            return above
        if self._settings.mode == "system":
            raise BadPath(f"{path} is under no configured root", hint="ask for a [[roots]] entry in the configuration")
        return await self._admission.ensure_root(NewRoot(path=os.path.dirname(path), kind=RootKind.SUBMITTED, uid=uid))

    # -- found by a scan ---------------------------------------------------------------------

    async def candidates(self, root: Root, found: Sequence[Candidate]) -> Taken:
        """Take in what a scan of a watched root found. What is known costs a look-up and no transaction."""
        paths = [candidate.path for candidate in found]
        known = await self._catalog.read(lambda conn: arrivals.at_paths(conn, paths))
        news = [candidate for candidate in found if _is_news(known.get(candidate.path), candidate)]
        taken = Taken(known=len(found) - len(news))
        taken.sequences += [known[c.path].sequence for c in found if c.path in known]
        if news:
            taken.added = await self._catalog.write(lambda tx: self._take_news(tx, root, news))
        return taken

    async def _take_news(self, tx: Tx, root: Root, news: Sequence[Candidate]) -> int:
        """Enter what still is news inside the transaction: a hand-over may have been faster than the scan."""
        known = await arrivals.at_paths(tx.conn, [candidate.path for candidate in news])
        # A save on its way to this very directory will have its own row, by its own id, in a moment.
        ours = any(c.format == "ckptd" for c in news) and await arrivals.is_publishing(tx.conn, root.id)
        named: dict[tuple[str, str], Experiment] = {}
        new: list[Arrival] = []
        gone: list[Checkpoint] = []
        heirs: dict[str, str] = {}
        back = 0
        for candidate in news:
            recorded = known.get(candidate.path)
            if not _is_news(recorded, candidate) or (ours and candidate.format == "ckptd"):
                continue
            if (
                recorded is not None
                and recorded.state is State.MISSING
                and not is_other(recorded.identity, candidate.identity)
            ):
                if recorded.was_durable:
                    seen = _identity(candidate.identity)
                    after = await checkpoints.mark_restored(tx, recorded.id, candidate.path, seen)
                    await refresh_best(tx, after, self._settings.rules_for(after.project, after.experiment))
                    await self._jobs.enqueue(tx, _verify_again(recorded.id))
                    back += 1
                    continue
            elif recorded is not None and recorded.state in {State.LIVE, State.CORRUPT}:
                gone.append(await checkpoints.mark_missing(tx, recorded.id, _OVERWRITTEN))
            names = _names(root, candidate.path)
            if names not in named:
                named[names] = await experiments.ensure(
                    tx, NewExperiment(id=new_id(), uid=root.uid, project=names[0], name=names[1], root=root.path)
                )
            new.append(
                Arrival(
                    id=new_id(),
                    experiment=named[names],
                    root_id=root.id,
                    path=candidate.path,
                    format=candidate.format,
                    step=candidate.step,
                    identity=_identity(candidate.identity),
                )
            )
            if recorded is not None and recorded.state is not State.TRASHED:
                heirs[recorded.id] = new[-1].id
        await self.decide_again(tx, gone)
        await arrivals.enter(tx, new)
        await arrivals.inherit(tx, heirs)
        await self._jobs.enqueue_new(tx, [self._job(root, one.id, one.path, told=False) for one in new])
        return len(new) + back

    async def decide_again(self, tx: Tx, gone: Sequence[Checkpoint]) -> None:
        """What was the best or the newest may be among what is gone: flags now, links and rules by a job."""
        await lost(tx, [row.id for row in gone])
        for row in {row.experiment_id: row for row in gone}.values():
            lane = f"{row.experiment_id}/after"
            await self._jobs.enqueue_after(tx, NewJob(checkpoint_id=row.id, lane=lane, stage="link"))

    # -- manifests ---------------------------------------------------------------------------

    async def manifests(self, root: Root, found: Sequence[Candidate]) -> Taken:
        """Take checkpoints of ours back into a catalog that forgot them, or took them for lost."""
        taken = Taken(damaged=sum(1 for candidate in found if candidate.manifest is None))
        claimed = claims(found)
        known = await self._catalog.read(lambda conn: arrivals.by_ids(conn, list(claimed)))
        news = []
        for checkpoint_id, claiming in claimed.items():
            recorded = known.get(checkpoint_id)
            lies_at = recorded.path if recorded is not None else ""
            if recorded is None or _is_lost(recorded):
                chosen = await self._originals.choose(root, claiming, recorded)
                if chosen is not None:
                    news.append(chosen)
                    lies_at = chosen.path
                else:
                    taken.known += 1
            else:
                taken.known += 1
                if any(candidate.path == lies_at for candidate in claiming):
                    taken.sequences.append(recorded.sequence)
            if recorded is None or recorded.state not in {State.DROPPED, State.REPLACED, State.TRASHED}:
                row = recorded.sequence if recorded is not None else 0
                taken.copies.update((one.path, row) for one in claiming if one.path != lies_at)
        if news:
            added = await self._catalog.write(lambda tx: self._take_manifests(tx, root, news))
            taken.added += added
            taken.known += len(news) - added
        return taken

    async def _take_manifests(self, tx: Tx, root: Root, news: Sequence[Candidate]) -> int:
        known = await arrivals.by_ids(tx.conn, [claimed_id(candidate) for candidate in news])
        added = 0
        for candidate in news:
            recorded = known.get(claimed_id(candidate))
            if recorded is None:
                added += await manifest.enter(tx, self._jobs, root, candidate)
            elif recorded.state is State.FAILED:
                added += await manifest.take_up(tx, self._jobs, root, candidate)
            elif recorded.state is State.MISSING and recorded.was_durable:
                seen = _identity(candidate.identity)
                after = await checkpoints.mark_restored(tx, recorded.id, candidate.path, seen)
                if after.root != root.path:  # moved from one tree to another
                    await arrivals.set_root(tx, recorded.sequence, root.id)
                await refresh_best(tx, after, self._settings.rules_for(after.project, after.experiment))
                await amend(tx, self._jobs, after)
                await self._jobs.enqueue(tx, _verify_again(recorded.id))
                added += 1
        return added


def is_other(recorded: Identity | None, seen: IdentityRecord) -> bool:
    """Whether other bytes lie at a path than were recorded. ctime is left out: a chmod is no new checkpoint."""
    return recorded is None or not recorded.means(seen)


def _is_news(recorded: Recorded | None, candidate: Candidate) -> bool:
    if recorded is None:
        return True
    if recorded.state is State.PENDING:
        return False
    if recorded.state is State.MISSING:
        return True
    return is_other(recorded.identity, candidate.identity)


def _is_lost(recorded: Recorded) -> bool:
    """Whether a row would take back what is found; one that never was whole has no bytes to be known by."""
    return recorded.state is State.FAILED or (recorded.state is State.MISSING and recorded.was_durable)


def _verify_again(checkpoint_id: str) -> NewJob:
    return NewJob(checkpoint_id=checkpoint_id, lane=f"{checkpoint_id}/recheck", stage="verify", can_wait=True)


def _identity(seen: IdentityRecord) -> Identity:
    return Identity(seen.dev, seen.ino, seen.size_bytes, seen.mtime_ns, seen.ctime_ns)


def _names(root: Root, path: str) -> tuple[str, str]:
    """Project and experiment of a file that nobody named: the root's name, and its directory below it."""
    base = os.path.basename(root.path).lstrip(".")[:NAME_CHARS_MAX] or "root"
    below = os.path.dirname(path)[len(root.path.rstrip("/")) + 1 :]
    name = below.replace("/", ".").lstrip(".")[:NAME_CHARS_MAX] or base
    plain = "".join(c if c.isprintable() else "_" for c in name)
    return root.project or base, plain
