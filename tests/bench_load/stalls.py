"""Real trainers beside the load: how long `save()` kept each of them from training."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench_load.plant import Plant
from tests.support.trainer import Nursery, Trainer

PERIOD_S = 1.0
STATE_BYTES = 16 << 20
PROJECT = "stalls"


class Stalls:
    """Processes that train and save, each an experiment of its own, in a project of their own."""

    def __init__(self, trainers: list[Trainer]) -> None:
        self._trainers = trainers
        self._took_s: list[float] = []
        self._spooled = 0
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._steps = [0] * len(trainers)

    def begin(self) -> None:
        """Have everybody save once in PERIOD_S, spread over it."""
        self._over.clear()
        self._threads = [threading.Thread(target=self._train, args=(number,)) for number in range(len(self._trainers))]
        for thread in self._threads:
            thread.start()

    def end(self) -> tuple[list[float], int]:
        """Stop; return the seconds of every save since `begin`, and how many of them went into the spool."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        found = self._took_s, self._spooled
        self._took_s, self._spooled = [], 0
        return found

    def _train(self, number: int) -> None:
        due_s = time.monotonic() + PERIOD_S * number / len(self._trainers)
        while not self._over.wait(max(0.0, due_s - time.monotonic())):
            due_s = max(due_s + PERIOD_S, time.monotonic())
            self._steps[number] += 1
            step = self._steps[number]
            told = self._trainers[number].save(seed=step, step=step, size_bytes=STATE_BYTES)
            self._took_s.append(told["took_s"])
            self._spooled += told["spooled"]


@contextmanager
def stalls(plant: Plant, count: int) -> Iterator[Stalls]:
    """Start `count` trainers with an arena each; they end with the block."""
    with Nursery(plant.dir) as nursery:
        trainers = [nursery.trainer(plant.environ) for _ in range(count)]
        for number, trainer in enumerate(trainers):
            trainer.open(name=f"stall-{number}", project=PROJECT, dir=str(plant.runs))
            trainer.prepare(size_bytes=STATE_BYTES)
        yield Stalls(trainers)
        for trainer in trainers:
            trainer.quit()
