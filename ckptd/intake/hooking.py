"""What people ask about hooks: which there are and how they do, on and off, a trial, recent runs; and verbs of plug-ins."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ckptd.catalog import audits, checkpoints, hookruns
from ckptd.catalog.hookruns import Logged, Ran
from ckptd.errors import BadRequest, NotFound
from ckptd.hooks import accept
from ckptd.hooks.context import Context
from ckptd.hooks.result import Outcome
from ckptd.hooks.spec import Priority, Spec
from ckptd.intake import describe
from ckptd.intake import hookrequests as ask
from ckptd.intake.commands import require_operator
from ckptd.intake.control import fit, page_number
from ckptd.intake.fields import Request
from ckptd.intake.listener import Peer
from ckptd.intake.training import Answer, Front, Handler
from ckptd.model import new_id
from ckptd.pipeline.hooked import Hooked
from ckptd.pipeline.telling import about, bounded

RAN = (Outcome.OK, Outcome.FAILED, Outcome.TIMEOUT, Outcome.VETOED)


class Hooking:
    """One method per op about hooks. All of them are the operator's."""

    def __init__(self, front: Front, hooked: Hooked) -> None:
        """Keep what the methods ask."""
        self._front = front
        self._hooked = hooked
        self.handlers: dict[type[Request], Handler] = {
            ask.Hooks: self.hooks,
            ask.HookTest: self.test,
            ask.HookSwitch: self.switch,
            ask.HookRuns: self.runs,
            ask.Extension: self.extension,
        }

    async def hooks(self, peer: Peer, _request: ask.Hooks) -> Answer:
        """Describe every hook, in order of registration, with its figures."""
        require_operator(peer, "hooks")
        await self._hooked.delivery.flush()

        async def read(conn: AsyncConnection) -> tuple[dict[str, list[float]], dict[str, Ran]]:
            return await hookruns.durations_ms(conn), await hookruns.last_errors(conn)

        durations, errors = await self._front.catalog.read(read)
        figures = self._hooked.runner.figures()
        shown = [
            {
                **_described(spec),
                **self._figures(spec.name, durations.get(spec.name, [])),
                "circuit": figures[spec.name]["circuit"],
                "last_error": errors[spec.name].detail if spec.name in errors else "",
                "last_error_at": describe.at(errors[spec.name].at) if spec.name in errors else None,
            }
            for spec in self._hooked.registry
        ]
        verbs = [
            {"verb": name, "target": spec.target, "source": spec.source} for name, spec in self._hooked.verbs.items()
        ]
        return {"enabled": self._hooked.registry.enabled, "hooks": fit(shown), "verbs": verbs}

    def _figures(self, name: str, durations_ms: list[float]) -> dict[str, Any]:
        counts, behind = self._hooked.delivery.state_of(name)
        return {
            "calls": sum(counts.get(outcome, 0) for outcome in RAN),
            **{str(outcome): counts.get(outcome, 0) for outcome in Outcome},
            "missed": counts.get("missed", 0),
            "behind": behind,
            "p50_ms": _percentile(durations_ms, 0.50),
            "p95_ms": _percentile(durations_ms, 0.95),
        }

    async def test(self, peer: Peer, request: ask.HookTest) -> Answer:
        """Run one hook now; no statistic, no circuit and no checkpoint is touched by it."""
        require_operator(peer, "hooks.test")
        spec = self._hooked.registry.get(request.hook)
        events = accept.events([request.event] if request.event else [*spec.events[:1]], spec.name)
        if not events:
            raise BadRequest(f"hook {spec.name!r} names no event: say which one to try")
        data, experiment_id = dict(request.data), ""
        if request.checkpoint is not None:
            wanted = request.checkpoint
            row = await self._front.catalog.read(lambda conn: checkpoints.get(conn, wanted))
            data, experiment_id = {**about(row), **data}, row.experiment_id
        context = bounded(
            Context(
                events[0], f"test-{new_id()}", self._front.clock.now(), experiment_id, request.checkpoint or "", data
            )
        )
        run = await self._hooked.runner.deliver(context, spec, counted=False)
        return {"run": run.to_wire(), "context": context.to_wire()}

    async def switch(self, peer: Peer, request: ask.HookSwitch) -> Answer:
        """Enable or disable a hook; later daemons remember."""
        require_operator(peer, "hooks.switch")
        changed = await self._hooked.delivery.switch(request.hook, enabled=request.enabled)
        if request.enabled:
            self._hooked.runner.reset(request.hook)
        after = {"enabled": request.enabled}
        deed = audits.Deed(uid=peer.uid, pid=peer.pid, verb="hooks.switch", subject=f"hook {request.hook}", after=after)
        await self._front.catalog.write(lambda tx: audits.record(tx, deed))
        return {"hook": request.hook, "enabled": request.enabled, "changed": changed}

    async def runs(self, peer: Peer, request: ask.HookRuns) -> Answer:
        """Page through recent runs, newest first."""
        require_operator(peer, "hooks.log")
        await self._hooked.delivery.flush()
        after = None if request.after is None else page_number(request.after)
        logged, cursor = await self._front.catalog.read(
            lambda conn: hookruns.runs(
                conn, name=request.hook, outcome=request.outcome, limit=request.limit, after=after
            )
        )
        shown = fit([_entry(one) for one in logged])
        if len(shown) < len(logged):
            cursor = logged[len(shown) - 1].no
        return {"runs": shown, "next": None if cursor is None else str(cursor)}

    async def extension(self, peer: Peer, request: ask.Extension) -> Answer:
        """Run a plug-in's verb. NotFound when no plug-in adds it."""
        spec = self._hooked.verbs.get(request.verb)
        if spec is None:
            raise NotFound(
                f"no plug-in adds the verb {request.verb}", hint="`ckpt hooks list --json` lists them under verbs"
            )
        sender = {"uid": peer.uid, "pid": peer.pid}
        context = bounded(
            Context(request.verb, f"verb-{new_id()}", self._front.clock.now(), data={**request.data, "sender": sender})
        )
        run = await self._hooked.runner.deliver(context, spec, counted=False)
        return {"verb": request.verb, "run": run.to_wire()}


def _described(spec: Spec) -> dict[str, Any]:
    known = {int(priority): priority.name for priority in Priority}
    return {
        "name": spec.name,
        "kind": str(spec.kind),
        "target": spec.target,
        "events": [str(event) for event in spec.events],
        "priority": known.get(int(spec.priority), str(int(spec.priority))),
        "timeout_s": spec.timeout_s,
        "when": spec.condition,
        "enabled": spec.enabled,
        "source": spec.source,
        "problem": spec.problem,
    }


def _percentile(ordered: list[float], share: float) -> float | None:
    """Return the value that `share` of the runs did not exceed (nearest rank); None without runs."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def _entry(logged: Logged) -> dict[str, Any]:
    run = logged.run
    return {
        "entry": logged.no,
        "hook": logged.hook,
        "at": describe.at(run.at),
        "event": run.event,
        "key": run.key,
        "outcome": run.outcome,
        "ms": run.ms,
        "experiment": run.experiment_id or None,
        "checkpoint": run.checkpoint_id or None,
        "detail": run.detail,
    }
