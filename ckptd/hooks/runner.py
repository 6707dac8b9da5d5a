"""Runs hooks: asks them before an act, tells them after it, and lets none of them do harm.

Whatever a hook does, `ask` and `deliver` return: an error, a timeout, a dead child are outcomes, not
exceptions. Whoever waits for one hook waits at most twice its timeout_s: once for its turn, once for its run.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anyio
from anyio.abc import TaskStatus

from ckptd.clock import Clock
from ckptd.config import HooksDefaults
from ckptd.errors import CkptdError
from ckptd.hooks import condition, inprocess, letter
from ckptd.hooks.breaker import Breaker
from ckptd.hooks.builtin import relays
from ckptd.hooks.context import Context
from ckptd.hooks.hosts import Hosts
from ckptd.hooks.points import may_veto
from ckptd.hooks.registry import Registry
from ckptd.hooks.result import ALLOWED, TEXT_CHARS_MAX, Outcome, Run, Verdict
from ckptd.hooks.spec import Kind, Spec
from ckptd.hooks.tally import Tally

Report = Callable[[Run, Context], None]
DECLARING_MAX = 4  # modules imported at once
LETTERS_MAX = 16  # webhooks and mails under way at once; each has a thread while it is sent
DECLARING_S_MAX = 30.0  # how long the first question waits for what Python hooks say of themselves
_NOT_ITS_FAULT = {Outcome.SKIPPED, Outcome.OPEN}


class Runner:
    """The hooks at work. For the event loop's thread only.

    `report` is called with every run and its context, in the order in which they end; it must not block.
    """

    def __init__(self, registry: Registry, clock: Clock, report: Report, defaults: HooksDefaults | None = None) -> None:
        """Run nothing yet."""
        self.registry = registry
        self._clock = clock
        self._report = report
        self._defaults = defaults or HooksDefaults()
        self._hosts = Hosts(self._defaults)
        self._inprocess = inprocess.Built()
        self._running = anyio.CapacityLimiter(self._defaults.running_max)
        self._writing = anyio.CapacityLimiter(LETTERS_MAX)
        self._tallies: dict[str, Tally] = {}
        self._breakers: dict[str, Breaker] = {}
        self._declared = anyio.Event()
        self._changed = anyio.Event()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Own the child hosts until cancelled: then every process of every hook is ended, within some seconds.

        Started at once; what Python hooks say of themselves is asked in the background, and `ask` waits for it.
        """
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._hosts.run)
                task_status.started()
                while True:
                    self._changed = anyio.Event()
                    await self._declare()
                    if not self._changed.is_set():
                        self._declared.set()
                    await self._changed.wait()
        finally:
            with anyio.CancelScope(shield=True):
                await self._hosts.close()

    def adopt(self, registry: Registry) -> None:
        """Use another registry from now on, as after a reload. Hosts of hooks that are gone or changed end."""
        self.registry = registry
        known, self._declared = self._declared, anyio.Event()
        known.set()  # who waits for it finds the new one
        self._hosts.keep(registry)
        self._inprocess.keep(registry)
        self._changed.set()

    async def ask(self, context: Context) -> Verdict:
        """Ask the hooks of a before_* point, one after the other, in order. The first veto ends it.

        An error or a timeout is no veto. Without a hook at this point it returns at once.
        """
        if not self._declared.is_set() and self.registry.enabled and self.registry.undeclared:
            with anyio.move_on_after(DECLARING_S_MAX):
                while not self._declared.is_set():
                    await self._declared.wait()
        specs = self.registry.of(context.event)
        if not specs:
            return ALLOWED
        runs: list[Run] = []
        for spec in specs:
            run = await self._one(context, spec, lane="ask")
            runs.append(run)
            if run.outcome is Outcome.VETOED:
                break
        return Verdict(tuple(runs))

    async def deliver(self, context: Context, spec: Spec, *, counted: bool = True) -> Run:
        """Tell one hook one fact. Waits for its turn: hooks_defaults.running_max processes and LETTERS_MAX messages at once.

        A webhook or a mail is tried again for at most its options' retry_s_max, and waits for a turn at each attempt:
        a server that is away keeps nobody else waiting. `counted=False` is for a trial by hand: neither statistics
        nor the circuit know of it, nothing is reported, and an open circuit is no obstacle.
        """
        if spec.kind in {Kind.WEBHOOK, Kind.MAIL}:
            return await self._one(context, spec, lane="tell", counted=counted)
        async with self._running:
            return await self._one(context, spec, lane="tell", counted=counted)

    def figures(self) -> dict[str, dict[str, Any]]:
        """Return the statistics of every hook by name, with the state of its circuit as "circuit"."""
        found = {}
        for spec in self.registry:
            breaker = self._breakers.get(spec.name)
            circuit = "closed" if breaker is None else str(breaker.state)
            found[spec.name] = {**self._tallies.get(spec.name, Tally()).to_wire(), "circuit": circuit}
        return found

    def reset(self, name: str) -> None:
        """Forget what a hook did wrong, as when a person enables it: close its circuit, import its module if need be."""
        self._breakers.pop(name, None)
        if self.registry.get(name).problem:
            self.registry.mend(name)
        self._changed.set()

    async def _declare(self) -> None:
        """Learn what Python hooks say of themselves, build the built-in ones, warm up what will be asked."""
        registry, at_once = self.registry, anyio.CapacityLimiter(min(DECLARING_MAX, self._defaults.hosts_max))
        for spec in registry:
            if spec.kind is Kind.INPROCESS:
                try:
                    self._inprocess.build(spec)
                except CkptdError as error:
                    registry.fail(spec.name, error.message)
        async with anyio.create_task_group() as group:
            for spec in registry.undeclared:
                group.start_soon(self._declare_one, registry, spec, at_once)
        self._hosts.keep(self.registry)
        for spec in registry:
            if spec.kind is Kind.EXEC and spec.enabled and any(may_veto(event) for event in spec.events):
                self._hosts.warm(spec)

    async def _declare_one(self, registry: Registry, spec: Spec, at_once: anyio.CapacityLimiter) -> None:
        async with at_once:
            try:
                registry.declare(spec.name, await self._hosts.declared(spec))
            except CkptdError as error:
                registry.fail(spec.name, error.message)
            except (KeyError, TypeError, ValueError, AttributeError) as error:  # its code may say anything at all
                registry.fail(spec.name, f"what its code says of itself can't be: {error}"[:TEXT_CHARS_MAX])

    async def _one(self, context: Context, spec: Spec, *, lane: str, counted: bool = True) -> Run:
        """Run one hook under everything that bounds it."""
        run = Run(spec.name, context.event, context.key, self._clock.now(), Outcome.OK)
        breaker = self._breaker(spec.name)
        if spec.problem:
            return self._end(replace(run, outcome=Outcome.FAILED, error=spec.problem), context, counted=counted)
        try:
            if spec.condition and not condition.parse(spec.condition)(context):
                return self._end(replace(run, outcome=Outcome.SKIPPED), context, counted=counted)
        except (ValueError, TypeError, OverflowError) as error:
            run = replace(run, outcome=Outcome.FAILED, error=f"when: {error}"[:TEXT_CHARS_MAX])
            return self._end(run, context, counted=counted)
        if counted and not breaker.allows(self._clock.monotonic_s()):
            return self._end(replace(run, outcome=Outcome.OPEN), context, counted=counted)
        try:
            run, ran = await self._execute(run, context, spec, lane)
        except BaseException:
            breaker.release()
            raise
        if not counted:
            return run
        if ran and run.outcome not in _NOT_ITS_FAULT:
            good = run.outcome in {Outcome.OK, Outcome.VETOED}
            run = replace(run, opened=breaker.record(self._clock.monotonic_s(), good=good))
        else:
            breaker.release()
        return self._end(run, context, counted=counted)

    async def _execute(self, run: Run, context: Context, spec: Spec, lane: str) -> tuple[Run, bool]:
        """Return the run, ended, and whether the hook itself had its chance."""
        began_s = self._clock.monotonic_s()
        ran = True
        if spec.kind is Kind.INPROCESS:
            run = await self._inprocess.call(run, context, spec)
        elif spec.kind in {Kind.WEBHOOK, Kind.MAIL}:
            run = await letter.send(run, letter.Letter(context, spec, self._clock), self._writing)
        else:
            run, ran = await self._hosts.call(run, context, spec, lane)
        if run.outcome is Outcome.VETOED and not may_veto(context.event):
            error = f"it vetoed ({run.error}), but {context.event} has happened: only before_* points can be vetoed"
            run = replace(run, outcome=Outcome.FAILED, error=error)
        if run.findings and context.event.startswith("hook.") and not relays(spec):
            error = f"it found something at {context.event}, which would be told there again, without end"
            run = replace(run, outcome=Outcome.FAILED, error=error, findings=())
        return replace(run, duration_s=run.duration_s or self._clock.monotonic_s() - began_s), ran

    def _end(self, run: Run, context: Context, *, counted: bool) -> Run:
        if counted:
            self._tallies.setdefault(run.hook, Tally()).record(run)
            self._report(run, context)
        return run

    def _breaker(self, name: str) -> Breaker:
        found = self._breakers.get(name)
        if found is None:
            limits = self._defaults
            found = self._breakers[name] = Breaker(limits.failures_max, limits.rest_s, limits.rest_s_max)
        return found
