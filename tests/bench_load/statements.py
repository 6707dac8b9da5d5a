"""What one statement costs, with the libraries' own cursor and with ours: docs/decisions/0011-one-visit-per-statement.md."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
from sqlalchemy import Column, Integer, MetaData, Table, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ckptd import config
from ckptd.catalog import sqlite
from tests.bench_load.outcome import Outcome, percentile, told
from tests.bench_load.scale import Scale

THING = Table("thing", MetaData(), Column("no", Integer, primary_key=True))
TURNS = 20


def measure(scale: Scale) -> Iterator[Outcome]:
    """Return the rows of this file."""
    with tempfile.TemporaryDirectory(prefix="bl", dir=scale.folder) as directory:
        theirs, ours = anyio.run(_in_turns, Path(directory) / "db", scale.looks * 5)
    ratio = percentile(ours, 0.5) / percentile(theirs, 0.5)
    figures = f"{percentile(theirs, 0.5) * 1e6:.0f} → {percentile(ours, 0.5) * 1e6:.0f} µs, ratio {ratio:.2f}"
    yield told("one statement, SQLAlchemy's cursor → ckptd's", figures, len(ours), "in turns, of no rows")


async def _in_turns(path: Path, times: int) -> tuple[list[float], list[float]]:
    url = sqlite.url_of(path)
    writer = sqlite.writing_engine(url, config.Catalog())
    async with writer.begin() as conn:
        await conn.run_sync(THING.metadata.create_all)
    await writer.dispose()
    engines = create_async_engine(url), sqlite.reading_engine(url, config.Catalog())
    took: tuple[list[float], list[float]] = [], []
    for turn in range(TURNS + 1):
        for engine, seconds in zip(engines, took, strict=True):
            found = await _reads(engine, times // TURNS)
            if turn:  # the first one connects and compiles
                seconds.extend(found)
    for engine in engines:
        await engine.dispose()
    return took


async def _reads(engine: AsyncEngine, times: int) -> list[float]:
    wanted = select(THING)
    took: list[float] = []
    async with engine.connect() as conn:
        await conn.execute(wanted)
        for _ in range(times):
            begun_s = time.perf_counter()
            await conn.execute(wanted)
            took.append(time.perf_counter() - begun_s)
    return took
