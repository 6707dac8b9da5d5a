"""The daemon: opens everything, nests the task groups, drains. READ THIS FILE FIRST.

The nesting below is the shutdown order, innermost first: the front stops promising, the pipeline
finishes what was promised, then workers and followers end, then the catalog closes.

    trainer ─► intake/listener ─► intake/service ─► intake/training ─► intake/admit ─► jobs
    watched ─► intake/reconcile ──────────────────────────────────────────┘             │
    spool ───► intake/spooled ────────────────────────────────────────────┘             ▼
    people ──► intake/control, commands                    pipeline: settle publish verify link retain
                                                               │ worker/ (the only code on storage)
                                                               ▼
                                                           catalog ─► events ─► followers, log

This process never touches a storage root, never hashes, never parses foreign bytes.
"""

import argparse
import fcntl
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from ckptd import __version__, failpoint, origins
from ckptd import log as logging
from ckptd.catalog import Catalog, open_catalog, roots
from ckptd.catalog.roots import NewRoot
from ckptd.clock import Clock, SystemClock
from ckptd.config import Settings
from ckptd.errors import AlreadyRunning, BadConfig, CkptdError
from ckptd.events import Bus
from ckptd.intake import recover
from ckptd.intake.admit import Admission
from ckptd.intake.arenas import ArenaPool, Use
from ckptd.intake.commands import Commands
from ckptd.intake.control import Control, Plant, Vitals
from ckptd.intake.doctor import Doctor
from ckptd.intake.follow import Followers
from ckptd.intake.listener import Listener
from ckptd.intake.presence import MetricsBuffer, Presence
from ckptd.intake.reconcile import Reconciler
from ckptd.intake.service import Service
from ckptd.intake.spooled import Spool
from ckptd.intake.training import Front
from ckptd.jobs import Jobs
from ckptd.notify import Notifier, passed_fds
from ckptd.pipeline import Pipeline, retain
from ckptd.pipeline.tools import Tools
from ckptd.worker import Workers

log = structlog.get_logger()

SOCKET_NAME = "ckptd.socket"
REAP_S = 0.5
TEND_S = 10.0


@dataclass
class Parts:
    """Everything the daemon is made of, built once in `_assemble`."""

    settings: Settings
    clock: Clock
    notifier: Notifier
    bus: Bus
    catalog: Catalog
    jobs: Jobs
    workers: Workers
    pool: ArenaPool
    admission: Admission
    spool: Spool
    followers: Followers
    presence: Presence
    metrics: MetricsBuffer
    reconciler: Reconciler
    pipeline: Pipeline
    tools: Tools
    service: Service
    listener: Listener
    vitals: Vitals
    stop: anyio.Event


async def run(loaded: origins.Loaded, passed: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """Serve until SIGTERM; drain; return. Every error that ends the daemon comes out of here."""
    clock, notifier, bus = SystemClock(), Notifier(), Bus()
    settings = loaded.settings
    listening, stored = _listening(passed, settings.socket)
    target = settings.catalog.url or settings.state_dir / "catalog.sqlite"
    async with (
        open_catalog(target, settings.catalog, clock, bus.publish) as catalog,
        anyio.create_task_group() as services,
    ):
        parts = _assemble(loaded, catalog, clock, notifier, bus)
        await services.start(parts.workers.run)
        services.start_soon(parts.followers.run)
        services.start_soon(parts.metrics.run)
        with anyio.CancelScope() as drain:
            # `_signals` outlives the scope: to cancel what has ended changes nothing.
            services.start_soon(_signals, parts, drain, options)  # noqa: ASYNC111
            await _start_up(parts, stored)
            async with anyio.create_task_group() as work:
                work.start_soon(parts.pipeline.run, parts.stop, partial(_undone, parts))
                async with anyio.create_task_group() as front:
                    await front.start(parts.listener.run, listening)
                    for task in (parts.spool.run, parts.reconciler.run, parts.presence.run):
                        front.start_soon(task)
                    front.start_soon(_reap, parts)
                    front.start_soon(_tend, parts)
                    front.start_soon(_feed_watchdog, parts)
                    notifier.ready()
                    notifier.status("serving")
                    log.info("daemon.ready", pid=os.getpid(), version=__version__, socket=str(settings.socket))
                    await parts.stop.wait()
                    _say_goodbye(parts, drain)
                    front.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await parts.metrics.flush()
            await _spill(parts)
        services.cancel_scope.cancel()
    parts.pool.close()
    listening.close()
    log.info("daemon.stopped")


def _assemble(loaded: origins.Loaded, catalog: Catalog, clock: Clock, notifier: Notifier, bus: Bus) -> Parts:
    """Make every part and tell each what it works with. Nothing runs and nothing is read yet."""
    settings = loaded.settings
    vitals = Vitals(socket=str(settings.socket), started_s=clock.monotonic_s())
    jobs = Jobs(catalog, settings.jobs, clock, SystemRandom())
    workers = Workers(settings.workers, clock, bus.publish)
    pool = ArenaPool(settings.arenas, notifier, clock)
    admission = Admission(catalog, jobs, pool, clock)
    spool = Spool(str(settings.state_dir / "spool"), admission, pool, clock)
    followers = Followers(catalog, bus, settings.intake.pushes_max)
    presence = Presence(catalog, clock, settings.intake.lost_after_s)
    metrics = MetricsBuffer(catalog, settings.catalog.metrics_flush_s)
    reconciler = Reconciler(catalog, workers, admission, jobs, clock)
    # The settings are asked for anew at each use, so that a reload reaches everything at once.
    admission.current = settings
    parts_settings = admission.settings
    tools = Tools(catalog, jobs, workers, spool, clock, parts_settings)
    front = Front(
        catalog, jobs, pool, admission, followers, presence, metrics, clock, parts_settings, str(settings.state_dir)
    )
    plant = Plant(front, workers, reconciler, vitals, lambda: listener)
    control = Control(plant)
    commands = Commands(plant, tools, Doctor(plant, control, notifier).examine)
    service = Service(front, {**control.handlers, **commands.handlers})
    listener = Listener(settings.intake, clock, service.handle, service.gone)
    admission.on_root = reconciler.add
    stop = anyio.Event()
    commands.stop = stop.set
    parts = Parts(
        settings, clock, notifier, bus, catalog, jobs, workers, pool, admission, spool, followers,
        presence, metrics, reconciler, Pipeline(tools), tools, service, listener, vitals, stop,
    )  # fmt: skip
    commands.reload = partial(_reload, parts, loaded)
    return parts


async def _start_up(parts: Parts, stored: list[tuple[str, int]]) -> None:
    """Take over what an earlier daemon left; only then is anybody served."""
    if failpoint.armed():
        log.warning("failpoints.armed", points=failpoint.armed())
    adopted = recover.adopt(parts.pool, stored)
    running = await parts.jobs.recover()
    uid = os.getuid()
    for root in parts.settings.roots:
        new = NewRoot(
            path=str(root.path),
            kind=root.kind,
            uid=uid,
            project=root.project,
            allow_delete=root.allow_delete,
            allow_links=root.allow_links,
        )
        await parts.catalog.write(partial(_ensure, new))
    for known in await parts.catalog.read(roots.all_roots):
        parts.reconciler.add(known)
    found = await recover.recover(parts.catalog, parts.admission, parts.pool, parts.spool)
    log.info("daemon.recovered", arenas=len(adopted), jobs_interrupted=running, saves_found=found)


async def _ensure(new: NewRoot, tx: Any) -> None:
    await roots.ensure(tx, new)


def _undone(parts: Parts) -> bool:
    """Whether an arena still holds a save that is not durable: the drain waits for these."""
    return any(arena.use is Use.BUSY for arena in parts.pool.all())


async def _spill(parts: Parts) -> None:
    """Put what the drain did not get to into the spool, so that a clean stop loses nothing either."""
    for arena in parts.pool.all():
        if arena.use is Use.BUSY:
            await parts.spool.spill(arena)
            log.warning("save.spilled", checkpoint=arena.checkpoint_id, bytes=arena.size_bytes)


def _say_goodbye(parts: Parts, drain: anyio.CancelScope) -> None:
    parts.vitals.draining = True
    drain_s = parts.settings.drain_s
    drain.deadline = anyio.current_time() + drain_s
    parts.notifier.stopping()
    parts.notifier.extend(drain_s + 5)
    log.info("daemon.draining", drain_s=drain_s)
    for peer in parts.listener.peers:
        peer.push({"push": "closing"})


async def _signals(parts: Parts, drain: anyio.CancelScope, options: argparse.Namespace) -> None:
    """SIGTERM, SIGINT: drain; a second one: stop at once. SIGHUP: reload. SIGUSR1: state to the log."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) as received:
        async for number in received:
            if number == signal.SIGHUP:
                await _reload_logged(parts, options)
            elif number == signal.SIGUSR1:
                log.info("daemon.state", jobs=await parts.jobs.counts(), arenas_bytes=parts.pool.bytes_used)
            elif parts.stop.is_set():
                log.warning("daemon.aborting", signal=signal.Signals(number).name)
                drain.cancel()
            else:
                parts.stop.set()


async def _reload_logged(parts: Parts, options: argparse.Namespace) -> None:
    try:
        changed = await _reload(parts, _load(options))
    except CkptdError as error:
        log.error("config.not_reloaded", **error.to_wire())  # noqa: TRY400 - the old configuration goes on
        return
    log.info("config.reloaded", **changed)


RESTART_NEEDED = ("mode", "state_dir", "socket", "catalog", "workers", "intake", "arenas", "log")


async def _reload(parts: Parts, loaded: origins.Loaded) -> dict[str, Any]:
    """Take new settings over. Names what changed, and what of it waits for a restart."""
    old, new = parts.admission.current, loaded.settings
    changed = [name for name in type(new).model_fields if getattr(old, name) != getattr(new, name)]
    parts.admission.current = new
    for root in new.roots:
        await parts.catalog.write(
            partial(
                _ensure,
                NewRoot(
                    path=str(root.path),
                    kind=root.kind,
                    uid=os.getuid(),
                    project=root.project,
                    allow_delete=root.allow_delete,
                    allow_links=root.allow_links,
                ),
            )
        )
    for known in await parts.catalog.read(roots.all_roots):
        parts.reconciler.add(known)
    return {"changed": changed, "restart_needed": [name for name in changed if name in RESTART_NEEDED]}


async def _reap(parts: Parts) -> None:
    """Look after leases whose holder vanished without a word."""
    while True:
        await anyio.sleep(REAP_S)
        await parts.service.reap()


async def _tend(parts: Parts) -> None:
    """Upkeep: memory of unused arenas, tombstones of an earlier run, temporary directories of dead publishes."""
    swept_s = -parts.settings.orphan_age_s
    while True:
        parts.pool.trim()
        if parts.clock.monotonic_s() - swept_s > parts.settings.orphan_age_s:
            swept_s = parts.clock.monotonic_s()
            try:
                await retain.resume(parts.tools)
                await parts.reconciler.sweep(parts.settings.orphan_age_s)
            except CkptdError as error:
                log.warning("upkeep.failed", **error.to_wire())
        await anyio.sleep(TEND_S)


async def _feed_watchdog(parts: Parts) -> None:
    """Tell the service manager that the loop goes round and the catalog answers; say nothing when not."""
    interval_s = min((parts.notifier.watchdog_s or 10.0) / 2, 10.0)
    while True:
        asked_s = parts.clock.monotonic_s()
        await anyio.sleep(interval_s)
        lag_s = parts.clock.monotonic_s() - asked_s - interval_s
        if lag_s > parts.settings.watchdog_lag_s:
            log.error("loop.lag", lag_s=round(lag_s, 3))
            continue
        await parts.jobs.counts()
        parts.notifier.watchdog()


def _listening(passed: list[tuple[str, int]], path: Path) -> tuple[socket.socket, list[tuple[str, int]]]:
    """Take the listening socket out of the passed descriptors, or make one where nobody passed any."""
    for name, fd in passed:
        if name == SOCKET_NAME or (len(passed) == 1 and stat.S_ISSOCK(os.fstat(fd).st_mode)):
            return socket.socket(fileno=fd), [other for other in passed if other[1] != fd]
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    if path.is_socket():
        if sock.connect_ex(str(path)) == 0:
            raise AlreadyRunning(f"somebody serves {path} already")
        path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # The mode is set before the name exists: nobody can connect in between.
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(before)
    return sock, passed


def _lock(state_dir: Path) -> int:
    """Hold the state directory for this process. AlreadyRunning names the holder."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    (state_dir / "spool").mkdir(mode=0o700, exist_ok=True)
    fd = os.open(state_dir / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise AlreadyRunning(f"process {holder} holds {state_dir}", holder=holder) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _load(options: argparse.Namespace) -> origins.Loaded:
    overrides = {"state_dir": options.state_dir, "socket": options.socket, "log.format": options.log_format}
    given = {key: value for key, value in overrides.items() if value is not None}
    return origins.load(options.config, os.environ, given)


def main(argv: list[str] | None = None) -> int:
    """Run the daemon in this process until it is told to stop; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ckptd.daemon", description="Run by `ckptd` or systemd.")
    parser.add_argument("--config", type=Path, default=None)
    parser.add_argument("--state-dir", default=None)
    parser.add_argument("--socket", default=None)
    parser.add_argument("--log-format", choices=("auto", "json", "console"), default=None)
    options = parser.parse_args(argv)
    if sys.flags.optimize:
        sys.stderr.write("ckptd: refuses to run under -O: asserts are part of the program\n")
        return BadConfig.exit_code
    passed = passed_fds()
    try:
        loaded = _load(options)
        lock = _lock(loaded.settings.state_dir)
    except CkptdError as error:
        sys.stderr.write(f"ckptd: {error.message}\n" + (f"  {error.hint}\n" if error.hint else ""))
        return error.exit_code
    sink = logging.start(loaded.settings.log, SystemClock())
    try:
        anyio.run(run, loaded, passed, options)
    except CkptdError as error:
        log.error("daemon.ended", **error.to_wire())  # noqa: TRY400 - it is for a person, who needs no traceback
        return error.exit_code
    except BaseExceptionGroup as errors:
        log.exception("daemon.broke")
        return next((e.exit_code for e in _flat(errors) if isinstance(e, CkptdError)), 1)
    finally:
        os.close(lock)
        sink.close()
    return 0


def _flat(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flat(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
