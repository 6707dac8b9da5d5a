"""A node of stand-in workers: the daemon's handle on processes that hang and crash on order (stand_in_worker.py)."""

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from ckptd import config
from ckptd.clock import SystemClock
from ckptd.events import Event
from ckptd.worker import Workers, WorkerState
from ckptd.worker.handle import Pace, Rig
from tests.support.in_process import eventually

STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in_worker.py")))
QUICK = Pace(restart_s=0.01, restart_s_max=0.05, probe_s=0.05, probe_s_max=0.1, probe_answer_s=0.3)

MOUNTS = """\
20 1 8:1 / / rw - ext4 /dev/a rw
21 20 8:2 / /fast rw - xfs /dev/b rw
22 20 0:9 / /far rw - nfs4 server:/x rw
"""
PATIENT_S = 60.0  # no worker is silent for so long unless it hangs


@dataclass
class Node:
    workers: Workers
    events: list[Event] = field(default_factory=list)
    then: Callable[[Event], None] = lambda _event: None

    def tell(self, event: Event) -> None:
        self.events.append(event)
        self.then(event)

    def names(self) -> list[str]:
        return [event.name for event in self.events]

    async def until(self, name: str, count: int = 1) -> Event:
        await eventually(lambda: self.names().count(name) >= count)
        return next(event for event in reversed(self.events) if event.name == name)

    def state(self, mount: str = "/") -> WorkerState:
        return next(state for state in self.workers.state() if state.mount == mount)


@asynccontextmanager
async def running(
    tmp_path: Path, *, flags: tuple[str, ...] = (), request_s: float = PATIENT_S, pace: Pace = QUICK
) -> AsyncIterator[Node]:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS)
    node = Node(workers=None)
    node.workers = Workers(
        config.Workers(request_s=request_s, stuck_max=2),
        SystemClock(),
        node.tell,
        rig=Rig(command=(*STAND_IN, *flags), pace=pace, mountinfo=table),
    )
    async with anyio.create_task_group() as group:
        await group.start(node.workers.run)
        yield node
        group.cancel_scope.cancel()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
