"""What goes wrong while a soak runs: a table of faults, and the seeded order in which they come.

A fault is a function that breaks something, waits a while and heals it again. `ends_processes` marks those
that end a process of ckptd: late in a long run they are left out, for memory that grows with a process's age
shows only in one that lives.
"""

import contextlib
import os
import random
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.soak.crew import Training
from tests.soak.ground import Ground
from tests.support.node import NotAnswering, is_alive

KILL_POINTS = (
    "recv.header", "arena.sealed", "job.committed", "catalog.commit", "catalog.committed", "copy.tmp_created", "copy.allocated",
    "copy.chunk", "manifest.written", "publish.renamed", "catalog.durable", "ack.durable", "arena.released", "verify.read",
    "verify.recorded", "link.made", "retain.planned", "retain.tombstone", "retain.moved", "retain.trashed", "retain.unlink",
    "spool.admitted",
)  # fmt: skip
ERROR_POINTS = ("copy.tmp_created", "copy.allocated", "copy.chunk", "manifest.written", "verify.read", "catalog.commit")
SLOW_POINTS = ("copy.chunk", "manifest.written", "verify.read")
CLOCK_STEPS_S = (-3600.0, 86400.0, 600.0, -1.7e9)  # an hour back, a day on, a little, the early seventies
CONNECTIONS = 200


@dataclass(frozen=True)
class Stage:
    """What a fault may break."""

    ground: Ground
    trainers: list[Training]
    dice: random.Random
    longest_s: float  # no fault keeps something broken for longer


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    act: Callable[[Stage], None]
    ends_processes: bool = False


def kill_daemon(stage: Stage) -> None:
    """The daemon dies."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(stage.ground.daemon_pid, signal.SIGKILL)


def kill_worker(stage: Stage) -> None:
    """An I/O worker dies."""
    pids = sorted(stage.ground.workers())
    if pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stage.dice.choice(pids), signal.SIGKILL)


def kill_trainer(stage: Stage) -> None:
    """A trainer dies in whatever it does."""
    stage.dice.choice(stage.trainers).kill()


def kill_both(stage: Stage) -> None:
    """A trainer and the daemon die together."""
    pid = stage.ground.daemon_pid
    stage.dice.choice(stage.trainers).kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def stop_daemon(stage: Stage) -> None:
    """The daemon stands still, and goes on."""
    _stand_still(stage.ground.daemon_pid, stage)


def stop_worker(stage: Stage) -> None:
    """A worker stands still, as on a mount that hangs; after workers.request_s it is given up."""
    pids = sorted(stage.ground.workers())
    if pids:
        _stand_still(stage.dice.choice(pids), stage)


def _stand_still(pid: int, stage: Stage) -> None:
    if is_alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(_while(stage))
            os.kill(pid, signal.SIGCONT)


def kill_at_a_step(stage: Stage) -> None:
    """Whoever reaches a step next dies there."""
    _armed(stage, stage.dice.choice(KILL_POINTS), "kill")


def fail_a_call(stage: Stage) -> None:
    """A call fails as on a broken or a full disk."""
    _armed(stage, stage.dice.choice(ERROR_POINTS), stage.dice.choice(("eio", "enospc")))


def slow_disk(stage: Stage) -> None:
    """A call takes a second."""
    _armed(stage, stage.dice.choice(SLOW_POINTS), "delay:1.0")


def _armed(stage: Stage, point: str, action: str) -> None:
    stage.ground.arm(f"{point}:{stage.dice.randint(1, 4)}", action)
    end_s = time.monotonic() + _while(stage)
    while not stage.ground.fired() and time.monotonic() < end_s:
        time.sleep(0.05)
    stage.ground.disarm()


def fill_disk(stage: Stage) -> None:
    """The small disk is full to its last byte, and then it is not."""
    path = stage.ground.small / "somebody-elses"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            continue
    time.sleep(_while(stage))
    path.unlink()


def lock_catalog(stage: Stage) -> None:
    """Another process holds the catalog's lock."""
    db = sqlite3.connect(stage.ground.state / "catalog.sqlite", timeout=5.0, isolation_level=None)
    with contextlib.suppress(sqlite3.OperationalError):
        db.execute("PRAGMA wal_autocheckpoint=0")  # it only holds the lock
        db.execute("BEGIN IMMEDIATE")
        time.sleep(_while(stage))
        db.execute("ROLLBACK")
    db.close()


def set_clock(stage: Stage) -> None:
    """The wall clock jumps, and jumps back."""
    stage.ground.clock.write_text(str(stage.dice.choice(CLOCK_STEPS_S)))
    time.sleep(_while(stage))
    stage.ground.clock.write_text("0")


def storm(stage: Stage) -> None:
    """Two hundred connect, say half a word, and leave."""
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.setblocking(False)
            with contextlib.suppress(OSError):
                peer.connect(str(stage.ground.socket))
                peer.send(b'{"v":1,')
        time.sleep(0.2)


def _while(stage: Stage) -> float:
    return stage.dice.uniform(0.2, 1.0) * stage.longest_s


def faults(ground: Ground) -> list[Fault]:
    """Return those that can be had here."""
    found = [
        Fault("daemon killed", kill_daemon, ends_processes=True),
        Fault("worker killed", kill_worker, ends_processes=True),
        Fault("trainer killed", kill_trainer),
        Fault("trainer and daemon killed", kill_both, ends_processes=True),
        Fault("killed at a step", kill_at_a_step, ends_processes=True),
        Fault("daemon stopped a while", stop_daemon),
        Fault("worker stopped a while", stop_worker, ends_processes=True),
        Fault("call failed", fail_a_call),
        Fault("disk slow", slow_disk),
        Fault("catalog locked", lock_catalog),
        Fault("clock set", set_clock),
        Fault("connections stormed", storm),
    ]
    return found + ([Fault("disk full", fill_disk)] if ground.small_is_mounted else [])


def schedule(known: list[Fault], dice: random.Random) -> Iterator[Fault]:
    """Every fault in turn, each turn in another order: in a long run each comes equally often."""
    while True:
        yield from dice.sample(known, len(known))


def act(fault: Fault, stage: Stage) -> bool:
    """Let it happen; False when nobody was there to suffer it."""
    try:
        fault.act(stage)
    except NotAnswering:
        return False
    return True
