"""Descriptors that run out at any moment, in the daemon or in its worker: things wait, nothing is lost, nobody ends."""

import contextlib
import os
import random
import re
import resource
import socket
import sqlite3
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.intake.meter import rss_bytes
from ckptd.model import new_id
from ckptd.worker.protocol import Request, Settle, Watch
from ckptd_client import control
from tests.support.node import Node, NotAnswering
from tests.support.onlooker import end, make
from tests.support.strace import Injection
from tests.support.trainer import Nursery, Trainer
from tests.support.worker_process import WorkerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROJECT = "few"
SHORT_S, LONG_S = 4.0, 40.0
OFTEN = """
[alerts]
look_s = "1s"
[disk]
free_bytes_min = "1M"
"""
CROWD_MAX = 40
LIBRARY = re.compile(r"^\d+ +openat\(.*\.so[\d.]*\", .*= \d")
BODY = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
SMALL = struct.pack("<Q", len(BODY)) + BODY + struct.pack("<f", 1.0)


@contextlib.contextmanager
def limited(pid: int, spare: int) -> Iterator[None]:
    """Let a process have `spare` descriptors more than it has now, for as long as the block lasts."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + spare, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


class Squeeze(threading.Thread):
    """Takes descriptors from the processes in `pids`, again and again; `times` it did."""

    def __init__(self, pids: list[int], seed: int) -> None:
        super().__init__(name="squeeze")
        self.times = 0
        self.error: OSError | None = None
        self.over = threading.Event()
        self._pids = pids
        self._random = random.Random(seed)

    def run(self) -> None:
        """Until `over`."""
        while not self.over.is_set():
            try:
                with limited(self._random.choice(self._pids), self._random.choice((0, 0, 1, 2, 4))):
                    self.over.wait(self._random.uniform(0.0, 0.4))
            except OSError as error:  # the process is gone: the test says so
                self.error = error
                return
            self.times += 1
            self.over.wait(self._random.uniform(0.0, 0.2))


@contextlib.contextmanager
def crowd(node: Node, chance: random.Random) -> Iterator[None]:
    """Some connections that came to say half a word."""
    with contextlib.ExitStack() as peers:
        for _ in range(chance.randrange(CROWD_MAX)):
            peer = peers.enter_context(socket.socket(socket.AF_UNIX))
            peer.setblocking(False)
            with contextlib.suppress(OSError):  # the kernel's queue is full
                peer.connect(str(node.socket))
                peer.send(b'{"v":1,')
        yield


def work(node: Node, trainers: list[Trainer], chance: random.Random, place: Path) -> list[str]:
    """Do one thing that people do; return what was acknowledged."""
    step = time.monotonic_ns()
    if chance.random() < 0.5:
        saved = chance.choice(trainers).save(seed=step % 1000, step=step)
        assert saved["error"] is None, saved
        return [saved["id"]]
    with contextlib.suppress(NotAnswering):  # out of descriptors, it may let a newcomer go
        if chance.random() < 0.5:
            node.ask_once(chance.choice(("status", "doctor", "roots", "list")))
        else:
            path, checkpoint = place / f"model_{step}.safetensors", new_id()
            path.write_bytes(SMALL)
            answer = node.ask_once("submit", path=str(path), checkpoint=checkpoint, project=PROJECT)
            return [checkpoint] if answer["ok"] else []
    return []


def threads_of(pids: set[int]) -> list[str]:
    """What each thread of these processes and of their children waits for in the kernel, a line each."""
    told = subprocess.run(
        ["ps", "-eLo", "pid,ppid,tid,stat,wchan:32,args"], capture_output=True, text=True, check=False
    )
    return [line for line in told.stdout.splitlines() if pids & {int(n) for n in re.findall(r"\d+", line)[:2]}]


def tell_of(node: Node, checkpoints: list[str]) -> None:
    """Print what is known of these: a failure here comes once in hundreds of runs."""
    lines = node.log.read_text(errors="replace").splitlines()
    print("\n".join(line for line in lines if any(one in line for one in checkpoints)))
    # What is no event at all is a traceback of some thread.
    alarming = ('"level":"warning"', '"level":"error"')
    print("\n".join(line for line in lines if not line.startswith("{") or any(one in line for one in alarming)))
    print(sorted(path.name for path in node.spool.rglob("*")))
    with contextlib.suppress(NotAnswering):  # what went wrong is told all the same
        for checkpoint in checkpoints:
            print(node.ask_once("show", selector=checkpoint), node.ask_once("status").get("jobs"))
    with contextlib.suppress(NotAnswering, OSError, sqlite3.Error):
        print("\n".join(threads_of({node.daemon_pid, *node.workers()})))
        with contextlib.closing(sqlite3.connect(node.state / "catalog.sqlite")) as catalog:
            print(catalog.execute("SELECT * FROM job WHERE state <> 'done'").fetchall())


@pytest.mark.parametrize(
    ("seed", "lasts_s"),
    [(1, SHORT_S), *(pytest.param(seed, LONG_S, marks=pytest.mark.faults) for seed in (2, 3))],
)
def test_descriptors_that_run_out_at_any_moment_end_nothing_and_lose_nothing(
    plain_nursery: Nursery, tmp_path: Path, seed: int, lasts_s: float
) -> None:
    """F15. The daemon and its worker stay the same processes, and all that was acknowledged is verified in the end."""
    # Without fail points, whose file could not be opened either; and what looks now and then looks often.
    node = make(prefix=("env", "-u", "CKPTD_FAIL"), more=OFTEN).start()
    chance, acknowledged = random.Random(seed), []
    try:
        trainers = [plain_nursery.trainer(node.environ) for _ in range(3)]
        for number, trainer in enumerate(trainers):
            trainer.open(name=f"few{number}", project=PROJECT, dir=str(node.runs))
            node.wait_level(trainer.save(seed=0, step=0)["id"])
        pids = [node.daemon_pid, *node.workers()]
        squeeze = Squeeze(pids, seed)
        squeeze.start()
        try:
            over_s = time.monotonic() + lasts_s
            while time.monotonic() < over_s:
                with crowd(node, chance):
                    acknowledged += work(node, trainers, chance, tmp_path)
        finally:
            squeeze.over.set()
            squeeze.join()
        assert squeeze.error is None
        assert not node.said("daemon.broke"), node.said("daemon.broke")
        for checkpoint in acknowledged:
            node.wait_level(checkpoint)
        assert [node.daemon_pid, *node.workers()] == pids
        assert not [line for name in ("request.bug", "stage.bug", "peer.bug") for line in node.said(name)]
        print(f"{squeeze.times} squeezes, {len(acknowledged)} hand-offs acknowledged, all verified")
    except BaseException as error:
        print(node.tail(), node.said("daemon.broke"), node.said("worker.lost"))
        tell_of(node, [one for one in acknowledged if one in str(error)])
        raise
    finally:
        end(node)


def first_words(worker: WorkerProcess, number: int) -> tuple[bool, str]:
    """Whether a request is on its way or done well, and the code of its error."""
    frame = worker.frame()
    while frame["id"] != number or ("part" not in frame and "ok" not in frame):
        frame = worker.frame()
    return frame.get("ok", True), frame.get("error", {}).get("code", "")


@contextlib.contextmanager
def fresh_worker() -> Iterator[WorkerProcess]:
    """A worker that listens and was asked for nothing yet."""
    with WorkerProcess() as worker:
        worker.send_raw(b'{"id":99,"verb":"none"}\n')
        assert not worker.reply(99)["ok"]
        yield worker


def opens(request: Request) -> list[str]:
    """What is opened for the first of such a request, by the worker and by its parser."""
    nothing = "fsync:error=EIO:when=1"
    with fresh_worker() as worker, Injection(worker.process.pid, nothing, traced="openat") as traced:
        assert first_words(worker, worker.send(request)) == (True, "")
    return traced.calls


def libraries(calls: list[str]) -> set[int]:
    """At which of its opens a thread comes to a library: the first and the last two of each thread."""
    seen: Counter[str] = Counter()
    found: dict[str, list[int]] = {}
    for call in calls:
        thread = call.split()[0]
        seen[thread] += 1
        if LIBRARY.match(call):
            found.setdefault(thread, []).append(seen[thread])
    return {nth for each in found.values() for nth in (*each[:2], *each[-2:])}


@pytest.mark.parametrize("step", [0, pytest.param(4, marks=pytest.mark.faults)])
@pytest.mark.parametrize("verb", ["settle", "watch"])
def test_a_worker_that_can_open_nothing_from_any_moment_on_answers_and_blames_no_file(
    tmp_path: Path, verb: str, step: int
) -> None:
    """F15. A library that can't be opened is an ImportError and no OSError: a thread ended of it, and its request was
    answered by nobody before the worker was taken for hung. A parser that could not start made its file a broken one.
    """
    path = tmp_path / "model.safetensors"
    path.write_bytes(SMALL)
    settle = Settle(root=str(tmp_path), path=str(path), quiet_s=0.0, told=True)
    request = settle if verb == "settle" else Watch(root=str(tmp_path))
    calls = opens(request)
    firsts = set(range(1, len(calls), step)) if step else {1, 2, 3, *libraries(calls)}
    assert len(firsts) > 5
    for nth in sorted(firsts):
        with fresh_worker() as worker:
            with Injection(worker.process.pid, f"openat:error=EMFILE:when={nth}+") as injected:
                well, code = first_words(worker, worker.send(request))
            assert (well, code) in {(True, ""), (False, "busy")}, (nth, code)
            assert injected.shots or well, nth
            assert first_words(worker, worker.send(request)) == (True, ""), nth


def test_the_daemons_own_memory_is_known_with_no_descriptor_left() -> None:
    """The alerts look at it every few seconds; an error there would end the daemon."""
    rss_bytes()
    with limited(os.getpid(), -len(os.listdir("/proc/self/fd")) + 1):
        assert rss_bytes() > 0


def test_a_living_trainer_keeps_its_arena_when_its_daemon_can_not_look_at_it() -> None:
    """Who lacks a descriptor to read /proc with knows nothing of another process, so it takes nothing from it."""
    page = bytearray(control.PAGE)
    ticks = control.write_lease(page, bytes(16), 1, os.getpid())
    with limited(os.getpid(), -len(os.listdir("/proc/self/fd")) + 1):
        blind = control.started_ticks(os.getpid())
        assert control.is_alive(os.getpid(), ticks)
        unknown = control.write_lease(bytearray(control.PAGE), bytes(16), 1, os.getpid())
        assert not control.is_alive(os.getpid(), 0), "what was seen to be gone stays so"
    assert blind == unknown == control.UNKNOWN
    assert control.is_alive(os.getpid(), ticks)
    assert control.is_alive(os.getpid(), unknown), "any process with that number may be it"
    assert not control.is_alive(0, unknown)
