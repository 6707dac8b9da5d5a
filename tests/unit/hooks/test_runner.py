"""Asking and telling: order, conditions, vetoes, the circuit, statistics, and nothing that gets out."""

import sys
import time

import anyio
import pytest

from ckptd.clock import SystemClock
from ckptd.config import HooksDefaults
from ckptd.hooks import BaseHook, Finding, Level, Veto
from ckptd.hooks.registry import Registry
from ckptd.hooks.result import Outcome
from ckptd.hooks.runner import Runner
from ckptd.hooks.spec import Kind, Spec
from tests.unit.hooks.conftest import SAVE, SAVED, context, wild

CALLED = []
AT_ONCE = [0, 0]  # now, and at most


class Counter(BaseHook):
    """Stands in for a built-in hook."""

    def __init__(self, *, says=None, sleeps=0.0):
        super().__init__()
        self.says, self.sleeps = says, sleeps

    async def execute(self, context):
        CALLED.append(context.key)
        AT_ONCE[0] += 1
        AT_ONCE[1] = max(AT_ONCE)
        try:
            await anyio.sleep(self.sleeps)
        finally:
            AT_ONCE[0] -= 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


@pytest.fixture(autouse=True)
def _shipped(monkeypatch):
    CALLED.clear()
    AT_ONCE[:] = [0, 0]
    monkeypatch.setitem(sys.modules, "ckptd.hooks.builtin.tested", sys.modules[__name__])


def inside(name, *, events=(SAVE,), **more):
    return Spec(name=name, kind=Kind.INPROCESS, target="ckptd.hooks.builtin.tested:Counter", events=events, **more)


class StillClock(SystemClock):
    now_s = 0.0

    def monotonic_s(self):
        return self.now_s


async def test_the_first_veto_decides_and_hooks_after_it_are_not_asked(running, runs):
    """M050, M057: in order of priority."""
    specs = [
        inside("late", priority=60),
        inside("no", priority=50, options={"says": Veto("too big")}),
        inside("first", priority=0, options={"says": Finding(Level.INFO, "seen")}),
    ]
    async with running(specs) as runner:
        verdict = await runner.ask(context())
        assert (verdict.allowed, verdict.why) == (False, "hook 'no': too big")
        assert [run.hook for run in runs] == ["first", "no"]
        assert verdict.findings == (("first", Finding(Level.INFO, "seen")),)


@pytest.mark.parametrize("says", [ValueError("broke"), 17])
async def test_an_error_or_a_timeout_is_no_veto(running, says):
    """M054, row 18."""
    specs = [
        inside("bad", options={"says": says}),
        inside("slow", options={"sleeps": 60.0}, timeout_s=0.05),
        inside("fine"),
    ]
    async with running(specs) as runner:
        verdict = await runner.ask(context())
        assert verdict.allowed
        assert [run.outcome for run in verdict.runs] == [Outcome.FAILED, Outcome.TIMEOUT, Outcome.OK]


async def test_a_false_condition_is_recorded_and_the_hook_not_called(running, runs):
    """M053."""
    async with running([inside("h", condition="loss < 0.2"), inside("broken", condition="project < 1")]) as runner:
        assert (await runner.ask(context(loss=0.5))).allowed
        assert [run.outcome for run in runs] == [Outcome.SKIPPED, Outcome.FAILED]
        assert CALLED == []
        await runner.ask(context(loss=0.1))
        assert len(CALLED) == 1


async def test_a_hook_that_keeps_failing_is_given_a_rest_and_tried_again(runs):
    """M054: the circuit opens after N, one run after the rest decides, and it is told once that it opened."""
    clock = StillClock()
    spec = inside("h", options={"says": ValueError("x")})
    runner = Runner(
        Registry([spec]), clock, lambda run, _: runs.append(run), HooksDefaults(failures_max=3, rest_s=10.0)
    )
    for _ in range(5):
        await runner.deliver(context(), spec)
    assert [run.outcome for run in runs] == ["failed"] * 3 + ["open"] * 2
    assert [run.opened for run in runs] == [False, False, True, False, False]
    assert runner.figures()["h"]["circuit"] == "open"
    clock.now_s = 10.0
    assert (await runner.deliver(context(), spec)).outcome is Outcome.FAILED
    assert (await runner.deliver(context(), spec)).outcome is Outcome.OPEN
    assert (await runner.deliver(context(), spec, counted=False)).outcome is Outcome.FAILED, (
        "a trial by hand always runs"
    )
    runner.reset("h")
    assert (await runner.deliver(context(), spec)).outcome is Outcome.FAILED
    assert len(CALLED) == 6


async def test_statistics_say_what_each_hook_did(running):
    """M058."""
    async with running([inside("h", condition="loss < 1"), inside("other")]) as runner:
        for loss in (0.5, 0.5, 2.0):
            await runner.ask(context(loss=loss))
        figures = runner.figures()
        assert {key: figures["h"][key] for key in ("calls", "ok", "skipped", "failed")} == {
            "calls": 2, "ok": 2, "skipped": 1, "failed": 0,
        }  # fmt: skip
        assert figures["h"]["p95_s"] >= figures["h"]["p50_s"] >= 0
        assert figures["other"]["calls"] == 3


async def test_telling_is_bounded_in_how_much_goes_on_at_once(running):
    spec = inside("h", options={"sleeps": 0.05}, events=(SAVED,))
    async with running([spec], running_max=2) as runner:
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(runner.deliver, context(SAVED), spec)
        assert (len(CALLED), AT_ONCE[1]) == (6, 2)


async def test_a_hook_that_hangs_while_it_is_told_does_not_delay_a_question(running):
    """Asked and told, a hook has two hosts: the question finds one free."""
    spec = wild("sleeps_after_the_fact", events=(SAVE, SAVED), timeout_s=60.0)
    async with running([spec], running_max=1) as runner, anyio.create_task_group() as group:
        await runner.ask(context())
        group.start_soon(runner.deliver, context(SAVED), spec)
        await anyio.sleep(0.05)
        began_s = time.monotonic()
        assert [run.outcome for run in (await runner.ask(context())).runs] == [Outcome.OK]
        assert time.monotonic() - began_s < 20
        group.cancel_scope.cancel()


async def test_fifty_hooks_on_one_event_are_asked_in_order(running, runs):
    """M050."""
    specs = [inside(f"h{n}", priority=(n * 37) % 90) for n in range(50)]
    async with running(specs) as runner:
        assert (await runner.ask(context())).allowed
        assert [run.hook for run in runs] == [spec.name for spec in sorted(specs, key=lambda spec: spec.priority)]


async def test_a_finding_about_a_finding_is_refused(running):
    spec = inside("h", events=("hook.finding",), options={"says": Finding(Level.INFO, "x")})
    async with running([spec]) as runner:
        run = await runner.deliver(context("hook.finding"), spec)
        assert (run.outcome, run.findings) == (Outcome.FAILED, ())


async def test_options_that_do_not_fit_are_a_problem_of_the_hook(running):
    async with running([inside("h", options={"none_such": 1}), inside("fine")]) as runner:
        assert (await runner.ask(context())).allowed
        assert "none_such" in runner.registry.get("h").problem
        assert len(CALLED) == 1


async def test_another_registry_takes_over_and_hosts_of_hooks_that_are_gone_end(running):
    """M064: as after a reload."""
    async with running([wild("fine")]) as runner:
        await runner.ask(context())
        (place,) = runner._hosts._places.values()
        host = place.host
        runner.adopt(Registry([wild("vetoes")]))
        assert (await runner.ask(context(loss=3))).why == "hook 'vetoes': no 3"
        with anyio.fail_after(20):
            while host._process.poll() is None:
                await anyio.sleep(0.02)
