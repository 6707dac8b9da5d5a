"""Catalogs for tests: real SQLite files, a clock that moves only when told to, rows in one line."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ckptd import config
from ckptd.catalog import Catalog, checkpoints, experiments, open_catalog
from ckptd.catalog.checkpoints import Durable, NewCheckpoint
from ckptd.catalog.experiments import NewExperiment
from ckptd.catalog.tx import Tx
from ckptd.events import Bus, Event
from ckptd.model import Checkpoint, FileEntry, Identity, Level, Origin, new_id

SETTINGS = config.Catalog(ballast_bytes=0)
UID = 1000


class StillClock:
    """Time that stands still until a test moves it; wall and monotonic time move apart at will."""

    def __init__(self) -> None:
        self.wall = datetime(2030, 1, 1, tzinfo=UTC)
        self.mono_s = 1000.0

    def now(self) -> datetime:
        return self.wall

    def monotonic_s(self) -> float:
        return self.mono_s

    def pass_s(self, seconds: float) -> None:
        """Let both clocks go on."""
        self.wall += timedelta(seconds=seconds)
        self.mono_s += seconds

    def step_wall_s(self, seconds: float) -> None:
        """Set the wall clock, as ntpd or a person does."""
        self.wall += timedelta(seconds=seconds)


@dataclass
class Told:
    """What was published, through a real bus, so that an undeclared event fails the test."""

    events: list[Event] = field(default_factory=list)
    bus: Bus = field(default_factory=Bus)

    def publish(self, event: Event) -> None:
        self.bus.publish(event)
        self.events.append(event)

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events]


@asynccontextmanager
async def opened(
    path: Path, told: Told | None = None, clock: Any = None, settings: config.Catalog = SETTINGS
) -> AsyncIterator[Catalog]:
    told = told or Told()
    async with open_catalog(path, settings, clock or StillClock(), told.publish) as catalog:
        yield catalog


def an_experiment(name: str = "run", project: str = "demo", **more: Any) -> NewExperiment:
    values: dict[str, Any] = {"id": new_id(), "uid": UID, "root": "/data/runs", **more}
    return NewExperiment(project=project, name=name, **values)


async def experiment(catalog: Catalog, name: str = "run", **more: Any) -> str:
    """Open an experiment; return its id."""
    opened_one = await catalog.write(lambda tx: experiments.open_experiment(tx, an_experiment(name, **more)))
    return opened_one.experiment.id


def a_checkpoint(experiment_id: str, step: int | None = None, **more: Any) -> NewCheckpoint:
    values: dict[str, Any] = {"id": new_id(), "origin": Origin.MEMORY, "root_id": None, **more}
    return NewCheckpoint(experiment_id=experiment_id, step=step, **values)


def an_identity(ino: int = 7, **more: int) -> Identity:
    return Identity(**{"dev": 1, "ino": ino, "size_bytes": 4096, "mtime_ns": 5, "ctime_ns": 6, **more})


def durable(path: str = "/data/runs/demo/run/step", *, ino: int = 7) -> Durable:
    entry = FileEntry("model.safetensors", 3 << 20, "ab" * 32, ("0123456789abcdef", "f" * 16, "0" * 16))
    return Durable(path=path, files=(entry,), identity=an_identity(ino), size_bytes=3 << 20)


async def climb(tx: Tx, new: NewCheckpoint, level: Level = Level.VERIFIED) -> Checkpoint:
    """Stage a checkpoint and take it up to `level`."""
    staged = await checkpoints.stage(tx, new)
    if level.rank >= Level.DURABLE.rank:
        await checkpoints.mark_durable(tx, new.id, durable(f"/data/{new.id}", ino=staged.checkpoint.sequence))
    if level.rank >= Level.VERIFIED.rank:
        await checkpoints.mark_verified(tx, new.id)
    return await checkpoints.get(tx.conn, new.id)


async def saved(catalog: Catalog, experiment_id: str, step: int | None, **more: Any) -> Checkpoint:
    """Commit one verified checkpoint."""
    return await catalog.write(lambda tx: climb(tx, a_checkpoint(experiment_id, step, **more)))
