"""One mount and its worker: started on first use, replaced when it dies, given up when it hangs.

idle ──first request──► running ──dies──► running again (after a pause if it never answered)
                           │ silent for request_s: SIGKILL, the request has TimedOut
                           ▼
degraded: stuck_max silences in a row, or stuck_max processes that can't die. Requests get
RootDegraded at once; a probe with growing pauses finds out when the mount answers again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import anyio
import msgspec
from anyio.abc import TaskGroup, TaskStatus

from ckptd import config
from ckptd.errors import Bug, CkptdError, RootDegraded, TimedOut, Weather, WorkerLost
from ckptd.events import Event
from ckptd.worker import protocol, verbs
from ckptd.worker.child import Child, Pending, spawn
from ckptd.worker.mounts import Mount
from ckptd.worker.rootmarks import RootMarks

LAST_WORD_S = 0.5  # frames that came while this process itself was stopped are read before the verdict


@dataclass(frozen=True, slots=True)
class Pace:
    """Pauses, in seconds: before a worker that never answered is started again, and between probes."""

    restart_s: float = 0.1
    restart_s_max: float = 10.0
    probe_s: float = 5.0
    probe_s_max: float = 300.0
    probe_answer_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What all stations share."""

    settings: config.Workers
    command: tuple[str, ...]
    pace: Pace
    now: Callable[[], datetime]
    publish_event: Callable[[Event], None]
    marks: RootMarks


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One mount as `ckpt status` shows it.

    state    "idle" (no process), "running", "degraded"
    roots    storage roots seen on it; `requests` are on their way now
    restarts processes that ended by themselves or were given up; `stuck` of them can't die yet
    """

    mount: str
    filesystem: str
    remote: bool
    pid: int | None
    state: Literal["idle", "running", "degraded"]
    roots: tuple[str, ...]
    requests: int
    restarts: int
    stuck: int
    rss_bytes: int | None


class Station:
    """The worker of one mount, whichever process that is at the moment."""

    def __init__(self, mount: Mount, setup: Setup, group: TaskGroup) -> None:
        """Start nothing; processes will live in `group`."""
        self.mount = mount
        self.roots: set[str] = set()
        self.degraded = False
        self.silence_s = setup.settings.request_s
        self._setup = setup
        self._group = group
        self._child: Child | None = None
        self._starting = anyio.Lock()
        self._stuck: list[Child] = []
        self._freed = anyio.Event()
        self._silences = 0
        self._restarts = 0
        self._pause_s = 0.0

    async def ask(self, request: protocol.Request, arena_fd: int | None) -> tuple[Child, Pending]:
        """Send a request to the running worker, which is started if need be. RootDegraded at once when degraded."""
        if self.degraded:
            raise self._refusal()
        return await self._ask(request, arena_fd)

    async def call(self, request: protocol.Request, arena_fd: int | None) -> msgspec.Struct:
        """Send a request and wait for its reply. Errors as `Workers.call`."""
        if self.degraded:
            raise self._refusal()
        return await self._answer(request, arena_fd, self.silence_s)

    async def _answer(self, request: protocol.Request, arena_fd: int | None, silence_s: float) -> msgspec.Struct:
        child, pending = await self._ask(request, arena_fd)
        try:
            while pending.outcome is None:
                await self.listen(child, pending, silence_s)
            return await self.ended(request, pending)
        finally:
            child.forget(pending)

    async def listen(self, child: Child, pending: Pending, silence_s: float | None) -> None:
        """Wait until the worker says something about a request.

        TimedOut after `silence_s` without a word; the worker is then given up, and whatever else it
        was doing ends with WorkerLost. None waits for ever.
        """
        pending.changed = anyio.Event()
        heard_s = pending.heard_s
        if silence_s is None:
            await pending.changed.wait()
            return
        left_s = max(heard_s + silence_s - anyio.current_time(), 0.0)
        with anyio.move_on_after(left_s + LAST_WORD_S):
            await pending.changed.wait()
            return
        self._give_up(child, silence_s)
        message = f"the I/O worker of {self.mount.point} was silent for {silence_s:g} s and was given up"
        raise TimedOut(message, hint="", mount=self.mount.point)

    def reply(self, request: protocol.Request, outcome: msgspec.Raw | CkptdError) -> msgspec.Struct:
        """Turn a request's outcome into its reply struct, or raise the error it is."""
        if isinstance(outcome, WorkerLost):
            raise outcome
        self._silences = 0
        if isinstance(outcome, CkptdError):
            raise outcome
        return _decoded(outcome, verbs.REPLY_OF[type(request)])

    async def ended(self, request: protocol.Request, pending: Pending) -> msgspec.Struct:
        """Take in what a request that has ended tells of its root; then as `reply`. Errors of the catalog."""
        outcome = pending.outcome
        assert outcome is not None
        marks = self._setup.marks
        if await marks.heard(request, outcome, pending.root):
            refused = marks.refused().get(request.root)
            if refused is None:
                self._tell("root.recovered", roots=[request.root])
            else:
                self._tell("root.degraded", roots=[request.root], why=refused.message)
        return self.reply(request, outcome)

    def part(self, request: protocol.Request, raw: msgspec.Raw) -> msgspec.Struct:
        """Turn one part of an answer into its struct."""
        self._silences = 0
        return _decoded(raw, verbs.PART_OF[type(request)])

    def retire(self) -> None:
        """End the worker: no root is on this mount any more."""
        if self._child is not None:
            child, self._child = self._child, None
            child.hang_up()

    def state(self) -> WorkerState:
        """Describe this mount now."""
        child = self._child
        return WorkerState(
            mount=self.mount.point,
            filesystem=self.mount.filesystem,
            remote=self.mount.remote,
            pid=child.pid if child else None,
            state="degraded" if self.degraded else "running" if child else "idle",
            roots=tuple(sorted(self.roots)),
            requests=child.busy if child else 0,
            restarts=self._restarts,
            stuck=len(self._stuck),
            rss_bytes=child.rss_bytes() if child else None,
        )

    async def _ask(self, request: protocol.Request, arena_fd: int | None) -> tuple[Child, Pending]:
        async with self._starting:
            if self._child is None:
                if len(self._stuck) >= self._setup.settings.stuck_max:
                    self._degrade(f"{len(self._stuck)} workers hang in the kernel")
                    raise self._refusal()
                await anyio.sleep(self._pause_s)
                # Shielded: a process that was started has an owner before a cancelled caller lets go.
                with anyio.CancelScope(shield=True):
                    await self._start()
            child = self._child
        if child is None:
            message = f"the I/O worker of {self.mount.point} ended as soon as it was started"
            raise WorkerLost(message)
        return child, await child.ask(request, arena_fd)

    async def _start(self) -> None:
        try:
            child = await spawn(self._setup.command)
        except OSError as error:
            self._slow_down()
            message = f"no I/O worker could be started for {self.mount.point}: {error.strerror}"
            raise WorkerLost(message) from error
        self._child = child
        self._tell("worker.started", pid=child.pid)
        try:
            await self._group.start(self._tend, child)
        except RuntimeError as error:
            ended = error
        else:
            return
        # The group ended while this process was started: nobody else would bury it.
        self._child = None
        await child.close()
        child.end()
        raise WorkerLost(f"no I/O worker for {self.mount.point}: everything ends") from ended

    async def _tend(  # noqa: ASYNC128  the child's own run() says when it has started
        self, child: Child, *, task_status: TaskStatus[None]
    ) -> None:
        """Stay with one process from its start until it is reaped."""
        lost = False
        try:
            await child.run(task_status=task_status)
        finally:
            if self._child is child:
                self._child, lost = None, True
                self._restarts += 1
            # Also when everything stops: no worker outlives the daemon because a wait was cut short.
            with anyio.CancelScope(shield=True):
                dead = await child.close()
        if lost:
            if child.answered:
                self._pause_s = 0.0
            else:
                self._slow_down()
            self._tell("worker.lost", pid=child.pid, why=child.obituary(), stuck=len(self._stuck))
        if not dead:
            await child.gone(None)
        if child in self._stuck:
            self._stuck.remove(child)
            self._freed.set()

    def _give_up(self, child: Child, silence_s: float) -> None:
        """Part with a silent worker. The second caller who finds the same one silent changes nothing."""
        if self._child is not child:
            return
        self._child = None
        self._stuck.append(child)
        self._restarts += 1
        self._silences += 1
        child.abandon()
        self._tell("worker.lost", pid=child.pid, why=f"silent for {silence_s:g} s", stuck=len(self._stuck))
        if self._silences >= self._setup.settings.stuck_max:
            self._degrade(f"{self._silences} times silent in a row")

    def _degrade(self, why: str) -> None:
        if not self.degraded:
            self.degraded = True
            self._tell("root.degraded", roots=sorted(self.roots), why=why)
            self._group.start_soon(self._probe)

    async def _probe(self) -> None:
        """Ask a harmless question from time to time until it is answered, if only by an error."""
        pace = self._setup.pace
        pause_s = pace.probe_s
        while self.degraded:
            self._freed = anyio.Event()
            with anyio.move_on_after(pause_s):
                await self._freed.wait()  # a hung process could die: the mount moves again
            pause_s = min(pause_s * 2, pace.probe_s_max)
            question = protocol.Usage(root=min(self.roots, default=self.mount.point))
            try:
                await self._answer(question, None, min(pace.probe_answer_s, self._setup.settings.request_s))
            except CkptdError as error:
                # Any other error is an answer: the worker came back from the file system.
                if isinstance(error, Weather | RootDegraded):  # the latter: asking would only hang one worker more
                    continue
            self.degraded = False
            self._silences = 0
            self._tell("root.recovered", roots=sorted(self.roots))

    def _slow_down(self) -> None:
        pace = self._setup.pace
        self._pause_s = min(max(self._pause_s * 2, pace.restart_s), pace.restart_s_max)

    def _refusal(self) -> RootDegraded:
        message = f"the file system at {self.mount.point} ({self.mount.filesystem}) does not answer"
        return RootDegraded(message, mount=self.mount.point)

    def _tell(self, name: str, **data: Any) -> None:
        facts = {"mount": self.mount.point, "filesystem": self.mount.filesystem, **data}
        self._setup.publish_event(Event(name, self._setup.now(), data=facts))


def _decoded(raw: msgspec.Raw, kind: type[msgspec.Struct]) -> msgspec.Struct:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        message = f"a worker's {kind.__name__} has the wrong shape: {error}"
        raise Bug(message) from error
