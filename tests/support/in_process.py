"""The daemon's real parts in the test's own process, with real workers, a real catalog and a real socket.

    async with daemon(short_dir, keep_last=2) as node, node.connect() as trainer:
        answer = await trainer.ask("experiment.open", ...)

Only the service manager is a stand-in: `Keeper` holds stored descriptors, so that `daemon(...)` called
again with the same keeper is a restart.
"""

import argparse
import gc
import hashlib
import math
import mmap
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec

from ckptd import daemon as composition
from ckptd import errors
from ckptd.catalog import open_catalog
from ckptd.clock import SystemClock
from ckptd.config import Settings
from ckptd.events import Bus
from ckptd.intake import doctor, leftovers, premises, reconcile, status
from ckptd.model import new_id
from ckptd.notify import Notifier
from ckptd.origins import Loaded
from ckptd.worker import child, examine
from ckptd_client import control, wire
from tests.support import descriptors
from tests.support.arena import layout

PATIENCE_S = 40.0  # what never comes fails its test; a machine that stands for some seconds does not
QUICK: dict[str, Any] = {
    "workers": {"idle_io": False, "nice": 0},
    "catalog": {"ballast_bytes": 0},
    "watching": {"reconcile_s": 1.0, "reconcile_max_s": 1.0, "quiet_s": 0.1},
    "jobs": {"backoff_s": 0.05, "backoff_s_max": 1.0},
    "arenas": {"bytes_max": 256 << 20, "memory_free_bytes_min": 0},
    "alerts": {"look_s": 3600},  # of the machine: the memory of this very process, with all tests before, and its disk
    "drain_s": 5.0,
}


# How long a person is made to wait for an answer. Tests of that set it themselves; the others test the answer.
for _module, _limit in (
    (status, "DISK_ANSWER_S"),
    (doctor, "ANSWER_S"),
    (leftovers, "ANSWER_S"),
    (reconcile, "OPEN_S"),
    (child, "KILL_GRACE_S"),  # and for a process that was killed: one that is not buried is the next test's warning
    (examine, "_REAP_S"),
):
    assert hasattr(_module, _limit), f"{_module.__name__} has no {_limit} any more"
    setattr(_module, _limit, 30.0)


class Keeper(Notifier):
    """A service manager's fd store in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, int] = {}

    def store(self, name: str, fd: int) -> None:
        self.kept[name] = os.dup(fd)

    def remove(self, name: str) -> None:
        fd = self.kept.pop(name, None)
        if fd is not None:
            os.close(fd)

    def passed(self) -> list[tuple[str, int]]:
        """What the next daemon is given."""
        return [(name, os.dup(fd)) for name, fd in self.kept.items()]

    def close(self) -> None:
        for name in list(self.kept):
            self.remove(name)


@dataclass
class Node:
    """A running daemon: its parts, and where it is."""

    parts: composition.Parts
    directory: Path
    runs: Path

    @asynccontextmanager
    async def connect(self) -> AsyncIterator["Wire"]:
        """Connect and say hello."""
        line = Wire.to(self.directory / "s")
        try:
            await line.ask("hello", versions=[1], client="test")
            yield line
        finally:
            line.close()

    async def write(self, fn: Any) -> Any:
        return await self.parts.catalog.write(fn)

    async def read(self, fn: Any) -> Any:
        return await self.parts.catalog.read(fn)

    async def idle(self) -> None:
        """Wait until no job is left: what a save's own stages do afterwards, links and retention, is done."""

        async def done() -> bool:
            return not await self.parts.jobs.unfinished()

        await eventually(done)

    async def settled(self) -> None:
        """Wait until what is looked at once, a second after the start, was: it is a commit of its own, for who counts them."""
        await eventually(lambda: self.parts.service._reading._looked_s > -math.inf)


def settings_of(directory: Path, **more: Any) -> Settings:
    values = {**QUICK, "state_dir": directory / "state", "socket": directory / "s"}
    for key, value in more.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return Settings.model_validate(values)


@asynccontextmanager
async def daemon(
    directory: Path, keeper: Keeper | None = None, *, front: bool = True, **more: Any
) -> AsyncIterator[Node]:
    """Run a daemon in this process until the block is left, nested as `ckptd.daemon.run` nests it.

    front  False: nothing of the pipeline or the reconciler runs, only requests are answered
    """
    own = keeper is None
    keeper = keeper or Keeper()
    settings = settings_of(directory, **more)
    (directory / "state" / "spool").mkdir(parents=True, exist_ok=True)
    (directory / "runs").mkdir(exist_ok=True)
    clock, bus = SystemClock(), Bus()
    loaded = Loaded(settings, {}, (), ())
    listening, _ = premises.listening([], settings.socket, "user")
    try:
        async with (
            open_catalog(settings.state_dir / "catalog.sqlite", settings.catalog, clock, bus.publish) as catalog,
            anyio.create_task_group() as services,
        ):
            said = composition.Said(clock, keeper, bus)
            parts = composition._assemble(loaded, argparse.Namespace(), catalog, said)
            await services.start(parts.workers.run)
            services.start_soon(parts.followers.run)
            services.start_soon(parts.metrics.run)
            services.start_soon(parts.extensions.run)
            services.start_soon(parts.observers.run)
            await composition._start_up(parts, keeper.passed())
            await services.start(parts.listener.run, listening)
            services.start_soon(composition._reap, parts)
            if front:
                services.start_soon(parts.pipeline.run, parts.stop, partial(composition._undone, parts))
                for task in (parts.spool.run, parts.reconciler.run, parts.presence.run):
                    services.start_soon(task)
            yield Node(parts, directory, directory / "runs")
            services.cancel_scope.cancel()
        parts.pool.close()
    finally:
        listening.close()
        settings.socket.unlink(missing_ok=True)
        if own:
            keeper.close()


@dataclass
class Wire:
    """One connection that speaks frames; pushes are collected."""

    sock: socket.socket
    pushes: list[dict[str, Any]] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    _splitter: wire.Splitter = field(default_factory=wire.Splitter)
    _replies: list[dict[str, Any]] = field(default_factory=list)
    _last: int = 0

    @classmethod
    def to(cls, path: Path) -> "Wire":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.connect(str(path))
        return cls(sock)

    def close(self) -> None:
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    async def raw(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                await anyio.wait_writable(self.sock)

    async def send(self, op: str, **fields: Any) -> int:
        self._last += 1
        await self.raw(wire.encode({"v": 1, "id": self._last, "op": op, **fields}))
        return self._last

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Return the answer, or raise the coded error that it is."""
        reply = await self.reply(await self.send(op, **fields))
        if not reply["ok"]:
            raise errors.from_wire(reply["error"])
        return reply

    async def reply(self, number: int | None) -> dict[str, Any]:
        return await self._until(self._replies, lambda frame: frame.get("id") == number)

    async def push(self, kind: str, **wanted: Any) -> dict[str, Any]:
        return await self._until(
            self.pushes, lambda frame: frame["push"] == kind and all(frame.get(k) == v for k, v in wanted.items())
        )

    async def _until(self, frames: list[dict[str, Any]], fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        with anyio.fail_after(PATIENCE_S):
            while True:
                for frame in frames:
                    if fits(frame):
                        frames.remove(frame)
                        return frame
                if not await self.receive():
                    raise ConnectionError("the daemon closed the connection")

    async def receive(self) -> bool:
        """Read what is there; False at the end of the stream."""
        await anyio.wait_readable(self.sock)
        try:
            data, ancillary, _, _ = self.sock.recvmsg(1 << 20, socket.CMSG_SPACE(64))
        except ConnectionResetError:
            return False
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self.fds += struct.unpack(f"{len(payload) // 4}i", payload)
        for frame in self._splitter.feed(data):
            message = wire.decode(frame)
            (self.pushes if "push" in message else self._replies).append(message)
        return bool(data)


@dataclass
class Training:
    """One experiment of one trainer, over a raw connection."""

    line: Wire
    directory: str
    project: str = "demo"
    name: str = "run"
    experiment: str = field(default_factory=new_id)
    answer: dict[str, Any] = field(default_factory=dict)

    async def open(self, **more: Any) -> "Training":
        self.answer = await self.line.ask("experiment.open", **self.facts(), facts={"pid": os.getpid()}, **more)
        self.experiment = self.answer["experiment"]
        return self

    def facts(self) -> dict[str, Any]:
        return {"experiment": self.experiment, "name": self.name, "project": self.project, "dir": self.directory}

    async def lease(self, size_bytes: int, wait_s: float = 30.0) -> "Lease":
        answer = await self.line.ask("lease", experiment=self.experiment, size_bytes=size_bytes, wait_s=wait_s)
        return Lease(answer["arena"], answer["generation"], answer["size_bytes"], self.line.fds.pop())

    def write(self, lease: "Lease", checkpoint: str, files: dict[str, bytes], **more: Any) -> None:
        """Do what a client does between the lease and the message: write, describe, set the word."""
        images, end = layout(files)
        facts = {**self.facts(), "id": self.experiment}
        descriptor = msgspec.json.encode(
            {
                "v": 1,
                "checkpoint": checkpoint,
                "experiment": {key: facts[key] for key in ("id", "project", "name", "dir")},
                "files": msgspec.to_builtins(images),
                **more,
            }
        )
        with mmap.mmap(lease.fd, lease.size_bytes) as page:
            control.set_state(page, control.WRITING)
            for image, data in zip(images, files.values(), strict=True):
                page[image.offset : image.offset + len(data)] = data
            page[end : end + len(descriptor)] = descriptor
            control.commit(page, end, descriptor)

    async def save(self, step: int | None = 1, files: dict[str, bytes] | None = None, **more: Any) -> str:
        """Hand one checkpoint over; return its id once it is staged."""
        files = files or {"model.safetensors": a_tensor(), "state.json": b'{"v":1}'}
        lease = await self.lease(size_for(files))
        checkpoint = new_id()
        try:
            self.write(lease, checkpoint, files, step=step, **more)
        finally:
            lease.close()
        await self.line.ask("commit", **lease.names(), experiment=self.experiment, checkpoint=checkpoint)
        return checkpoint

    async def saved(self, step: int | None = 1, **more: Any) -> str:
        """Hand one over and wait until it is verified."""
        checkpoint = await self.save(step, **more)
        await self.line.push("level", checkpoint=checkpoint, level="verified", state="live")
        return checkpoint


@dataclass
class Lease:
    """A lent arena as its holder has it."""

    arena: str
    generation: int
    size_bytes: int
    fd: int

    def names(self) -> dict[str, Any]:
        return {"arena": self.arena, "generation": self.generation}

    def close(self) -> None:
        os.close(self.fd)


def size_for(files: dict[str, bytes]) -> int:
    """An arena for these files and their descriptor."""
    return layout(files)[1] + 16 * control.PAGE


def a_tensor(seed: int = 0, size_bytes: int = 4096) -> bytes:
    """A whole safetensors file."""
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size_bytes, size_bytes)
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(size_bytes)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def eventually(condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Ask again until it is so; what is waited for is another process's doing."""
    with anyio.fail_after(patience_s):
        while True:
            found = condition()
            found = await found if hasattr(found, "__await__") else found
            if found:
                return found
            await anyio.sleep(0.02)


def open_fds(of: str = "") -> int:
    """Count those whose name holds this, without those that only wait for the collector since an earlier test.

    Threads that an earlier test or a library left in this process open and close descriptors of their own at any
    time: who counts once counts those of one name.
    """
    gc.collect()
    return sum(of in name for name in descriptors.names(os.getpid()))
