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
import faulthandler
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Any, NamedTuple

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from ckptd import __version__, failpoint, origins
from ckptd import log as logging
from ckptd.catalog import Catalog, holds, open_catalog
from ckptd.clock import Clock, SystemClock, tick
from ckptd.config import Settings
from ckptd.errors import BadConfig, CkptdError
from ckptd.events import Bus, Event
from ckptd.intake import lastwords, premises, recover
from ckptd.intake.admit import Admission
from ckptd.intake.alarm import announce
from ckptd.intake.arenas import ArenaPool, Use
from ckptd.intake.besting import Besting
from ckptd.intake.commands import Commands
from ckptd.intake.control import Control
from ckptd.intake.doctor import Doctor
from ckptd.intake.extensions import Extensions
from ckptd.intake.files import Files
from ckptd.intake.follow import Followers
from ckptd.intake.listener import Listener
from ckptd.intake.observers import Observers
from ckptd.intake.presence import MetricsBuffer, Presence
from ckptd.intake.reconcile import Reconciler
from ckptd.intake.retiring import Retiring
from ckptd.intake.service import Service
from ckptd.intake.spooled import Spool
from ckptd.intake.status import Plant, Status
from ckptd.intake.training import Front
from ckptd.intake.trouble import Signs, Troubles, Vitals
from ckptd.jobs import Jobs
from ckptd.notify import Notifier, passed_fds
from ckptd.pipeline import Pipeline, braking
from ckptd.pipeline.tools import Tools
from ckptd.pipeline.winners import follow_rules
from ckptd.section import changed_settings
from ckptd.worker import Workers, heap

log = structlog.get_logger()

REAP_S = 1.0  # as often as departed trainers are looked for: one wake-up for both
TEND_S = 10.0
STARTING_S = 600.0  # a large catalog is checked, and perhaps migrated, before anything else can be said
CLOSING_S = 20.0  # workers are ended, the WAL is written back
SPILL_BYTES_PER_S = 20 << 20  # what the slowest disk of a node is trusted to take


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
    troubles: Troubles
    observers: Observers
    extensions: Extensions
    stop: anyio.Event


class Said(NamedTuple):
    """What the parts share before there is any part: the time, and who is told."""

    clock: Clock
    notifier: Notifier
    bus: Bus


async def run(loaded: origins.Loaded, passed: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """Serve until SIGTERM; drain; return. Every error that ends the daemon comes out of here."""
    clock, notifier, bus = SystemClock(), Notifier(), Bus()
    settings = loaded.settings
    listening, stored = premises.listening(passed, settings.socket, settings.mode)
    notifier.adopted(name for name, _ in stored)
    notifier.extend(STARTING_S)
    target = settings.catalog.url or settings.state_dir / "catalog.sqlite"
    async with (
        open_catalog(target, settings.catalog, clock, partial(announce, bus)) as catalog,
        anyio.create_task_group() as services,
    ):
        parts = _assemble(loaded, options, catalog, Said(clock, notifier, bus))
        await services.start(parts.workers.run)
        services.start_soon(parts.followers.run)
        services.start_soon(parts.metrics.run)
        services.start_soon(parts.observers.run)
        services.start_soon(parts.extensions.run)
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
                    front.start_soon(parts.troubles.pulse.run)
                    await anyio.to_thread.run_sync(lastwords.clear, listening.getsockname())
                    notifier.ready()
                    notifier.status(parts.troubles.public_line())
                    log.info("daemon.ready", pid=os.getpid(), version=__version__, socket=str(settings.socket))
                    await parts.stop.wait()
                    _say_goodbye(parts, drain)
                    front.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            notifier.extend(CLOSING_S)
            await parts.metrics.flush()
            await _spill(parts)
            notifier.extend(CLOSING_S)
        services.cancel_scope.cancel()
    parts.pool.close()
    listening.close()
    log.info("daemon.stopped")


def _assemble(loaded: origins.Loaded, options: argparse.Namespace, catalog: Catalog, said: Said) -> Parts:
    """Make every part and tell each what it works with. Nothing runs and nothing is read yet."""
    settings, clock, notifier, bus = loaded.settings, said.clock, said.notifier, said.bus
    vitals = Vitals(socket=str(settings.socket), started_s=clock.monotonic_s())
    jobs = Jobs(catalog, settings.jobs, clock, SystemRandom())
    extensions = Extensions(catalog, bus, clock, settings)
    workers = Workers(settings.workers, clock, extensions.facts.tell)
    pool = ArenaPool(settings.arenas, notifier, clock)
    admission = Admission(catalog, jobs, pool)
    # The settings are asked for anew at each use, so that a reload reaches everything at once.
    admission.current = settings
    extensions.follow(admission.settings)
    files = Files(catalog, jobs, admission, workers)
    spool = Spool(str(settings.state_dir / "spool"), admission, files, pool)
    followers = Followers(catalog, bus, settings.intake.pushes_max)
    presence = Presence(catalog, clock, settings.intake.lost_after_s)
    metrics = MetricsBuffer(catalog, settings.catalog.metrics_flush_s, extensions.thresholds.look)
    reconciler = Reconciler(catalog, workers, files, admission.settings)
    tools = Tools(catalog, jobs, workers, spool, clock, admission.settings, ask=extensions.hooked.runner.ask)
    front = Front(
        catalog, jobs, pool, admission, files, followers, presence, metrics, clock, admission.settings,
        str(settings.state_dir), extensions.loads(tools).check,
    )  # fmt: skip
    plant = Plant(front, workers, reconciler, vitals, lambda: listener)
    troubles = Troubles(Signs(tools, pool, reconciler, spool, notifier, bus, vitals))
    status = Status(plant, troubles)
    commands = Commands(plant, tools, Doctor(plant, status, troubles).examine)
    control = Control(front)
    observers = Observers(plant, status, troubles, bus, control.recall)
    extensions.attend(front)
    service = Service(
        front,
        {
            **control.handlers,
            **status.handlers,
            **commands.handlers,
            **Retiring(front, tools).handlers,
            **Besting(front, tools).handlers,
            **observers.handlers,
            **extensions.handlers,
        },
    )
    service.noticed = observers.noticed
    listener = Listener(settings.intake, clock, service.handle, service.gone)
    admission.on_root, admission.before_open = reconciler.add, reconciler.look_before_open
    stop = anyio.Event()
    commands.stop = stop.set
    parts = Parts(
        settings, clock, notifier, bus, catalog, jobs, workers, pool, admission, spool, followers,
        presence, metrics, reconciler, Pipeline(tools), tools, service, listener, vitals, troubles, observers,
        extensions, stop,
    )  # fmt: skip
    commands.reload = partial(_reload, parts, options)
    return parts


async def _start_up(parts: Parts, stored: list[tuple[str, int]]) -> None:
    """Take over what an earlier daemon left; only then is anybody served."""
    if failpoint.armed():
        log.warning("failpoints.armed", points=failpoint.armed())
    adopted = recover.adopt(parts.pool, stored)
    failpoint.hit("start.adopted")
    await parts.extensions.hooked.delivery.recall()
    running = await parts.jobs.recover()
    await recover.enter_roots(parts.catalog, parts.reconciler, parts.settings)
    found = await recover.recover(parts.catalog, parts.admission, parts.pool, parts.spool)
    failpoint.hit("start.recovered")
    parts.extensions.started()
    log.info("daemon.recovered", arenas=len(adopted), jobs_interrupted=running, saves_found=found)


def _undone(parts: Parts) -> bool:
    """Whether an arena still holds a save that is not durable: the drain waits for these."""
    return any(arena.use is Use.BUSY for arena in parts.pool.all())


async def _spill(parts: Parts) -> None:
    """Put what the drain did not get to into the spool, so that a clean stop loses nothing either."""
    for arena in parts.pool.reap():
        await parts.admission.rescue(arena)  # committed since the front closed, by a trainer that may be dead by now
    for arena in parts.pool.all():
        if arena.use is Use.BUSY:
            parts.notifier.extend(CLOSING_S + arena.size_bytes / SPILL_BYTES_PER_S)
            try:
                await parts.spool.spill(arena)
                failpoint.hit("stop.spilled")
            except (CkptdError, OSError) as error:
                # The service manager's copy is all that is left of it; the other saves are still written.
                log.critical("save.not_spilled", checkpoint=arena.checkpoint_id, error=str(error))
            else:
                log.warning("save.spilled", checkpoint=arena.checkpoint_id, bytes=arena.size_bytes)


def _say_goodbye(parts: Parts, drain: anyio.CancelScope) -> None:
    parts.vitals.draining = True
    drain_s = parts.settings.drain_s
    drain.deadline = anyio.current_time() + drain_s
    parts.notifier.stopping()
    parts.extensions.stopping(drain_s)
    parts.notifier.status("draining: what was acknowledged is finished, or goes to the spool")
    parts.notifier.extend(drain_s + CLOSING_S)
    log.info("daemon.draining", drain_s=drain_s)
    failpoint.hit("stop.draining")
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
        changed = await _reload(parts, options)
    except CkptdError as error:
        log.error("config.not_reloaded", **error.to_wire())  # noqa: TRY400 - the old configuration goes on
        return
    log.info("config.reloaded", **changed)


RESTART_NEEDED = (
    "mode",
    "state_dir",
    "socket",
    "catalog",
    "workers",
    "intake",
    "arenas",
    "log",
    "jobs.running_max",
    "hooks_defaults",
    "web",
)


async def _reload(parts: Parts, options: argparse.Namespace) -> dict[str, Any]:
    """Read the configuration again. Names what changed, and what of it waits for a restart. BadConfig: nothing did."""
    new = (await anyio.to_thread.run_sync(_load, options)).settings
    hooks = parts.extensions.hooked.prepare(new)
    old, parts.admission.current = parts.admission.current, new
    changed = changed_settings(old, new)
    failpoint.hit("reload.applied")
    await recover.enter_roots(parts.catalog, parts.reconciler, new)
    parts.extensions.hooked.adopt(hooks)
    await follow_rules(parts.tools, old)
    await braking.look_again(parts.tools)
    parts.extensions.facts.tell(Event("config.reloaded", parts.clock.now(), data={"changed": changed}))
    return {"changed": changed, "restart_needed": [n for n in changed if n.startswith(RESTART_NEEDED)]}


async def _reap(parts: Parts) -> None:
    """Look after leases whose holder vanished without a word."""
    while True:
        await tick(REAP_S)
        await parts.service.reap()


async def _tend(parts: Parts) -> None:
    """Upkeep: memory of unused arenas, leases that ended, temporary directories of dead publishes."""
    swept_s = -parts.settings.orphan_age_s
    while True:
        parts.pool.trim()
        try:
            await parts.catalog.recover()
            if parts.clock.monotonic_s() - swept_s > parts.settings.orphan_age_s:
                swept_s = parts.clock.monotonic_s()
                await parts.catalog.write(lambda tx: holds.expire(tx, tx.clock.now()))
                await parts.reconciler.sweep(parts.settings.orphan_age_s)
        except CkptdError as error:
            log.warning("upkeep.failed", **error.to_wire())
        await tick(TEND_S)


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
    faulthandler.enable()  # the service manager's SIGABRT leaves every thread's stack in the log
    heap.bound()
    heap.settle()
    passed = passed_fds()
    door = premises.address(passed)
    try:
        with lastwords.left(door):
            loaded = _load(options)
            lock = premises.lock(loaded.settings.state_dir)
    except CkptdError as error:
        sys.stderr.write(f"ckptd: {error.message}\n" + (f"  {error.hint}\n" if error.hint else ""))
        return error.exit_code
    sink = logging.start(loaded.settings.log, SystemClock())
    try:
        with lastwords.left(door):
            anyio.run(run, loaded, passed, options)
    except CkptdError as error:
        log.error("daemon.ended", **error.to_wire())  # noqa: TRY400 - it is for a person, who needs no traceback
        return error.exit_code
    except BaseExceptionGroup as errors:
        log.exception("daemon.broke")
        return lastwords.cause(errors).exit_code
    finally:
        os.close(lock)
        sink.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
