"""Each rung of a save, seen: the next stage begins only when the one before it was pushed.

A push says what a row is at the moment in which it is read: of two rungs in quick succession only the higher is told.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from ckptd import pipeline
from tests.support.in_process import Wire


def in_turns(monkeypatch: pytest.MonkeyPatch, *stages: str) -> list[anyio.Event]:
    """Hold each of these stages until its event is set."""
    gates = {stage: anyio.Event() for stage in stages}
    for stage, gate in gates.items():
        monkeypatch.setitem(pipeline.STAGES, stage, held(gate, pipeline.STAGES[stage]))
    return list(gates.values())


def held(gate: anyio.Event, real: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A stage that begins when the gate is open."""

    async def run(*given: Any) -> Any:
        await gate.wait()
        return await real(*given)

    return run


async def rungs(line: Wire, checkpoint: str, gates: list[anyio.Event]) -> list[dict[str, Any]]:
    """Every push up to the one after the last gate; each lets one stage more begin."""
    found = []
    for gate in (*gates, None):
        found.append(await line.push("level", checkpoint=checkpoint))
        if gate is not None:
            gate.set()
    return found
