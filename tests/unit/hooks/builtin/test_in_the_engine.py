"""The built-in hooks as the engine runs them: those that open files in a child host, the others in the daemon. M059, M060"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
import torch
from safetensors.torch import save_file

from ckptd.clock import SystemClock
from ckptd.config import Settings
from ckptd.hooks.builtin import BUILTINS
from ckptd.hooks.context import Context
from ckptd.hooks.points import POINTS
from ckptd.hooks.registry import Registry
from ckptd.hooks.result import Level, Outcome, Run
from ckptd.hooks.runner import Runner

pytestmark = pytest.mark.anyio


def told(event: str, **data: Any) -> Context:
    return Context(event, "k", datetime(2026, 11, 20, tzinfo=UTC), "e" * 32, "c" * 32, data)


@asynccontextmanager
async def running(*hooks: dict[str, Any]) -> AsyncIterator[Callable[[str, Context], Any]]:
    registry = Registry.from_settings(Settings.model_validate({"hooks": hooks}))
    runner = Runner(registry, SystemClock(), lambda _run, _context: None)

    async def deliver(name: str, context: Context) -> Run:
        return await runner.deliver(context, runner.registry.get(name))

    async with anyio.create_task_group() as group:
        await group.start(runner.run)
        yield deliver
        group.cancel_scope.cancel()


@pytest.mark.parametrize("name", BUILTINS)
def test_each_can_be_switched_on_by_its_name_alone(name: str):
    (spec,) = Registry.from_settings(Settings.model_validate({"hooks": [{"builtin": name}]}))
    assert spec.events
    assert all(event in POINTS for event in spec.events)
    assert BUILTINS[name].meaning


async def test_a_broken_checkpoint_is_found_in_a_child_host(tmp_path):
    tensors = {"w": torch.randn(100, 40), "rig_quat": torch.nn.functional.normalize(torch.randn(50, 4), dim=-1)}
    tensors["w"][3, 4] = float("nan")
    tensors["rig_quat"][7] *= 3
    save_file(tensors, tmp_path / "step_100.safetensors")
    context = told("checkpoint.verified", path=str(tmp_path / "step_100.safetensors"), step=100)
    entries = (
        {"builtin": "numeric-health", "options": {"exploding": 1e4, "ignore": ["x*"]}},
        {"builtin": "quaternions", "options": {"tolerance": 1e-4}},
    )
    async with running(*entries) as deliver:
        health, quaternions = await deliver("numeric-health", context), await deliver("quaternions", context)
    assert (health.outcome, quaternions.outcome) == (Outcome.OK, Outcome.OK), (health, quaternions)
    assert [(one.level, one.facts["problems"]["nan"]) for one in health.findings] == [(Level.ERROR, 1)]
    assert [one.facts["checked"]["rig_quat"]["nonunit"] for one in quaternions.findings] == [1]


async def test_those_that_only_look_at_the_event_are_awaited_in_the_daemon():
    async with running({"builtin": "rotation-loss"}, {"builtin": "notify", "options": {"only": ["disk"]}}) as deliver:
        loss = await deliver("rotation-loss", told("checkpoint.verified", metrics={"geodesic_loss": "NaN"}))
        disk = await deliver("notify", told("disk.low", mount="/data"))
    assert [one.text for one in loss.findings] == ["geodesic_loss is nan"]
    assert [one.text for one in disk.findings] == ["disk.low /data"]


async def test_options_that_make_no_sense_are_a_failed_run_that_says_why():
    async with running({"builtin": "notify", "options": {"quiet": "never"}}) as deliver:
        run = await deliver("notify", told("disk.low", mount="/data"))
    assert run.outcome is Outcome.FAILED
    assert "22:00-07:00" in run.error


async def test_notify_alone_may_find_something_about_findings_and_never_about_its_own():
    """Else two hooks could go on about one another for ever."""
    bad = {"hook": "numeric-health", "level": "error", "text": "1 nan", "facts": {}}
    async with running({"builtin": "notify"}, {"builtin": "grid", "events": ["hook.finding"]}) as deliver:
        told_of = await deliver("notify", told("hook.finding", **bad))
        again = await deliver("notify", told("hook.finding", **{**bad, "facts": dict(told_of.findings[0].facts)}))
        other = await deliver("grid", told("hook.finding", **bad))
    assert [one.text for one in told_of.findings] == [f"hook.finding numeric-health checkpoint {'c' * 32}: 1 nan"]
    assert (again.outcome, again.findings) == (Outcome.OK, ())
    assert other.outcome is Outcome.FAILED
