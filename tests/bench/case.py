"""One peer, one state, one process: every phase writes its measurements as JSON lines.

    python -m tests.bench.case '{"peer": ..., "size_bytes": ..., ...}'    (see Case)

The parent kills this process when it takes too long; what was written until then counts.
"""

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench import meter
from tests.bench.limits import Limits
from tests.bench.peers import BY_NAME, Peer, make
from tests.bench.state import State, advance, build, compare, tensors
from tests.bench.training import Training

SETTLE_S = 0.3  # lets threads of the phase before go to sleep


@dataclass(frozen=True)
class Case:
    """What one process measures. `loop_s`: length of the undisturbed training loop."""

    peer: str
    size_bytes: int
    shape: str
    folder: str
    out: str
    round: int
    warm_saves: int
    loop_s: float


def fsync_tree(path: Path) -> None:
    """Fsync every file under `path`, every directory, and the directory that names it."""
    inside = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
    for entry in [*inside, path, path.parent]:
        opened = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def forget(path: Path) -> None:
    """Drop the page cache of what lies under `path`, so that the next read comes from the disk."""
    for entry in path.rglob("*") if path.is_dir() else [path]:
        if entry.is_file():
            opened = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(opened)
                os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(opened)


def touch(loaded: dict[str, Any]) -> None:
    """Read one element of every page, so that a lazy mapping has to bring its bytes."""
    for _, tensor in tensors(loaded):
        tensor.view(torch.int32)[::1024].sum()


def attempt(act: Callable[[], Any]) -> str:
    """Do it; return what went wrong, or nothing."""
    try:
        act()
    except Exception as error:  # noqa: BLE001 - whatever a foreign library raises is a result here
        return f"{type(error).__name__}: {error}"[:300]
    return ""


class Bench:
    """Runs the phases of one case in order; the state's step counts every change of it."""

    def __init__(self, case: Case) -> None:
        """Build the state and the yardsticks; the peer has a folder of its own."""
        self.case = case
        self.step = 0
        self.state: State = build(case.size_bytes, case.shape)
        self.limits = Limits(self.state, Path(case.folder), one_source=case.shape == "small")
        self.folder = Path(case.folder, "peer")
        self.folder.mkdir()
        self.peer: Peer = make(case.peer, self.folder)

    def write(self, kind: str, **facts: Any) -> None:
        """Append one measurement."""
        row = {"peer": self.case.peer, "size_bytes": self.case.size_bytes, "shape": self.case.shape}
        with Path(self.case.out).open("a") as out:
            out.write(json.dumps({**row, "round": self.case.round, "kind": kind, **facts}) + "\n")

    def cpu_s(self) -> float:
        """CPU time so far of this process, its descendants and the peer's daemons."""
        return meter.cpu_s([os.getpid(), *self.peer.roots()])

    def change(self) -> int:
        """Train, so to say: every element changes. Returns the new step."""
        advance(self.state)
        self.step += 1
        self.peer.bring(self.state)
        return self.step

    def durable(self, step: int) -> None:
        """Block until the save of `step` is on the disk, by our own fsync where the peer does none."""
        self.peer.wait(step)
        if not self.peer.fsyncs:
            fsync_tree(self.peer.path(step))

    def outcome(self, step: int) -> str:
        """Load the save of `step` and compare it with what the state was then."""
        found: list[str] = []
        problem = attempt(
            lambda: found.append(compare(self.peer.load(step, self.state, cold=True), self.state, self.step - step))
        )
        return f"lost: {problem}" if problem else found[0]

    def measure_limits(self) -> dict[str, float]:
        """What the machine can do at this moment."""
        memcpy, sha256, raw_write, raw_read = (
            self.limits.memcpy(),
            self.limits.sha256(),
            self.limits.write(),
            self.limits.read(),
        )
        self.limits.remove()
        cpu_s = memcpy.cpu_s + sha256.cpu_s + raw_write.cpu_s
        return {
            "sha256_s": sha256.wall_s,
            "write_s": raw_write.wall_s,
            "read_s": raw_read.wall_s,
            "limit_cpu_s": cpu_s,
        }

    def copies(self) -> list[float]:
        """Two warm copies of the same bytes: half of the yardstick of a stall."""
        return [self.limits.memcpy().wall_s for _ in range(2)]

    def measure_save(self, index: int) -> None:
        """One save with nothing else going on: stall, time to durable, CPU."""
        limits = self.measure_limits()
        step = self.change()
        time.sleep(SETTLE_S)
        before = self.copies()
        cpu_begun, begun = self.cpu_s(), time.perf_counter()
        self.peer.save(self.state, step)
        stall_s = time.perf_counter() - begun
        self.durable(step)
        durable_s, cpu_s = time.perf_counter() - begun, self.cpu_s() - cpu_begun
        verified: dict[str, float] = {}
        if self.peer.wait_verified(step):
            verified = {"verified_s": time.perf_counter() - begun, "verified_cpu_s": self.cpu_s() - cpu_begun}
        facts = {"stall_s": stall_s, "durable_s": durable_s, "cpu_s": cpu_s, **limits, **verified}
        facts["memcpy_s"] = statistics.median(before + self.copies())
        self.write("save", index=index, outcome=self.outcome(step), **facts)

    def measure_second(self) -> None:
        """Two saves in a row, the tensors changed in between, the first still in flight."""
        memcpy_s = statistics.median(self.copies() + self.copies())
        first = self.change()
        problems = [attempt(lambda: self.peer.save(self.state, first))]
        second = self.change()
        begun = time.perf_counter()
        problems.append(attempt(lambda: self.peer.save(self.state, second)))
        stall_s = time.perf_counter() - begun
        outcomes = []
        for step, refused in zip((first, second), problems, strict=True):
            problem = refused or attempt(partial(self.durable, step))
            outcome = self.outcome(step)
            outcomes.append(f"{problem}; on the disk: {outcome}" if problem else outcome)
        self.write("second", stall_s=stall_s, memcpy_s=memcpy_s, outcomes=outcomes)

    def undisturbed(self, training: Training) -> float:
        """Median seconds of a training step with nothing else going on."""
        training.step()
        took = [training.step() for _ in range(3)]
        while sum(took) < self.case.loop_s / 3:
            took.append(training.step())
        return statistics.median(took)

    def measure_loop(self) -> None:
        """Train with one save at the start; every step changes the whole state."""
        training = Training(self.state)
        before_s = self.undisturbed(training)
        self.step += training.taken
        saved = self.change()
        done, problems, disturbed = threading.Event(), [], []

        def wait() -> None:
            problems.append(attempt(lambda: self.durable(saved)))
            done.set()

        waiter = threading.Thread(target=wait)
        begun = time.perf_counter()
        self.peer.save(self.state, saved)
        stall_s = time.perf_counter() - begun
        waiter.start()
        steps = max(8, round(self.case.loop_s / before_s))
        for _ in range(steps):
            persisting = not done.is_set()
            took_s = training.step()
            if persisting:
                disturbed.append(took_s)
        wall_s = time.perf_counter() - begun
        waiter.join()
        self.step += steps
        outcome = self.outcome(saved)
        training.taken = 0
        step_s = statistics.mean([before_s, self.undisturbed(training)])  # the machine's speed drifts
        self.step += training.taken
        facts = {"step_s": step_s, "steps": steps, "stall_s": stall_s, "wall_s": wall_s, "outcome": outcome}
        self.write("loop", disturbed_s=disturbed, problems=[said for said in problems if said], **facts)

    def measure_load(self) -> None:
        """Load the newest save from the disk, then again warm, beside torch.load of the same state."""
        step = self.change()
        self.peer.save(self.state, step)
        self.durable(step)
        self.peer.wait_verified(step)
        plain = Path(self.case.folder, "plain.pt")
        torch.save(self.state, plain)
        self.limits.write()
        forget(self.peer.path(step))
        read_s, sha256_s = self.limits.read().wall_s, self.limits.sha256().wall_s
        self.limits.remove()
        begun = time.perf_counter()
        cold = self.peer.load(step, self.state, cold=True)
        touch(cold)
        cold_s = time.perf_counter() - begun
        outcome = compare(cold, self.state, 0)
        del cold
        begun = time.perf_counter()
        hot = self.peer.load(step, self.state, cold=False)
        hot_s = time.perf_counter() - begun
        hot_outcome = compare(hot, self.state, 0)
        del hot
        begun = time.perf_counter()
        torch.load(plain, weights_only=True)
        torch_load_s = time.perf_counter() - begun
        plain.unlink()
        facts = {"cold_s": cold_s, "hot_s": hot_s, "torch_load_s": torch_load_s, "read_s": read_s}
        self.write("load", sha256_s=sha256_s, outcomes=[outcome, hot_outcome], **facts)

    def run(self) -> None:
        """All phases; memory is watched over the saves."""
        peak = meter.Peak()
        begun = time.perf_counter()
        self.peer.prepare(self.state)
        self.write("prepare", prepare_s=time.perf_counter() - begun)
        self.measure_save(0)
        if not BY_NAME[self.case.peer].only_first:
            for index in range(1, self.case.warm_saves + 1):
                self.measure_save(index)
            self.write("memory", peak_bytes=peak.stop())
            self.measure_loop()
            self.measure_load()
            self.measure_second()  # last: it breaks the helper process of some peers for good
        self.peer.close()


def main() -> None:
    """Run the case given as JSON in the first argument."""
    Bench(Case(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
