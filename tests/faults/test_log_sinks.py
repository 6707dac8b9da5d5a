"""A log that nobody reads, and a daemon that stands still: training and the event loop notice nothing, or the watchdog does."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.log import Sink
from ckptd_client import wire
from tests.support.node import Node, eventually, is_alive
from tests.support.trainer import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
LAG_S = 0.1  # the matrix's bound on the loop
BUSY_S = 0.2  # what this machine's other work may add to an answer
STORM = 4_600  # lines of the log, one for each answer: more than wait in its queue


class PipedNode(Node):
    """A node whose output goes into a pipe that nobody reads."""

    reader: int = -1

    def start(self, *flags: str, ready: bool = True) -> "PipedNode":
        """As Node.start, with the pipe, already full, in the log's place."""
        self.configure()
        self.plan.touch()
        self.log.touch()
        self.reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while os.write(writer, b"." * 4096):
                pass
        except BlockingIOError:
            os.set_blocking(writer, True)
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "XDG_"))}
        self.supervisor = subprocess.Popen(
            self.command(*flags),
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env={**clean, "NODE_TIMING": json.dumps(self.timing)},
        )
        os.close(writer)
        if ready:
            self.status()
        return self

    def drained(self) -> bytes:
        """Read all that is in the pipe now."""
        os.set_blocking(self.reader, False)
        found = b""
        try:
            while chunk := os.read(self.reader, 1 << 20):
                found += chunk
        except BlockingIOError:
            return found
        return found


@pytest.fixture
def piped(short_dir: Path) -> Iterator[PipedNode]:
    made = PipedNode(short_dir)
    yield made
    made.clean_up()
    if made.reader >= 0:
        os.close(made.reader)


@pytest.mark.faults
def test_a_log_that_nobody_reads_holds_up_neither_saves_nor_answers(piped: PipedNode, plain_nursery: Nursery) -> None:
    """F29. The pipe is full from the first line on; the supervisor and the workers write into it as well."""
    node = piped.start()
    save(node, plain_nursery, 1)
    report(ask_again_and_again(node, "status", 300))
    assert node.stop() == 0


@pytest.mark.faults
def test_lines_that_nobody_reads_are_dropped_and_counted(piped: PipedNode, plain_nursery: Nursery) -> None:
    """F29, long. More lines than the queue holds; when somebody reads again, the first thing said is how many are gone."""
    node = piped.start()
    save(node, plain_nursery, 1)
    report(ask_again_and_again(node, "rebuild", STORM))
    save(node, plain_nursery, 2)
    assert_counted(node)
    assert node.stop() == 0


def save(node: Node, nursery: Nursery, step: int) -> None:
    trainer = nursery.trainer(node.environ)
    trainer.open(name="run", project="log", dir=str(node.runs))
    node.wait_level(trainer.save(seed=step, step=step)["id"])


def report(took: list[float]) -> None:
    """Print how long the answers took, and hold them to the bound."""
    took.sort()
    p99_s = took[len(took) * 99 // 100]
    print(f"{len(took)} answers under a blocked log: p99 {p99_s * 1e3:.1f} ms, longest {took[-1] * 1e3:.1f} ms")
    assert took[len(took) // 2] < LAG_S
    assert p99_s < LAG_S + BUSY_S


def ask_again_and_again(node: Node, op: str, count: int) -> list[float]:
    """Ask `count` times on one connection; return how long each answer took."""
    took = []
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(20)
        peer.connect(str(node.socket))
        with peer.makefile("rb") as lines:
            hello = {"v": 1, "id": 0, "op": "hello", "client": "test", "pid": os.getpid(), "versions": [1]}
            peer.sendall(wire.encode(hello))
            lines.readline()
            for number in range(1, count + 1):
                begun_s = time.monotonic()
                peer.sendall(wire.encode({"v": 1, "id": number, "op": op}))
                assert wire.decode(lines.readline())["ok"]
                took.append(time.monotonic() - begun_s)
    return took


def assert_counted(node: PipedNode) -> None:
    """Once somebody reads, the lines that are gone are named by their number."""

    def told() -> list[dict[str, Any]]:
        said.extend(node.drained().replace(b"." * 4096, b"").splitlines())
        return [json.loads(line) for line in said if b"log.dropped" in line]

    said: list[bytes] = []
    assert eventually(told, "the losses to be told")[0]["count"] > 0


@pytest.mark.faults
def test_a_daemon_that_stands_still_is_replaced_and_loses_nothing(node: Node, plain_nursery: Nursery) -> None:
    """F30. The watchdog hears nothing, the supervisor ends it, and the next daemon has the same arenas."""
    node.timing = {**node.timing, "watchdog_s": 2.0, "abort_s": 0.5}
    node.start()
    trainer = plain_nursery.trainer(node.environ)
    trainer.open(name="run", project="log", dir=str(node.runs))
    node.wait_level(trainer.save(seed=1, step=1)["id"])
    pid = node.daemon_pid
    os.kill(pid, signal.SIGSTOP)
    held = trainer.save(seed=2, step=2)
    assert held["error"] is None
    eventually(lambda: not is_alive(pid), "the watchdog to bite")
    node.wait_level(held["id"])
    (said,) = node.said("supervisor.daemon_hangs")
    assert said["why"] == "watchdog: silent"
    assert node.daemon_pid != pid


def test_a_log_on_a_full_disk_costs_its_lines_and_nothing_else() -> None:
    """F6, F29. Each write fails at once; the lines are counted, and the one who logs never hears of it."""
    fd = os.open("/dev/full", os.O_WRONLY)
    sink = Sink(fd)
    try:
        took_s = []
        for _ in range(5):  # the machine may stand still in one of them
            begun_s = time.monotonic()
            for number in range(200):
                sink.put(f"line {number}")
            took_s.append(time.monotonic() - begun_s)
        assert min(took_s) < 10 * LAG_S
        eventually(lambda: sink.dropped == 1000, "all lines to be counted")
    finally:
        sink.close()
        os.close(fd)
