"""What people ask about keeping: plans, their execution, why one checkpoint stays or goes, what comes back, tags."""

from dataclasses import asdict
from typing import Any

from ckptd import retention
from ckptd.catalog import audits, figures, listing, strips, tags
from ckptd.catalog.audits import Deed
from ckptd.catalog.tx import Tx
from ckptd.errors import Changed, CkptdError, NotFound
from ckptd.intake import requests as ask
from ckptd.intake import retentionrequests as keeping
from ckptd.intake.follow import visible_to
from ckptd.intake.listener import Peer
from ckptd.intake.training import Answer, Front, Handler, select
from ckptd.model import Checkpoint, State
from ckptd.pipeline import braking, history, link, retain, strip, trash
from ckptd.pipeline.tools import Tools
from ckptd.retention import Plan
from ckptd.rules import Rules


class Retiring:
    """One method per op."""

    def __init__(self, front: Front, tools: Tools) -> None:
        """Keep what the methods work with."""
        self._front = front
        self._tools = tools
        self.handlers: dict[type[ask.Request], Handler] = {
            keeping.Retention: self.retention,
            keeping.Explain: self.explain,
            keeping.Restore: self.restore,
            keeping.Tag: self.tag,
        }

    async def retention(self, peer: Peer, request: keeping.Retention) -> Answer:
        """Plan for every experiment that matches; carry the plans out when told to.

        Changed  a plan was named, and what there is to do now is something else: nothing is done
        """
        rows = await self._front.catalog.read(
            lambda conn: figures.matching(conn, request.project, request.name, visible_to(peer.uid))
        )
        if not request.apply:
            decided = [await self._planned(*row) for row in rows]
            found = [
                {**_wire(row, self._rules(row), plan), "held": self._held(row, plan)}
                for row, plan in zip(rows, decided, strict=True)
            ]
            return {"plans": found, "applied": False, "digest": retention.digest(decided)}
        wanted = await self._agreed(rows, request)
        done, plans = [], []
        for row in rows:
            if row[0] in wanted:
                plan, problem = await self._applied(row, wanted[row[0]])
                done.append(plan)
                plans.append({**_wire(row, self._rules(row), plan), "problem": problem})
        about = request.name or request.project or "*"
        counts = {"dropped": sum(len(plan.drop) for plan in done), "stripped": sum(len(plan.strip) for plan in done)}
        deed = Deed(
            uid=peer.uid, pid=peer.pid, verb="retention.apply", subject=about, after=counts, note=request.plan or ""
        )
        await self._front.catalog.write(lambda tx: audits.record(tx, deed))
        return {"plans": plans, "applied": True, "digest": retention.digest(done)}

    async def _agreed(self, rows: list[tuple[str, str, str]], request: keeping.Retention) -> dict[str, retain.Wanted]:
        """Return for each experiment how far its apply may go."""
        if request.plan is None:
            return {row[0]: retain.Wanted(only=request.only) for row in rows}
        decided = {row[0]: await self._planned(*row) for row in rows}
        now = retention.digest(decided.values())
        if now != request.plan:
            raise Changed(
                f"plan {request.plan} is not what there is to do now, which is {now}",
                hint="`ckpt retention plan` shows it; nothing was done",
            )
        return {
            experiment_id: retain.Wanted(only=request.only, digest=retention.digest([plan]))
            for experiment_id, plan in decided.items()
            if plan.drop or plan.strip
        }

    async def _planned(self, experiment_id: str, project: str, name: str) -> Plan:
        return await retain.plan(self._tools, experiment_id, self._front.settings().rules_for(project, name))

    def _held(self, row: tuple[str, str, str], decided: Plan) -> dict[str, Any] | None:
        """Say why the daemon would not carry a plan out by itself, None when it would. What is held is noted anew."""
        braking.seen(self._tools, row[0], decided, self._rules(row))
        found = retention.brake(decided, self._rules(row))
        return None if found is None else {**asdict(found), "words": found.words}

    def _rules(self, row: tuple[str, str, str]) -> Rules:
        return self._front.settings().rules_for(row[1], row[2])

    async def _applied(self, row: tuple[str, str, str], wanted: retain.Wanted) -> tuple[Plan, str]:
        """Apply one experiment's plan. What goes wrong there is said beside it, and stops no other."""
        linked = await self._relinked(row[0])
        wanted = retain.Wanted(only=wanted.only, digest=wanted.digest, linked=linked)
        try:
            return await retain.apply(self._tools, row[0], self._rules(row), wanted), ""
        except CkptdError as error:
            return Plan((), ()), error.message

    async def _relinked(self, experiment_id: str) -> list[str]:
        """Place an experiment's links before anything of it is retired; return the ids they lead to."""
        rows = await self._front.catalog.read(lambda conn: listing.of_experiment(conn, experiment_id))
        return await link.place(self._tools, rows[-1]) if rows else []

    async def explain(self, peer: Peer, request: keeping.Explain) -> Answer:
        """Say why one checkpoint stays or goes, which rules looked at it, and what would change that."""
        row = await select(self._front, peer, request)
        if row.state is State.TRASHED:
            raise NotFound(
                f"checkpoint {row.id} is in the trash: retention has nothing to decide",
                hint="`ckpt show ID` says why it went, `ckpt restore ID` brings it back",
            )
        rules = self._front.settings().rules_for(row.project, row.experiment)
        found = await self._front.catalog.read(
            lambda conn: history.read(conn, self._front.clock, row.experiment_id, rules)
        )
        said = retention.explain(found.checkpoints, rules, found.given, row.id)
        taken = await self._front.catalog.read(lambda conn: strips.of_checkpoint(conn, row.id))
        return {
            **_named(row),
            "state": str(row.state),
            "verdict": said.verdict,
            "why": list(said.why),
            "rules": list(rules.words()),
            "looked": [
                {"rule": one.rule, "words": one.words, "keeps": one.keeps, "why": one.why} for one in said.looked
            ],
            "strip": said.strip,
            "stripped": None if taken is None else {"state": str(taken.state), "files": list(taken.files)},
            "changes": list(said.changes),
        }

    async def restore(self, peer: Peer, request: keeping.Restore) -> Answer:
        """Bring a retired checkpoint back, or the optimizer states that were taken out of one. NotFound, Exists."""
        row = await select(self._front, peer, request)
        if row.state is State.TRASHED:
            after = await trash.restore(self._tools, row, peer.uid, peer.pid, pin=request.pin)
            await link.place(self._tools, after)
            back = {"path": after.path, "state": str(after.state), "restored": "checkpoint", "pinned": request.pin}
            return {**_named(row), **back}
        taken = await strip.undo(self._tools, row, peer.uid, peer.pid, pin=request.pin)
        back = {"path": row.path, "state": str(row.state), "restored": sorted(taken.files), "pinned": request.pin}
        return {**_named(row), **back}

    async def tag(self, peer: Peer, request: keeping.Tag) -> Answer:
        """Add and remove a checkpoint's tags."""
        row = await select(self._front, peer, request)

        async def change(tx: Tx) -> tuple[tuple[str, ...], bool]:
            after, changed = await tags.change(tx, row.id, request.add, request.remove)
            if changed:
                before = {"tags": list(row.tags)}
                deed = Deed(
                    uid=peer.uid, pid=peer.pid, verb="tag", subject=row.id, before=before, after={"tags": after}
                )
                await audits.record(tx, deed)
            return after, changed

        after, changed = await self._front.catalog.write(change)
        return {**_named(row), "tags": list(after), "changed": changed}


def _named(row: Checkpoint) -> dict[str, Any]:
    return {"checkpoint": row.id, "project": row.project, "name": row.experiment, "step": row.step}


def _wire(row: tuple[str, str, str], rules: Rules, decided: Plan) -> dict[str, Any]:
    """Return the plan object of one experiment."""
    experiment_id, project, name = row
    return {
        "project": project,
        "name": name,
        "experiment": experiment_id,
        "rules": list(rules.words()),
        "digest": retention.digest([decided]),
        "keep": [{**_entry(one.checkpoint, list(one.why)), "spare": one.spare} for one in decided.keep],
        "drop": [_entry(one.checkpoint, [one.why]) for one in decided.drop],
        "strip": [_entry(one, [f"not among the newest {rules.strip_after}"]) for one in decided.strip],
    }


def _entry(row: Checkpoint, why: list[str]) -> dict[str, Any]:
    return {"checkpoint": row.id, "step": row.step, "size_bytes": row.size_bytes, "why": why}
