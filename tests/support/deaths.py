"""Processes that exist to die: forked from one that has imported everything, so that a death costs milliseconds.

    child = Child(deaths.write_catalog, str(path), "run-1", "catalog.commit:9=kill", 64 << 20)
    child.kill(); child.told()        # what it said until then

A child says things (`say`) the moment they are true; what it has said is what somebody was promised.
"""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import anyio

from ckptd import catalog, config, failpoint
from ckptd.catalog import sqlite, versions
from ckptd.errors import CatalogFault
from ckptd.jobs import Jobs, NewJob
from ckptd.worker import publish  # noqa: F401  imported before the fork
from tests.support import protocols
from tests.support.arena import sealed
from tests.support.catalog import SETTINGS, StillClock, a_checkpoint, climb, experiment, opened
from tests.support.interrupt import Interrupter

END_S = 120.0
DISK_GONE = 3
WRITERS = 4
UPKEEP_COMMITS = 16  # the daemon's is larger: here the log must be truncated before the child dies

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["tests.support.deaths"])


class Child:
    """One process that runs `function(say, *given)`."""

    def __init__(self, function: Callable[..., None], *given: Any) -> None:
        """Start it."""
        self._mine, theirs = _fork.Pipe(duplex=False)
        self._process = _fork.Process(target=_run, args=(function, theirs, given), daemon=True)
        self._process.start()
        theirs.close()

    def hear(self, patience_s: float = END_S) -> str | None:
        """Return the next thing it says; None when it is dead. AssertionError when it stays silent."""
        assert self._mine.poll(patience_s), "the child says nothing"
        try:
            return self._mine.recv_bytes().decode()
        except EOFError:
            return None

    def heard(self) -> list[str]:
        """Everything that it has said by now."""
        found = []
        while self._mine.poll(0) and (said := self.hear()) is not None:
            found.append(said)
        return found

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def told(self) -> list[str]:
        """Everything that it still says until its end."""
        found = []
        while (said := self.hear()) is not None:
            found.append(said)
        return found

    def ended(self) -> int:
        """Wait for its end; return its exit status (negative: the signal)."""
        self._process.join(END_S)
        status = self._process.exitcode
        assert status is not None, "the child does not end"
        self._process.close()
        self._mine.close()
        return status


def _run(function: Callable[..., None], pipe: Connection, given: tuple[Any, ...]) -> None:
    function(lambda text: pipe.send_bytes(text.encode()), *given)


def act(_say: Callable[[str], None], protocol: protocols.Protocol, stage: protocols.Stage, at: int) -> None:
    """Run a protocol and die before its operation `at`."""
    fd, images = sealed(protocols.FILES)
    with Interrupter(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        protocol.act(replace(stage, fd=fd, images=images))


def write_catalog(say: Callable[[str], None], path: str, name: str, plan: str, wal_bytes_max: int) -> None:
    """Commit checkpoints, all rows of each in one transaction, until death; say each id once it is committed."""
    failpoint._plan = failpoint._parse(plan)
    catalog.UPKEEP_COMMITS = UPKEEP_COMMITS
    settings = SETTINGS.model_copy(update={"wal_bytes_max": wal_bytes_max})
    try:
        asyncio.run(_write(say, Path(path), name, settings))
    except* CatalogFault:
        os._exit(DISK_GONE)  # the power went first


def write_carelessly(say: Callable[[str], None], path: str, name: str) -> None:
    """The same under synchronous=NORMAL, which is what SQLite calls safe: a test of power cuts must catch it."""
    prepare = sqlite._prepare

    def careless(engine: Any, pragmas: tuple[str, ...], begin: str = "") -> None:
        # No checkpoint of the log either: it would make all durable that came before it.
        less = (*(each.replace("=FULL", "=NORMAL") for each in pragmas), "PRAGMA wal_autocheckpoint=0")
        prepare(engine, less, begin)

    sqlite._prepare = careless
    write_catalog(say, path, name, "", 64 << 20)


async def _write(say: Callable[[str], None], path: Path, name: str, settings: config.Catalog) -> None:
    async with opened(path, settings=settings) as store:
        jobs = Jobs(store, config.Jobs(), StillClock(), Random(1))

        async def trainer(number: int) -> None:
            known = await experiment(store, name=f"{name}-{number}")
            step = 0
            while True:
                new = a_checkpoint(known, step, metrics={"loss": 1.0, "acc": 2.0}, tags=("a", "b"))

                async def save(tx: Any) -> None:
                    await climb(tx, new)  # noqa: B023  committed before the next is made
                    await jobs.enqueue(tx, NewJob(checkpoint_id=new.id, lane=known, stage="verify"))  # noqa: B023

                await store.write(save)
                say(new.id)
                step += 1

        async with anyio.create_task_group() as group:
            for number in range(WRITERS):
                group.start_soon(trainer, number)


def migrate(say: Callable[[str], None], path: str, home: str, point: str, nth: int = 1) -> None:
    """Bring a catalog to version 0002 of `home`, and stand still at a named step, having said its name."""
    versions.HERE, versions.HEAD = Path(home), "0002"
    seen = 0

    def hit(reached: str) -> None:
        nonlocal seen
        seen += reached == point
        if reached == point and seen == nth:
            say(point)
            time.sleep(END_S)

    failpoint.hit = hit

    async def main() -> None:
        async with opened(Path(path)):
            pass

    asyncio.run(main())
