"""What people ask through `ckpt` and that changes something: verify, pin, remove, retire, rebuild."""

import os
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import Catalog, arrivals, audits, checkpoints, holds, roots
from ckptd.catalog.audits import Deed
from ckptd.catalog.owners import owners_of
from ckptd.catalog.roots import NewRoot, Root
from ckptd.catalog.tx import Tx
from ckptd.errors import BadPath, Changed, CkptdError, Held, Missing, NotAuthorized, NotFound, TimedOut, Vetoed
from ckptd.hooks.points import HookEvent
from ckptd.intake import requests as ask
from ckptd.intake.arena import owner_of
from ckptd.intake.descriptor import check_directory, check_name
from ckptd.intake.follow import level_of, sees_all
from ckptd.intake.listener import Peer
from ckptd.intake.reconcile import Reconciled
from ckptd.intake.status import Plant
from ckptd.intake.training import Answer, Handler, select
from ckptd.model import Checkpoint, Damage, Identity, Level, Origin, RootKind, State
from ckptd.pipeline import asking, giveup, link, retain
from ckptd.pipeline.tools import Tools
from ckptd.pipeline.verify import Subject, bad, good, read_back, subject
from ckptd.worker.protocol import Settle

_ENDED = {State.CORRUPT, State.MISSING, State.FAILED, State.REPLACED, State.TRASHED, State.DROPPED}
_NO_FILES = {State.MISSING, State.FAILED}
_OURS = {Origin.MEMORY, Origin.REBUILD}
SUBJECT_MAX = 512  # characters of an audit entry's subject
WAIT_S_MAX = 60.0
WAIT_POLL_S = 0.05  # first look; doubles up to a second: a wait is for people, pushes are for trainers


class Commands:
    """One method per acting op."""

    def __init__(self, plant: Plant, tools: Tools, doctor: Handler) -> None:
        """`stop` and `reload` are set by whoever composes the daemon."""
        self._plant = plant
        self._front = plant.front
        self._tools = tools
        self.stop: Callable[[], None] = lambda: None
        self.reload: Callable[[], Awaitable[dict[str, Any]]]
        self.handlers: dict[type[ask.Request], Handler] = {
            ask.Verify: self.verify,
            ask.Wait: self.wait,
            ask.Pin: self.pin,
            ask.Unpin: self.unpin,
            ask.Unveto: self.unveto,
            ask.Remove: self.remove,
            ask.Rebuild: self.rebuild,
            ask.RootAdd: self.add_root,
            ask.Doctor: doctor,
            ask.Stop: self._stop,
            ask.Reload: self._reload,
        }

    @property
    def _catalog(self) -> Catalog:
        return self._front.catalog

    async def verify(self, peer: Peer, request: ask.Verify) -> Answer:
        """Read one checkpoint back now, and record what was found."""
        row = await select(self._front, peer, request)
        if row.state not in {State.LIVE, State.CORRUPT, State.MISSING}:
            raise NotFound(f"checkpoint {row.id} is {row.state}: there is nothing on disk to verify")
        await self._allowed(HookEvent.BEFORE_INTEGRITY_CHECK, row)
        begun_s = self._front.clock.monotonic_s()
        read = await subject(self._tools, row.id)
        damage, seen = await read_back(self._tools, read)
        ms = round((self._front.clock.monotonic_s() - begun_s) * 1000, 1)
        after = await self._record(read, damage, seen)
        result = {
            "checkpoint": row.id,
            "project": row.project,
            "name": row.experiment,
            "step": row.step,
            "path": row.path,
            "ok": not damage,
            "state": str(after.state),
            "read_bytes": row.size_bytes,
            "ms": ms,
            "damage": [
                {"file": d.file, "kind": d.kind, "detail": d.detail, "mib": list(d.mib), "tensors": list(d.tensors)}
                for d in damage
            ],
        }
        return {"results": [result]}

    async def _record(self, read: Subject, damage: list[Damage], seen: Identity | None) -> Checkpoint:
        """Write down what was found; damage that an arena can make good goes to the pipeline, which repairs it."""
        row = read.checkpoint
        rules = self._front.settings().rules_for(row.project, row.experiment)
        if damage:
            kept = self._tools.sources.keep(row.id)  # at once: a trainer may ask for memory while this is written down
            after = await self._catalog.write(lambda tx: bad(tx, read, damage, rules))
            if kept:
                await self._front.admission.recheck(after)
        else:
            after = await self._catalog.write(lambda tx: good(tx, read, seen, rules))
        await link.place(self._tools, after)
        return after

    async def wait(self, peer: Peer, request: ask.Wait) -> Answer:
        """Answer once the checkpoint has the level, or can't get there any more."""
        wanted = Level(request.level)
        pause_s = WAIT_POLL_S
        with anyio.move_on_after(min(request.timeout_s, WAIT_S_MAX)):
            while True:
                row = await self._waited_for(peer, request)
                if row is not None and (row.state in _ENDED or row.level.rank >= wanted.rank):
                    return level_of(row)
                await anyio.sleep(pause_s)
                pause_s = min(pause_s * 2, 1.0)
        raise TimedOut(f"{request.checkpoint or request.selector} did not reach {wanted} in {request.timeout_s:g} s")

    async def _waited_for(self, peer: Peer, request: ask.Wait) -> Checkpoint | None:
        if request.checkpoint is None:
            return await select(self._front, peer, request)
        wanted = request.checkpoint

        async def read(conn: AsyncConnection) -> Checkpoint | None:
            owners = await owners_of(conn, [wanted])
            if not sees_all(peer.uid) and owners.get(wanted) != peer.uid:
                return None
            return (await checkpoints.get_many(conn, [wanted])).get(wanted)

        return await self._catalog.read(read)

    async def pin(self, peer: Peer, request: ask.Pin) -> Answer:
        """Hold a checkpoint by hand."""
        row = await select(self._front, peer, request)

        async def pin(tx: Tx) -> bool:
            held = await holds.of_checkpoint(tx.conn, row.id, tx.clock.now())
            if any(hold.kind == "pin" and hold.note == request.note for hold in held):
                return False
            await holds.pin(tx, row.id, peer.uid, request.note)
            await audits.record(
                tx, Deed(uid=peer.uid, pid=peer.pid, verb="pin", subject=row.id, after={"note": request.note})
            )
            return True

        return _named(row, changed=await self._catalog.write(pin))

    async def unpin(self, peer: Peer, request: ask.Unpin) -> Answer:
        """Lift a hold."""
        row = await select(self._front, peer, request)

        async def unpin(tx: Tx) -> bool:
            changed = await holds.unpin(tx, row.id, peer.uid)
            if changed:
                deed = Deed(uid=peer.uid, pid=peer.pid, verb="unpin", subject=row.id, note=request.note)
                await audits.record(tx, deed)
            return changed

        return _named(row, changed=await self._catalog.write(unpin))

    async def unveto(self, peer: Peer, request: ask.Unveto) -> Answer:
        """Let a checkpoint count whose save a hook has vetoed. Its owner may, and the operator."""
        row = await select(self._front, peer, request)
        deed = Deed(uid=peer.uid, pid=peer.pid, verb="unveto", subject=row.id, note=request.note)
        return _named(row, changed=await self._front.admission.unveto(deed))

    async def remove(self, peer: Peer, request: ask.Remove) -> Answer:
        """Move one checkpoint to the trash, unless a promise holds it; forget one that has no files."""
        row = await select(self._front, peer, request)
        if request.state is not None and row.state != request.state:
            raise Changed(f"checkpoint {row.id} is {row.state} now, not {request.state}: nothing was done")
        if request.give_up or (row.state is State.PENDING and row.origin is Origin.MEMORY):
            return await self._give_up(peer, row, request)
        if row.state in _NO_FILES:
            return await self._forget(peer, row, dry_run=request.dry_run)
        root = await self._catalog.read(lambda conn: roots.by_path(conn, row.root))
        if root is None or not root.may_remove(row.origin):
            raise Held(
                f"{row.path} lies under {row.root}, where ckptd may not delete",
                hint="set allow_delete for this root, or remove the file yourself",
                holds=["root"],
            )
        grace_h = self._front.settings().rules_for(row.project, row.experiment).trash_grace_s / 3600
        if request.dry_run:

            async def look_at(conn: AsyncConnection) -> list[str]:
                return await retain.kept_by(Tx(conn, self._front.clock), row)

            why = await self._catalog.read(look_at)
            if why:
                raise Held(f"checkpoint {row.id} is kept: {', '.join(why)}", holds=why)
        else:
            await self._allowed(HookEvent.BEFORE_CHECKPOINT_DELETE, row, why=f"removed by uid {peer.uid}")
            await retain.remove(self._tools, row, peer.uid, peer.pid)
            await link.place(self._tools, row)
            if await self._catalog.read(lambda conn: checkpoints.state_of(conn, row.id)) is State.MISSING:
                raise Changed(
                    f"{row.path} is not what was recorded: it stays as it is, and checkpoint {row.id} is missing",
                    hint="look at what is there; `ckpt verify` says whether it is the checkpoint",
                )
        return _removed(row, "trash", f"removed by uid {peer.uid}; restorable for {grace_h:g} h")

    async def _allowed(self, point: HookEvent, row: Checkpoint, **more: Any) -> None:
        """Vetoed when a hook forbids it."""
        objection = await asking.about(self._tools, point, row, **more)
        if objection:
            raise Vetoed(f"checkpoint {row.id}: {objection}", checkpoint=row.id)

    async def _give_up(self, peer: Peer, row: Checkpoint, request: ask.Remove) -> Answer:
        if not request.give_up:
            raise Held(
                f"checkpoint {row.id} is on its way: its bytes are in memory or in the spool, and nowhere else",
                hint="`ckpt doctor` says what it waits for; `ckpt rm --give-up` ends it, and nothing of it is left",
                holds=["pending"],
            )
        if request.dry_run:
            await self._catalog.read(lambda conn: giveup.look_at(Tx(conn, self._front.clock), row))
        else:
            await self._allowed(HookEvent.BEFORE_CHECKPOINT_DELETE, row, why=f"given up by uid {peer.uid}")
            await giveup.give_up(self._tools, row, peer.uid, peer.pid)
        return _removed(row, "give up", "its bytes were in memory or in the spool alone: nothing of it is left")

    async def _forget(self, peer: Peer, row: Checkpoint, *, dry_run: bool) -> Answer:
        async def forget(tx: Tx) -> None:
            if (await checkpoints.get(tx.conn, row.id)).state in _NO_FILES:
                await checkpoints.mark_dropped(tx, row.id)
                await audits.record(tx, Deed(uid=peer.uid, pid=peer.pid, verb="forget", subject=row.id))

        await self._gone(row)
        if not dry_run:
            await self._catalog.write(forget)
        theirs = row.state is State.FAILED and row.origin not in _OURS
        rest = "ckptd holds nothing of it, and the file stays where it is" if theirs else "nothing of it is on disk"
        return _removed(row, "forget", f"it is {row.state}: {rest}")

    async def _gone(self, row: Checkpoint) -> None:
        """Held when files lie in its place that no other row is about: forgotten, they would be lost, or found anew.

        RootDegraded, TimedOut  its disk doesn't answer: nobody can say
        """
        if not row.path or row.origin is Origin.FILE:
            return
        newest = (await self._catalog.read(lambda conn: arrivals.at_paths(conn, [row.path]))).get(row.path)
        if newest is not None and newest.id != row.id:
            return
        try:
            answer = await self._tools.workers.call(Settle(root=row.root, path=row.path, quiet_s=0.0, told=True))
        except (NotFound, Missing):  # its root is gone as well
            return
        if answer.reason == "gone":
            return
        hint = "`ckpt verify` reads it, `ckpt rebuild` takes it in again" if row.origin in _OURS else ""
        raise Held(
            f"checkpoint {row.id} is {row.state}, but something lies at {row.path}",
            hint=hint or "mend that file, or remove it; else the next scan finds it again",
            holds=["files"],
        )

    async def rebuild(self, peer: Peer, request: ask.Rebuild) -> Answer:
        """Read every manifest under the roots back into the catalog. A root that fails says so in its own line.

        One that is named is taken for the right one, whatever was known by its path.
        """
        require_operator(peer, "rebuild")
        wanted = None if request.root is None else check_directory(request.root)
        if wanted is not None and await self._catalog.read(lambda conn: roots.by_path(conn, wanted)) is None:
            await self._front.admission.ensure_root(NewRoot(path=wanted, kind=RootKind.MANAGED, uid=os.getuid()))
        found = []
        for root in await self._catalog.read(roots.all_roots):
            if root.kind is RootKind.MANAGED and wanted in {None, root.path}:
                try:
                    done = await self._plant.reconciler.scan(root, adopt=wanted is not None)
                except CkptdError as error:
                    done = Reconciled(problem=error.message)
                found.append(
                    {
                        "root": root.path,
                        "found": done.found,
                        "added": done.added,
                        "known": done.known,
                        "damaged": done.damaged,
                        "problem": done.problem,
                    }
                )
        return {"roots": found}

    async def add_root(self, peer: Peer, request: ask.RootAdd) -> Answer:
        """Manage or watch one more tree."""
        require_operator(peer, "root.add")
        path = check_directory(request.path)
        if request.project:
            check_name("project", request.project)
        known = await self._catalog.read(lambda conn: roots.by_path(conn, path))
        if known is not None and known.kind is RootKind.MANAGED and request.kind == "watched":
            raise BadPath(f"{path} is managed already: ckptd writes there itself")
        same = known is not None and known.kind == request.kind
        new = NewRoot(
            path=path,
            kind=RootKind(request.kind),
            uid=owner_of(peer.uid),
            project=request.project or (known.project if known else ""),
            allow_delete=known.allow_delete if same and known else False,
            allow_links=known.allow_links if same and known else False,
        )

        async def add(tx: Tx) -> Root:
            root = await roots.ensure(tx, new)
            subject_text = path if len(path) <= SUBJECT_MAX else f"root {root.id}"
            after = {"path": path, "kind": request.kind}
            deed = Deed(uid=peer.uid, pid=peer.pid, verb="root.add", subject=subject_text, after=after)
            await audits.record(tx, deed)
            return root

        root = await self._catalog.write(add)
        self._front.admission.on_root(root)
        return {"root": path, "kind": str(root.kind), "added": known is None}

    async def _stop(self, peer: Peer, _request: ask.Stop) -> Answer:
        require_operator(peer, "stop")
        self.stop()
        return {}

    async def _reload(self, peer: Peer, _request: ask.Reload) -> Answer:
        require_operator(peer, "reload")
        return await self.reload()


def require_operator(peer: Peer, op: str) -> None:
    """NotAuthorized unless the peer is root or the daemon's own user."""
    if not sees_all(peer.uid):
        raise NotAuthorized(f"{op} is for root and for the daemon's own user", hint="ask who runs this daemon")


def _removed(row: Checkpoint, action: str, reason: str) -> Answer:
    return {
        "checkpoint": row.id,
        "project": row.project,
        "name": row.experiment,
        "step": row.step,
        "path": row.path,
        "size_bytes": row.size_bytes,
        "action": action,
        "reason": reason,
    }


def _named(row: Checkpoint, *, changed: bool) -> Answer:
    return {"checkpoint": row.id, "project": row.project, "name": row.experiment, "step": row.step, "changed": changed}
