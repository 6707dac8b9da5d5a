"""The child hosts that are alive: started when needed, kept warm, ended when idle, too many, or past mending.

A hook has one host; one that is asked as well as told has two, so that a question never waits for a telling.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ckptd.config import HooksDefaults
from ckptd.errors import BadConfig, CkptdError, TimedOut
from ckptd.hooks import child
from ckptd.hooks.child import Child
from ckptd.hooks.context import Context
from ckptd.hooks.points import may_veto
from ckptd.hooks.registry import Registry
from ckptd.hooks.result import TEXT_CHARS_MAX, Answer, Outcome, Run
from ckptd.hooks.spec import Kind, Spec

START_S_MAX = 30.0  # of importing a hook's module
BACKSTOP_S = 2.0  # a host that is silent this long after its hook's time is up is ended from outside
SWEEP_S_MAX = 30.0


@dataclass(eq=False)
class _Place:
    """Where a host is or will be. The lock is its turn; `ready` is set while a host may be called."""

    spec: Spec
    stays: bool  # somebody will ask it and wait
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    ready: anyio.Event = field(default_factory=anyio.Event)
    preparing: bool = False
    host: Child | None = None
    answer: dict[str, Any] = field(default_factory=dict)  # of its start
    used_s: float = 0.0

    @property
    def problem(self) -> str:
        """Why its hook could not be started, "" when it could."""
        return str(self.answer.get("problem", ""))[:TEXT_CHARS_MAX]


class Hosts:
    """All hosts. For the event loop's thread; `run` must be running."""

    def __init__(self, limits: HooksDefaults) -> None:
        """Start nothing yet."""
        self._limits = limits
        self._places: dict[tuple[str, str], _Place] = {}
        self._alive: set[_Place] = set()  # at most hosts_max: those with a host, or about to have one
        self._freed = anyio.Event()
        self._group: TaskGroup | None = None

    async def run(self) -> None:
        """Start hosts in the background and end those that are idle, until cancelled."""
        async with anyio.create_task_group() as self._group:
            while True:
                await anyio.sleep(min(SWEEP_S_MAX, self._limits.idle_s / 2))
                now_s = anyio.current_time()
                for key, place in list(self._places.items()):
                    idle = not place.stays and now_s - place.used_s > self._limits.idle_s
                    if idle and self._is_free(place):
                        del self._places[key]
                        await self._retire(place)

    async def close(self) -> None:
        """End every host and everything below them. Shield this."""
        async with anyio.create_task_group() as group:
            for place in self._alive:  # those that were about to be retired included
                if place.host is not None:
                    group.start_soon(place.host.close)
        self._places.clear()
        self._alive.clear()

    def keep(self, registry: Registry) -> None:
        """End, soon, the hosts of hooks that are gone or are something else now."""
        known = {spec.name: spec for spec in registry}
        for (name, lane), place in list(self._places.items()):
            spec = known.get(name)
            if spec is None or _setting(spec) != _setting(place.spec):
                del self._places[name, lane]
                self._begin(place, self._retire)

    async def declared(self, spec: Spec) -> list[Mapping[str, Any]]:
        """Start a Python hook's host; return what its code says of itself. BadConfig with the reason when it can't."""
        place = self._place(spec, "ask")
        self._prepare(place)
        await place.ready.wait()
        if place.problem:
            printed = str(place.answer.get("stderr", "")).strip()[-TEXT_CHARS_MAX:]
            raise BadConfig(f"hook {spec.name!r}: {place.problem}", printed=printed)
        return list(place.answer.get("ready", ()))

    def warm(self, spec: Spec) -> None:
        """Have a host ready before the first question."""
        self._prepare(self._place(spec, "ask"))

    async def call(self, run: Run, context: Context, spec: Spec, lane: str) -> tuple[Run, bool]:
        """Return the run as it ended, and whether the hook had its chance: False when its turn did not come in time."""
        place = self._place(spec, lane)
        turn_s = spec.timeout_s if lane == "ask" else spec.timeout_s + START_S_MAX
        began_s = anyio.current_time()
        try:
            with anyio.fail_after(turn_s):
                await place.lock.acquire()
        except TimeoutError:
            return replace(run, outcome=Outcome.TIMEOUT, error=f"its turn did not come within {turn_s:g} s"), False
        try:
            with anyio.move_on_after(turn_s - (anyio.current_time() - began_s)):
                self._prepare(place)
                await place.ready.wait()
            if not place.ready.is_set():
                return replace(run, outcome=Outcome.TIMEOUT, error=f"its host was not ready within {turn_s:g} s"), False
            return await self._called(run, context, place), True
        finally:
            place.used_s = anyio.current_time()
            place.lock.release()
            self._freed.set()

    async def _called(self, run: Run, context: Context, place: _Place) -> Run:
        host, spec = place.host, place.spec
        if place.problem or host is None:
            place.ready = anyio.Event()  # the next call tries again
            return replace(run, outcome=Outcome.FAILED, error=place.problem or "it has no host")
        request: dict[str, Any] = {"op": "call", "timeout_s": spec.timeout_s, "context": context.to_wire()}
        if spec.kind is Kind.EXEC:
            request["stdin"] = context.to_json(hook=spec.name).decode()
        try:
            reply = await host.ask(request, spec.timeout_s + BACKSTOP_S)
            ended = _ended(run, reply)
        except CkptdError as error:
            await self._abandon(place)
            outcome = Outcome.TIMEOUT if isinstance(error, TimedOut) else Outcome.FAILED
            return replace(run, outcome=outcome, error=error.message)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            await self._abandon(place)
            return replace(run, outcome=Outcome.FAILED, error=f"its host answered nonsense: {error}"[:TEXT_CHARS_MAX])
        except BaseException:
            with anyio.CancelScope(shield=True):  # cancelled in the middle: what it is doing must end
                await self._abandon(place)
            raise
        if ended.outcome in {Outcome.FAILED, Outcome.TIMEOUT}:
            place.ready = anyio.Event()  # its body is gone, perhaps: have another before the next call
            self._prepare(place)
        return ended

    async def _abandon(self, place: _Place) -> None:
        place.ready = anyio.Event()
        await self._drop(place, 0.0)

    async def _drop(self, place: _Place, grace_s: float) -> None:
        """End a place's host, if it has one, and let another have its room."""
        host, place.host = place.host, None
        try:
            if host is not None:
                with anyio.CancelScope(shield=True):
                    await host.close(grace_s)
        finally:
            self._alive.discard(place)
            self._freed.set()

    def _place(self, spec: Spec, lane: str) -> _Place:
        asked = any(may_veto(event) for event in spec.events)
        key = (spec.name, "tell" if lane == "tell" and asked else "")
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = _Place(spec, stays=False, used_s=anyio.current_time())
        place.spec = spec
        place.stays = asked and not key[1]
        return place

    def _prepare(self, place: _Place) -> None:
        """Have a host started and its code imported, in the background, unless it is."""
        if place.ready.is_set() and place.host is not None and not place.host.is_alive:
            place.ready = anyio.Event()
        if not place.ready.is_set() and not place.preparing:
            place.preparing = True
            self._begin(place, self._start)

    def _begin(self, place: _Place, what: Any) -> None:
        if self._group is None:
            message = "the hooks' runner is not running"
            raise RuntimeError(message)
        self._group.start_soon(what, place)

    async def _start(self, place: _Place) -> None:
        try:
            if place.host is None or not place.host.is_alive:
                await self._drop(place, 0.0)
                await self._make_room(place)
                spec = place.spec
                environment = child.clean_environment(os.environ, {"CKPTD_HOOK": spec.name, **spec.environment})
                place.host = await child.start(spec.name, self._setup(spec), environment)
            if place.spec.kind is Kind.PYTHON:
                place.answer = await place.host.ask({"op": "start"}, START_S_MAX + BACKSTOP_S)
            else:
                place.answer = {}
        except CkptdError as error:
            place.answer = {"problem": error.message}
            await self._drop(place, 0.0)
        finally:
            place.preparing = False
            place.ready.set()
            self._freed.set()

    async def _make_room(self, place: _Place) -> None:
        """Be one of hosts_max: in the place of whoever was longest without work, or when somebody's work is done."""
        while len(self._alive) >= self._limits.hosts_max:
            free = [
                (key, other) for key, other in self._places.items() if other in self._alive and self._is_free(other)
            ]
            if free:
                key, other = min(free, key=lambda item: item[1].used_s)
                del self._places[key]
                await self._retire(other)
            else:
                if self._freed.is_set():  # else others wait for it already
                    self._freed = anyio.Event()
                await self._freed.wait()
        self._alive.add(place)

    async def _retire(self, place: _Place) -> None:
        async with place.lock:
            if place.preparing:
                await place.ready.wait()
            await self._drop(place, child.EXIT_S_MAX)

    @staticmethod
    def _is_free(place: _Place) -> bool:
        return not place.lock.locked() and not place.preparing

    def _setup(self, spec: Spec) -> dict[str, Any]:
        limits = self._limits
        return {
            **_setting(spec),
            "output_bytes_max": limits.output_bytes_max,
            "processes_max": limits.processes_max,
            "nice": limits.nice,
            "start_s_max": START_S_MAX,
        }


def _setting(spec: Spec) -> dict[str, Any]:
    """Return what makes a host another host when it changes."""
    return {
        "kind": str(spec.kind),
        "target": spec.target,
        "arguments": list(spec.arguments),
        "options": dict(spec.options),
        "import_path": list(spec.import_path),
        "environment": dict(spec.environment),
        "memory_bytes_max": spec.memory_bytes_max,
    }


def _ended(run: Run, reply: Mapping[str, Any]) -> Run:
    """Return the run as a host reports it. KeyError, TypeError or ValueError for what no host of ours says."""
    outcome = Outcome(reply["outcome"])
    printed = "".join(str(reply.get(key, "")) for key in ("stdout", "stderr"))
    if reply.get("dropped_bytes"):
        printed += f"\n[{reply['dropped_bytes']} bytes more were not kept]"
    answer = Answer.from_wire(reply["answer"]) if outcome is Outcome.OK else Answer()
    vetoed = answer.veto is not None
    return replace(
        run,
        outcome=Outcome.VETOED if vetoed else outcome,
        error=answer.veto.why if answer.veto is not None else str(reply.get("error", ""))[:TEXT_CHARS_MAX],
        findings=answer.findings,
        output=printed,
        duration_s=float(reply.get("duration_s", 0.0)),
    )
