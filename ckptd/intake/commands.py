"""What people ask through `ckpt` and that changes something: verify, pin, remove, retire, rebuild."""

import os
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from ckptd.catalog import Catalog, audits, checkpoints, figures, holds, listing, roots
from ckptd.catalog.audits import Deed
from ckptd.catalog.roots import NewRoot
from ckptd.catalog.tx import Tx
from ckptd.config import Rules
from ckptd.errors import BadPath, Held, NotAuthorized, NotFound, TimedOut
from ckptd.intake import requests as ask
from ckptd.intake.control import Plant
from ckptd.intake.descriptor import check_directory
from ckptd.intake.follow import level_of
from ckptd.intake.listener import Peer
from ckptd.intake.training import Answer, Handler, select
from ckptd.model import Checkpoint, Damage, Level, RootKind, State
from ckptd.pipeline import link, retain
from ckptd.pipeline.tools import Tools
from ckptd.pipeline.verify import compare, refresh_best

_ENDED = {State.CORRUPT, State.MISSING, State.FAILED, State.REPLACED, State.TRASHED, State.DROPPED}
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
            ask.Remove: self.remove,
            ask.Retention: self.retention,
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
        begun_s = self._front.clock.monotonic_s()
        damage = await compare(self._tools, row)
        ms = round((self._front.clock.monotonic_s() - begun_s) * 1000, 1)
        after = await self._record(row, damage)
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

    async def _record(self, row: Checkpoint, damage: list[Damage]) -> Checkpoint:
        rules = self._front.settings().rules_for(row.project, row.experiment)

        async def record(tx: Tx) -> Checkpoint:
            if not damage:
                if row.state is State.MISSING:
                    found = await checkpoints.identity(tx.conn, row.id)
                    if found is not None:
                        await checkpoints.mark_restored(tx, row.id, row.path, found)
                after = await checkpoints.mark_verified(tx, row.id)
            elif all(d.kind == "missing" for d in damage):
                after = await checkpoints.mark_missing(tx, row.id, "its files are gone")
            else:
                after = await checkpoints.mark_corrupt(tx, row.id, damage)
            await refresh_best(tx, row.experiment_id, rules)
            return after

        after = await self._catalog.write(record)
        if damage:
            self._front.pool.free_checkpoint(row.id)
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
        known = await self._catalog.read(lambda conn: checkpoints.get_many(conn, [str(request.checkpoint)]))
        return known.get(request.checkpoint)

    async def pin(self, peer: Peer, request: ask.Pin) -> Answer:
        """Hold a checkpoint by hand."""
        row = await select(self._front, peer, request)

        async def pin(tx: Tx) -> None:
            await holds.pin(tx, row.id, peer.uid, request.note)
            await audits.record(
                tx, Deed(uid=peer.uid, pid=peer.pid, verb="pin", subject=row.id, after={"note": request.note})
            )

        await self._catalog.write(pin)
        return _named(row, changed=True)

    async def unpin(self, peer: Peer, request: ask.Unpin) -> Answer:
        """Lift a hold."""
        row = await select(self._front, peer, request)

        async def unpin(tx: Tx) -> bool:
            changed = await holds.unpin(tx, row.id)
            if changed:
                await audits.record(tx, Deed(uid=peer.uid, pid=peer.pid, verb="unpin", subject=row.id))
            return changed

        return _named(row, changed=await self._catalog.write(unpin))

    async def remove(self, peer: Peer, request: ask.Remove) -> Answer:
        """Move one checkpoint to the trash, unless a promise holds it."""
        row = await select(self._front, peer, request)
        root = await self._catalog.read(lambda conn: roots.by_path(conn, row.root))
        if root is None or not (root.kind is RootKind.MANAGED or root.allow_delete):
            raise Held(
                f"{row.path} lies under {row.root}, where ckptd may not delete",
                hint="set allow_delete for this root, or remove the file yourself",
                holds=["root"],
            )
        uid = await self._catalog.read(lambda conn: checkpoints.uid_of(conn, row.id))
        if peer.uid not in {uid, 0, os.getuid()}:
            raise NotAuthorized(f"checkpoint {row.id} belongs to uid {uid}")
        grace_h = self._front.settings().rules_for(row.project, row.experiment).trash_grace_s / 3600
        if request.dry_run:

            async def look(conn: Any) -> list[str]:
                return await retain.kept_by(Tx(conn, self._front.clock), row)

            why = await self._catalog.read(look)
            if why:
                raise Held(f"checkpoint {row.id} is kept: {', '.join(why)}", holds=why)
        else:
            await retain.remove(self._tools, row, peer.uid, peer.pid)
            await link.place(self._tools, row)
        return {
            "checkpoint": row.id,
            "project": row.project,
            "name": row.experiment,
            "step": row.step,
            "path": row.path,
            "size_bytes": row.size_bytes,
            "action": "trash",
            "reason": f"removed by uid {peer.uid}; restorable for {grace_h:g} h",
        }

    async def retention(self, peer: Peer, request: ask.Retention) -> Answer:
        """Plan for every experiment that matches; carry the plans out when told to."""
        rows = await self._catalog.read(lambda conn: figures.matching(conn, request.project, request.name))
        plans = []
        for experiment_id, project, name in rows:
            rules = self._front.settings().rules_for(project, name)
            if request.apply:
                linked = await self._relinked(experiment_id)
                decided = await retain.apply(self._tools, experiment_id, rules, only=request.only, linked=linked)
            else:

                async def read(conn: Any, of: str = experiment_id, rules: Rules = rules) -> Any:
                    return await retain.plan(Tx(conn, self._front.clock), of, rules)

                decided = await self._catalog.read(read)
            plans.append(
                {
                    "project": project,
                    "name": name,
                    "experiment": experiment_id,
                    "rules": describe_rules(rules),
                    "keep": [_entry(k.checkpoint, list(k.why)) for k in decided.keep],
                    "drop": [_entry(d.checkpoint, [d.why]) for d in decided.drop],
                }
            )
        if request.apply:
            deed = Deed(
                uid=peer.uid, pid=peer.pid, verb="retention.apply", subject=request.name or request.project or "*"
            )
            await self._catalog.write(lambda tx: audits.record(tx, deed))
        return {"plans": plans, "applied": request.apply}

    async def _relinked(self, experiment_id: str) -> list[str]:
        """Place an experiment's links before anything of it is retired; return the ids they lead to."""
        rows = await self._catalog.read(lambda conn: listing.of_experiment(conn, experiment_id))
        return await link.place(self._tools, rows[-1]) if rows else []

    async def rebuild(self, _peer: Peer, request: ask.Rebuild) -> Answer:
        """Read every manifest under the roots back into the catalog."""
        if request.root is not None:
            path = check_directory(request.root)
            known = await self._catalog.read(lambda conn: roots.by_path(conn, path))
            if known is None:
                await self._front.admission.managed_root(path, os.getuid())
        found = []
        for root in await self._catalog.read(roots.all_roots):
            if root.kind is RootKind.MANAGED and request.root in {None, root.path}:
                done = await self._plant.reconciler.scan(root)
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
        if self._front.settings().mode == "system" and peer.uid not in {0, os.getuid()}:
            raise NotAuthorized("roots of a system daemon are set in its configuration")
        path = check_directory(request.path)
        known = await self._catalog.read(lambda conn: roots.by_path(conn, path))
        if known is not None and known.kind is RootKind.MANAGED and request.kind == "watched":
            raise BadPath(f"{path} is managed already: ckptd writes there itself")
        new = NewRoot(path=path, kind=RootKind(request.kind), uid=peer.uid, project=request.project)

        async def add(tx: Tx) -> Any:
            root = await roots.ensure(tx, new)
            await audits.record(tx, Deed(uid=peer.uid, pid=peer.pid, verb="root.add", subject=path))
            return root

        root = await self._catalog.write(add)
        self._front.admission.on_root(root)
        return {"root": path, "kind": str(root.kind), "added": known is None}

    async def _stop(self, _peer: Peer, _request: ask.Stop) -> Answer:
        self.stop()
        return {}

    async def _reload(self, _peer: Peer, _request: ask.Reload) -> Answer:
        return await self.reload()


def describe_rules(rules: Rules) -> list[str]:
    """Say rules in words, as a plan's head shows them."""
    words = [f"last {rules.keep_last}"] if rules.keep_last is not None else []
    words += [f"best {rule.k} by {rule.metric} ({rule.mode})" for rule in rules.keep_best]
    return words + ([f"every {rules.keep_every} steps"] if rules.keep_every is not None else [])


def _named(row: Checkpoint, *, changed: bool) -> Answer:
    return {"checkpoint": row.id, "project": row.project, "name": row.experiment, "step": row.step, "changed": changed}


def _entry(row: Checkpoint, why: list[str]) -> dict[str, Any]:
    return {"checkpoint": row.id, "step": row.step, "size_bytes": row.size_bytes, "why": why}
