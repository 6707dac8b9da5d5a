"""Hooks at work: a runner that really starts children, and the code they run."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

from ckptd.clock import SystemClock
from ckptd.config import HooksDefaults
from ckptd.hooks.context import Context
from ckptd.hooks.points import HookEvent
from ckptd.hooks.registry import Registry
from ckptd.hooks.result import Run
from ckptd.hooks.runner import Runner
from ckptd.hooks.spec import Kind, Spec

HERE = Path(__file__).parent
SAVE, SAVED = HookEvent.BEFORE_CHECKPOINT_SAVE, HookEvent.AFTER_CHECKPOINT_SAVE

Running = Callable[..., AbstractAsyncContextManager[Runner]]


def context(event: str = SAVE, **data: Any) -> Context:
    """A context as the pipeline would make it."""
    return Context(
        event, f"{event}:17", datetime(2026, 1, 2, tzinfo=UTC), "e1", "c1", {"project": "p", "step": 7, **data}
    )


def wild(name: str, *, timeout_s: float = 30.0, **more: Any) -> Spec:
    """A hook of wild.py, in a child host."""
    given = {"events": (SAVE,), "memory_bytes_max": 1 << 30, "import_path": (str(HERE),), **more}
    return Spec(name=name, kind=Kind.PYTHON, target=f"wild:{name}", timeout_s=timeout_s, **given)


@pytest.fixture
def runs() -> list[Run]:
    """Every run that was reported, in order."""
    return []


@pytest.fixture
def running(runs: list[Run]) -> Running:
    """`async with running([specs]) as runner`: hosts end with the block."""

    @asynccontextmanager
    async def run(specs: Sequence[Spec], **limits: Any) -> AsyncIterator[Runner]:
        runner = Runner(Registry(specs), SystemClock(), lambda run, _: runs.append(run), HooksDefaults(**limits))
        async with anyio.create_task_group() as group:
            await group.start(runner.run)
            yield runner
            group.cancel_scope.cancel()

    return run
