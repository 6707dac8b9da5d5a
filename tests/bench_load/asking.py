"""What a hook costs whoever waits for it: in the daemon, in a child host that is warm, and as a program."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import anyio

from ckptd.clock import SystemClock
from ckptd.hooks.builtin import BUILTINS
from ckptd.hooks.context import Context
from ckptd.hooks.points import HookEvent
from ckptd.hooks.registry import Registry
from ckptd.hooks.runner import Runner
from ckptd.hooks.spec import Kind, Spec
from tests.bench_load.outcome import Limit, Outcome, bounded, percentile
from tests.bench_load.scale import Scale

POINT = HookEvent.BEFORE_CHECKPOINT_SAVE
CONTEXT = Context(POINT, "k", datetime(2026, 1, 1, tzinfo=UTC), "e", "c", {"project": "p", "step": 7, "loss": 0.5})
CONDITION = "data.loss < 1 and project == 'p'"


def measure(scale: Scale) -> Iterator[Outcome]:
    """Return the rows of this file."""
    target = BUILTINS["rotation-loss"].target
    inside = Spec(name="a", kind=Kind.INPROCESS, target=target, events=(POINT,), condition=CONDITION)
    many = [Spec(name=f"h{n}", kind=Kind.INPROCESS, target=target, events=(POINT,)) for n in range(50)]
    child = Spec(name="a", kind=Kind.PYTHON, target="builtins:bool", events=(POINT,))
    program = Spec(name="a", kind=Kind.EXEC, target="/bin/true", events=(POINT,))
    runs = max(20, int(2000 * min(1.0, scale.seconds)))
    yield _row("no hook at the point, one question", [], runs, Limit("p99", 0.05, "ms"))
    yield _row("one built-in hook with a condition, one question", [inside], runs, Limit("p99", 1, "ms"))
    yield _row("fifty built-in hooks, one question", many, runs // 10, Limit("p99", 50, "ms"))
    yield _row("a Python hook in its warm host, one question", [child], runs // 4, Limit("p99", 10, "ms"))
    yield _row("a program, one question", [program], runs // 20, Limit("p99", 100, "ms"))


def _row(what: str, specs: list[Spec], runs: int, limit: Limit) -> Outcome:
    took_ms = anyio.run(_ask, specs, runs)
    note = f"p50 {percentile(took_ms, 0.5):.3f} ms"
    return bounded(what, [(limit, percentile(took_ms, 0.99))], runs, note)


async def _ask(specs: list[Spec], runs: int) -> list[float]:
    runner = Runner(Registry(specs), SystemClock(), lambda *_: None)
    took_ms = []
    async with anyio.create_task_group() as group:
        await group.start(runner.run)
        verdict = await runner.ask(CONTEXT)
        assert [run.outcome for run in verdict.runs] == ["ok"] * len(specs), verdict.runs
        for _ in range(runs):
            began_s = time.perf_counter()
            await runner.ask(CONTEXT)
            took_ms.append((time.perf_counter() - began_s) * 1000)
        group.cancel_scope.cancel()
    return took_ms
