"""Many trainers on one thread, as the daemon sees them: sockets that speak the protocol, each at its own pace.

A trainer leases an arena and either gives it back unused (the round trip alone) or commits a save in it,
as the client's library does: file, descriptor, control page, then the message.
"""

import json
import mmap
import os
import random
import selectors
import socket
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ckptd.model import new_id
from ckptd_client import control, wire

ANSWER_S = 60.0
RECEIVE_BYTES = 1 << 16
PAYLOAD = b"\x08\0\0\0\0\0\0\0{}      "  # a whole safetensors file that holds no tensor
ARENA_BYTES = 16 << 10


@dataclass(frozen=True)
class Pace:
    """How often each trainer begins a round, for how long, and whether a round saves."""

    period_s: float  # 0: the next round begins when the last one ended
    duration_s: float
    saves: bool = False
    seed: int = 0


class Talker:
    """One trainer."""

    def __init__(self, place: Path, directory: Path, number: int) -> None:
        self.number = number
        self.directory = directory
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_S)
        self.sock.connect(str(place))
        self.buffer = b""
        self.fds: list[int] = []
        self.next_id = 0
        self.step = 0
        self.experiment = new_id()
        self.sent_s = 0.0
        self.asked = ""
        self.due_s = 0.0
        self.lease: dict[str, Any] = {}
        self.ask("hello", client="load", pid=os.getpid(), versions=[1])

    def open(self) -> None:
        """Open an experiment of its own."""
        name = f"load-{self.number}"
        told = self.ask(
            "experiment.open", experiment=self.experiment, name=name, project="load", dir=str(self.directory)
        )
        self.experiment = told["experiment"]

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask and wait for the answer."""
        self.send(op, **fields)
        while True:
            for found in self.receive():
                assert found["ok"], found
                return found

    def send(self, op: str, **fields: Any) -> None:
        """Ask; the answer comes by `receive`."""
        self.next_id += 1
        self.asked, self.sent_s = op, time.perf_counter()
        self.sock.sendall(wire.encode({"v": 1, "id": self.next_id, "op": op, **fields}))

    def receive(self) -> list[dict[str, Any]]:
        """Return the answers that have arrived; what nobody asked for is dropped."""
        data, fds, _, _ = socket.recv_fds(self.sock, RECEIVE_BYTES, 4)
        assert data, "the daemon closed the connection"
        self.fds += fds
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [found for found in map(wire.decode, lines) if found.get("id") is not None]

    def begin(self) -> None:
        """Ask for an arena."""
        self.send("lease", experiment=self.experiment, size_bytes=ARENA_BYTES, wait_s=30)

    def go_on(self, found: dict[str, Any], *, saves: bool) -> bool:
        """Take the answer to what was asked; return whether the round is over."""
        assert found["ok"], found
        if self.asked != "lease":
            return True
        self.lease = found
        fd = self.fds.pop()
        if saves:
            checkpoint = self._fill(fd)
            lent = {"arena": found["arena"], "generation": found["generation"]}
            self.send("commit", experiment=self.experiment, checkpoint=checkpoint, **lent)
        else:
            self.send("abandon", arena=found["arena"], generation=found["generation"])
        os.close(fd)
        return False

    def _fill(self, fd: int) -> str:
        """Put a small whole save into the arena and commit it there."""
        self.step += 1
        checkpoint = new_id()
        about = {"id": self.experiment, "project": "load", "name": f"load-{self.number}", "dir": str(self.directory)}
        body = {
            "checkpoint": checkpoint,
            "experiment": about,
            "step": self.step,
            "files": [{"path": "model.safetensors", "offset": control.PAGE, "size_bytes": len(PAYLOAD)}],
        }
        raw = json.dumps(body).encode()
        with mmap.mmap(fd, 0) as page:
            control.set_state(page, control.WRITING)
            page[control.PAGE : control.PAGE + len(PAYLOAD)] = PAYLOAD
            page[2 * control.PAGE : 2 * control.PAGE + len(raw)] = raw
            control.commit(page, 2 * control.PAGE, raw)
        return checkpoint

    def close(self) -> None:
        """End the connection."""
        for fd in self.fds:
            os.close(fd)
        self.sock.close()


@dataclass
class Swarm:
    """with Swarm(plant.socket, plant.runs, 64) as swarm: swarm.run(Pace(...)) -> seconds by operation."""

    place: Path
    directory: Path
    count: int
    idle: int = 0  # more connections, that only said hello
    talkers: list[Talker] = field(default_factory=list)
    sleepers: list[Talker] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.sleepers = [Talker(self.place, self.directory, -1 - number) for number in range(self.idle)]
        for number in range(self.count):
            talker = Talker(self.place, self.directory, number)
            talker.open()
            self.talkers.append(talker)
        return self

    def __exit__(self, *_: object) -> None:
        for talker in [*self.talkers, *self.sleepers]:
            talker.close()

    def run(self, pace: Pace) -> dict[str, list[float]]:
        """Let every trainer go through its rounds; return how long each kind of answer took, in seconds."""
        took: dict[str, list[float]] = defaultdict(list)
        dice = random.Random(pace.seed)
        now_s = time.perf_counter()
        end_s = now_s + pace.duration_s
        with selectors.DefaultSelector() as ready:
            for talker in self.talkers:
                talker.due_s, talker.asked = now_s + dice.random() * pace.period_s, ""
                ready.register(talker.sock, selectors.EVENT_READ, talker)
            while (now_s := time.perf_counter()) < end_s or any(t.asked for t in self.talkers):
                assert now_s < end_s + ANSWER_S, "trainers wait for answers that don't come"
                soon_s = self._begin_due(now_s, end_s, pace)
                for key, _ in ready.select(soon_s):
                    self._answer(key.data, took, pace)
        return took

    def _begin_due(self, now_s: float, end_s: float, pace: Pace) -> float:
        """Begin the rounds that are due; return the seconds until the next one is."""
        soon_s = 0.05
        for talker in self.talkers:
            if talker.asked or now_s >= end_s:
                continue
            if talker.due_s <= now_s:
                talker.due_s = max(talker.due_s + pace.period_s, now_s)
                talker.begin()
            soon_s = min(soon_s, max(0.0, talker.due_s - now_s))
        return soon_s

    def _answer(self, talker: Talker, took: dict[str, list[float]], pace: Pace) -> None:
        for found in talker.receive():
            took[talker.asked].append(time.perf_counter() - talker.sent_s)
            if talker.go_on(found, saves=pace.saves):
                talker.asked = ""
