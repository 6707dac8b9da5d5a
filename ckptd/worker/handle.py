"""The daemon's handle on its I/O workers: one child process per mounted file system, each on its own.

No file system under a storage root is ever touched here; a request goes to the worker of the mount
that holds its root, known from mountinfo and the path's text. A hung mount hangs its own worker.
"""

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup, TaskStatus

from ckptd import config
from ckptd.clock import Clock
from ckptd.errors import Bug
from ckptd.events import Event
from ckptd.worker import mounts, protocol
from ckptd.worker.child import Child, Pending
from ckptd.worker.context import ALIVE_EVERY_S, BEATS
from ckptd.worker.rootmarks import RootMarks
from ckptd.worker.station import Pace, Setup, Station, WorkerState

__all__ = ["Pace", "Parts", "Rig", "WorkerState", "Workers", "worker_command"]

MOUNT_KNOWN_S = 10.0  # a root's mount is looked up again when its answer is older

# Verbs that may have nothing to say for hours: silence is no sign of a hang.
_QUIET = (protocol.Watch,)


def worker_command(settings: config.Workers) -> tuple[str, ...]:
    """Return the command line of a worker; "--fd N" is added when it starts.

    -P keeps the working directory off sys.path: nobody's files are imported by accident.
    """
    return (
        *(sys.executable, "-P", "-m", "ckptd.worker"),
        *("--threads", str(settings.threads)),
        *("--nice", str(settings.nice)),
        *(("--idle-io",) if settings.idle_io else ()),
        *("--parser-bytes-max", str(settings.parser_bytes_max)),
        *("--parser-cpu-s", str(settings.parser_cpu_s)),
        *("--alive-every-s", str(min(ALIVE_EVERY_S, settings.request_s / BEATS))),
    )


@dataclass(frozen=True, slots=True)
class Rig:
    """What a test may put in the place of the real thing: the program, the pauses, the table of mounts."""

    command: tuple[str, ...] = ()
    pace: Pace = field(default_factory=Pace)
    mountinfo: Path = mounts.MOUNTINFO


class Parts:
    """The answer of a verb that answers in parts; iterate it once. `reply` is its end, once it has come.

    root  what the root is known by now, if the verb had a look at that
    """

    def __init__(self, station: Station, request: protocol.Request, child: Child, pending: Pending) -> None:
        """Read what the worker sends for `pending`."""
        self.reply: Any = None
        self.root: protocol.RootMark | None = None
        self._station = station
        self._request = request
        self._child = child
        self._pending = pending
        self._silence_s = None if isinstance(request, _QUIET) else station.silence_s

    def __aiter__(self) -> "Parts":
        """Return itself: a part read is gone."""
        return self

    async def __anext__(self) -> Any:
        """Return the next part, a PART_OF[type(request)]. Errors as `Workers.call`."""
        pending = self._pending
        while not pending.parts:
            if pending.outcome is not None:
                self.reply = await self._station.ended(self._request, pending)
                self.root = pending.root
                raise StopAsyncIteration
            await self._station.listen(self._child, pending, self._silence_s)
        return self._station.part(self._request, pending.take_part())


class Workers:
    """All I/O workers of this daemon. Requests may be made from any task once `run()` has started."""

    def __init__(
        self,
        settings: config.Workers,
        clock: Clock,
        publish_event: Callable[[Event], None],
        rig: Rig | None = None,
    ) -> None:
        """Start no process. `rig` is for those who test."""
        rig = rig or Rig()
        self.marks = RootMarks()
        self._setup = Setup(
            settings=settings,
            command=rig.command or worker_command(settings),
            pace=rig.pace,
            now=clock.now,
            publish_event=publish_event,
            marks=self.marks,
        )
        self._clock = clock
        self._mountinfo = rig.mountinfo
        self._group: TaskGroup | None = None
        self._stations: dict[mounts.Mount, Station] = {}
        self._found: dict[str, tuple[Station, float]] = {}

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Give the workers a home until cancelled; then each is told, asked and forced to end, side by side.

        Returns some 6 s after the cancellation at the latest; what can't die by then is left to the kernel.
        """
        async with anyio.create_task_group() as group:
            self._group = group
            task_status.started()
            try:
                await anyio.sleep_forever()
            finally:
                self._group = None

    async def call(self, request: protocol.Request, *, arena_fd: int | None = None) -> Any:
        """Have a worker do `request`; return the struct that verbs.REPLY_OF names for it.

        `arena_fd` stays the caller's. Cancelling tells the worker to stop at its next look.

        WorkerLost    the worker died on the way: the request may or may not have been done
        TimedOut      it was silent for workers.request_s and was killed
        RootDegraded  its mount hangs, and nothing was asked; or the root is not what it was, and nothing was touched
        and every error that the verb itself answers with (errors.from_wire)
        """
        station = await self._station(request.root)
        return await station.call(self.marks.on(request), arena_fd)

    @asynccontextmanager
    async def parts(self, request: protocol.Request, *, arena_fd: int | None = None) -> AsyncIterator[Parts]:
        """Have a worker do a request that answers in parts (verbs.PART_OF). Leaving the block cancels it.

        The reader may call other verbs between two parts. Who leaves child.PARTS_BYTES_MAX unread
        has Busy instead of more. Errors as `call`, raised while iterating.
        """
        request = self.marks.on(request)
        station = await self._station(request.root)
        child, pending = await station.ask(request, arena_fd)
        try:
            yield Parts(station, request, child, pending)
        finally:
            child.forget(pending)

    def state(self) -> list[WorkerState]:
        """Describe every mount that a request was made for, by mount point."""
        return sorted((station.state() for station in self._stations.values()), key=lambda state: state.mount)

    async def _station(self, root: str) -> Station:
        """Return the station of the mount that holds `root`. BadPath when `root` is not absolute; Busy as `mounts.read`."""
        now_s = self._clock.monotonic_s()
        station, looked_s = self._found.get(root, (None, 0.0))
        if station is not None and now_s - looked_s < MOUNT_KNOWN_S:
            return station
        mount = mounts.find(root, await anyio.to_thread.run_sync(mounts.read, self._mountinfo))
        if self._group is None:
            message = "a worker was asked while Workers.run() is not running"
            raise Bug(message)
        if mount not in self._stations:
            self._stations[mount] = Station(mount, self._setup, self._group)
        found = self._stations[mount]
        self._found[root] = (found, now_s)
        found.roots.add(root)
        if station is not None and station is not found:
            self._leave(station, root)
        return found

    def _leave(self, station: Station, root: str) -> None:
        """Forget a mount when its last root has another one over it, or it is gone."""
        station.roots.discard(root)
        if not station.roots:
            self._stations.pop(station.mount, None)
            station.retire()
