"""Who keeps a node busy: trainers that save, die and resume, each driven by a thread; and writers of legacy files."""

import contextlib
import json
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.soak.ledger import Entry, Ledger
from tests.support.node import Node
from tests.support.trainer import Nursery, Trainer, TrainerDied

PROJECT, LEGACY = "soak", "legacy"
OPEN_AGAIN_S = 0.2
ARRIVE_S = 90.0
OUTSTANDING_MAX = 64
NOBODY_ANSWERS = ("Unavailable", "TimedOut")  # what a load says while the daemon is away


@dataclass(frozen=True)
class Part:
    """What one trainer does."""

    name: str
    directory: Path
    size_bytes: int
    period_s: float
    plain: bool = False  # no torch, no numpy: text alone
    restore_s: float = 30.0  # how often it loads a checkpoint back and compares


class Member:
    """A thread that can be told to rest between two acts."""

    def __init__(self, name: str, period_s: float) -> None:
        self.name, self.period_s = name, period_s
        self.pace = 1.0  # 0.1: ten times as often
        self._resting, self._go, self._over = threading.Event(), threading.Event(), threading.Event()
        self._go.set()
        self.thread = threading.Thread(target=self._live, name=name, daemon=True)
        self.broke: BaseException | None = None

    def act(self) -> None:
        """Do one thing."""
        raise NotImplementedError

    def settle(self) -> None:
        """Before a rest: have everything said arrive."""

    def leave(self) -> None:
        """At the end."""

    def _live(self) -> None:
        try:
            while not self._over.wait(self.period_s * self.pace):
                if not self._go.is_set():
                    self.settle()
                    self._resting.set()
                    self._go.wait()
                    self._resting.clear()
                    continue
                self.act()
            self.leave()
        except BaseException as error:  # noqa: BLE001 - shown by whoever waits for this member
            self.broke = error
            self._resting.set()

    def rest(self) -> None:
        """Ask for a rest; `resting` says when it has begun."""
        self._go.clear()

    def resting(self, patience_s: float) -> bool:
        """Wait for the rest."""
        return self._resting.wait(patience_s)

    def go_on(self) -> None:
        """End the rest."""
        if self.broke is None:
            self._resting.clear()
        self._go.set()

    def end(self) -> None:
        """End the thread."""
        self._over.set()
        self._go.set()
        self.thread.join(ARRIVE_S)


class Training(Member):
    """One experiment, whose trainer may be killed at any moment and is then started again."""

    def __init__(self, part: Part, node: Node, nursery: Nursery, ledger: Ledger) -> None:
        super().__init__(part.name, part.period_s)
        self.part = part
        self._node, self._nursery, self._ledger = node, nursery, ledger
        self._dice = random.Random(part.name)
        self._trainer: Trainer | None = None
        self._lock = threading.Lock()
        self._step = 0
        self._open: list[Entry] = []  # not verified yet, as far as this trainer was told
        self._restored_s = time.monotonic()

    def kill(self) -> bool:
        """SIGKILL the trainer, whatever it does; False when there is none at the moment."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._trainer is not None:
                os.kill(self._trainer.pid, signal.SIGKILL)
                return True
        return False

    def act(self) -> None:
        """Save once, and hear what became of earlier saves."""
        with contextlib.suppress(TrainerDied):
            trainer = self._trainer or self._begin()
            self._step += 1
            entry = self._ledger.intend(self.name, self._step, self.part.size_bytes)
            self._open.append(entry)
            given = {"seed": entry.seed, "step": entry.step, "size_bytes": entry.size_bytes}
            loss = self._dice.random()
            self._ledger.told(entry, trainer.save(**given, scribble=not self.part.plain, metrics={"val_loss": loss}))
            self._hear(trainer)
            if time.monotonic() - self._restored_s > self.part.restore_s:
                self._restored_s = time.monotonic()
                self._restore(trainer)
            return
        self._bury()

    def _begin(self) -> Trainer:
        trainer = self._nursery.trainer(self._node.environ)
        with self._lock:
            self._trainer = trainer
        trainer.open(name=self.name, project=PROJECT, dir=str(self.part.directory))
        return trainer

    def _hear(self, trainer: Trainer) -> None:
        still = []
        for entry in self._open[-OUTSTANDING_MAX:]:
            self._ledger.told(entry, trainer.handle(id=entry.id))
            if entry.level != "verified" and not entry.refused:
                still.append(entry)
        self._open = still

    def _bury(self) -> None:
        """The trainer died: what it had not been told it will never be told."""
        with self._lock:
            if self._trainer is not None:
                self._trainer.end()
            self._trainer = None
        for entry in self._open:
            entry.lost_sight = True
        self._open = []

    def _restore(self, trainer: Trainer) -> None:
        """Load one of the checkpoints that are there, the newest or any other, and compare it bit by bit."""
        live = [r for r in self._node.rows(PROJECT, self.name) if (r["state"], r["level"]) == ("live", "verified")]
        known = [entry for row in live if (entry := self._ledger.at(self.name, row["step"])) is not None]
        if not known:
            return
        entry = self._dice.choice([known[-1], self._dice.choice(known)])
        try:
            found = trainer.load(selector=entry.step, seed=entry.seed, size_bytes=entry.size_bytes)
        except AssertionError as error:
            retired = "NotFound" in str(error) and not self._is_live(entry)
            if not retired and not any(word in str(error) for word in NOBODY_ANSWERS):
                self._ledger.complain(f"{self.name} step {entry.step} can't be loaded: {error}")
            return
        if not found["found"] or not found["same"]:
            self._ledger.complain(f"{self.name} step {entry.step} came back as another state: {found}")
        self._ledger.restored()

    def _is_live(self, entry: Entry) -> bool:
        rows = self._node.rows(PROJECT, self.name)
        return any(row["step"] == entry.step and row["state"] == "live" for row in rows)

    def settle(self) -> None:
        """Every save that is still on its way arrives, as long as its trainer lives."""
        try:
            for entry in self._open if self._trainer is not None else []:
                told = self._trainer.wait(id=entry.id, level="verified", timeout=ARRIVE_S)
                self._ledger.told(entry, told)
                if entry.level != "verified" and not entry.refused:
                    self._ledger.complain(f"{self.name} step {entry.step} did not arrive in {ARRIVE_S:g} s: {told}")
            self._open = []
            # A short run on a busy machine may have had no time for it.
            if self._trainer is not None and self._ledger.restores == 0:
                self._restore(self._trainer)
        except TrainerDied:
            self._bury()

    def quit(self) -> None:
        """Let the trainer end as scripts do. Called while this member rests; the next act starts another one."""
        with contextlib.suppress(TrainerDied):
            if self._trainer is not None:
                self._trainer.close()
                self._trainer.quit()
        self._bury()

    def leave(self) -> None:
        """End the trainer."""
        self._bury()


class Legacy(Member):
    """Writes checkpoints as old scripts do: in pieces, by rename, over an older one."""

    def __init__(self, root: Path, ledger: Ledger, period_s: float, dice: random.Random) -> None:
        super().__init__("legacy", period_s)
        self._root, self._ledger, self._dice = root, ledger, dice
        self._number = 0

    def act(self) -> None:
        """Write one file."""
        self._number += 1
        directory = self._root / f"run-{self._number // 20}"
        directory.mkdir(parents=True, exist_ok=True)
        ways: tuple[Callable[[Path, bytes], None], ...] = (self._in_pieces, self._by_rename, self._over_an_older)
        path = directory / f"model_{self._number}.safetensors"
        self._dice.choice(ways)(path, self._body())

    def _body(self) -> bytes:
        size_bytes = self._dice.randrange(1 << 10, 256 << 10)
        header = json.dumps({"w": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}).encode()
        return struct.pack("<Q", len(header)) + header + self._dice.randbytes(size_bytes)

    def _in_pieces(self, path: Path, body: bytes) -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(body), 64 << 10):
                file.write(body[start : start + (64 << 10)])
        self._ledger.wrote(str(path))

    def _by_rename(self, path: Path, body: bytes) -> None:
        other = path.with_name(f".{path.name}.part")
        other.write_bytes(body)
        os.rename(other, path)
        self._ledger.wrote(str(path))

    def _over_an_older(self, path: Path, body: bytes) -> None:
        path = path.with_name("last.safetensors")
        other = path.with_name(".last.part")
        other.write_bytes(body)
        os.rename(other, path)
        self._ledger.wrote(str(path))
