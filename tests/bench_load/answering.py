"""What remembered answers are worth: `python -m tests.bench_load.answering [CHECKPOINTS]`, read each time beside remembered."""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio

from ckptd.catalog import open_catalog
from ckptd.clock import SystemClock
from ckptd.config import Catalog, Settings
from ckptd.intake import requests as ask
from ckptd.intake.control import Control
from ckptd.intake.recall import Recall
from tests.bench_load.filler import fill

ROUNDS, SUMMARIES = 60, 5
PEER: Any = SimpleNamespace(uid=os.getuid(), pid=os.getpid())
QUESTIONS: dict[str, ask.Request] = {
    "ls, 50 rows": ask.List(id=1),
    "experiments, 50 rows": ask.Experiments(id=1),
    "ls --summary": ask.Summary(id=1),
}


async def measure(path: Path) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of each question, read and remembered, and bytes kept."""
    clock, found = SystemClock(), {}
    async with open_catalog(path, Catalog(ballast_bytes=0), clock, lambda _event: None) as catalog:
        pool = SimpleNamespace(of_checkpoint=lambda _one: None)
        front: Any = SimpleNamespace(catalog=catalog, clock=clock, pool=pool, settings=Settings, followers=None)
        remembering, reading = Control(front), Control(front)
        reading.recall = Recall(catalog, clock, Catalog(answers_bytes_max=0))
        for name, question in QUESTIONS.items():
            rounds = SUMMARIES if isinstance(question, ask.Summary) else ROUNDS
            took: dict[str, list[float]] = {"read_ms": [], "remembered_ms": []}
            await remembering.handlers[type(question)](PEER, question)
            for _ in range(rounds):
                for control, times in ((reading, took["read_ms"]), (remembering, took["remembered_ms"])):
                    begun = time.perf_counter()
                    await control.handlers[type(question)](PEER, question)
                    times.append((time.perf_counter() - begun) * 1000)
            found[name] = {what: round(statistics.median(times), 3) for what, times in took.items()}
        found["kept"] = {"bytes": remembering.recall.answers.bytes_used}
    return found


def main() -> None:
    """Fill a catalog, measure, print one JSON object."""
    checkpoints = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory(prefix="ckptd-answers-") as folder:
        path = Path(folder) / "catalog.sqlite"
        fill(path, checkpoints, 1, os.getuid())
        sys.stdout.write(json.dumps({"checkpoints": checkpoints, **anyio.run(measure, path)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
