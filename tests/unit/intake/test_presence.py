"""Who trains, who is gone, and what became of the points that were on their way (M119)."""

import os
import subprocess
import sys
from datetime import UTC, datetime

import anyio
import pytest

from ckptd.catalog import experiments, metrics
from ckptd.catalog.metrics import Point
from ckptd.errors import NoSpace
from ckptd.intake import presence
from ckptd.intake.arena import Use
from ckptd.intake.presence import MetricsBuffer, Presence
from ckptd.model import ExperimentStatus, new_id
from tests.support import catalog as store
from tests.support.in_process import Training, daemon, eventually

AT = datetime(2030, 1, 1, tzinfo=UTC)


class Trainer:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.experiments: set[str] = set()


async def status_of(catalog, experiment_id: str) -> ExperimentStatus:
    return (await catalog.read(lambda conn: experiments.get(conn, experiment_id))).status


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(presence, "LOOK_S", 0.02)


async def test_an_experiment_whose_trainer_died_is_lost_and_one_that_only_reconnects_is_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    async with store.opened(tmp_path / "c") as catalog:
        dying, living = await store.experiment(catalog, "dying"), await store.experiment(catalog, "living")
        here = Presence(catalog, store.StillClock(), 60)
        async with anyio.create_task_group() as group:
            group.start_soon(here.run)
            gone, back = Trainer(process.pid), Trainer(os.getpid())
            here.came(gone, dying)
            here.came(back, living)
            for trainer in (gone, back):
                here.left(trainer)
            await anyio.sleep(0.1)
            assert await status_of(catalog, dying) is ExperimentStatus.RUNNING
            process.communicate()

            async def lost() -> bool:
                return await status_of(catalog, dying) is ExperimentStatus.LOST

            await eventually(lost)
            assert await status_of(catalog, living) is ExperimentStatus.RUNNING
            group.cancel_scope.cancel()


async def test_one_rank_that_leaves_does_not_end_the_experiment(tmp_path):
    async with store.opened(tmp_path / "c") as catalog:
        one = await store.experiment(catalog)
        here = Presence(catalog, store.StillClock(), 60)
        first, second = Trainer(1), Trainer(os.getpid())
        for trainer in (first, second):
            here.came(trainer, one)
        here.left(first)
        assert here.is_present(one)
        here.left(second)
        assert not here.is_present(one)


async def test_a_silent_experiment_without_a_connection_is_lost_after_its_time(tmp_path):
    clock = store.StillClock()
    async with store.opened(tmp_path / "c", clock=clock) as catalog:
        silent, connected = await store.experiment(catalog, "silent"), await store.experiment(catalog, "connected")
        here = Presence(catalog, clock, 60)
        here.came(Trainer(os.getpid()), connected)
        clock.pass_s(61)
        await here._look_for_silent()
        assert await status_of(catalog, silent) is ExperimentStatus.LOST
        assert await status_of(catalog, connected) is ExperimentStatus.RUNNING


async def test_a_catalog_that_does_not_answer_ends_no_task_and_is_asked_again(tmp_path, monkeypatch):
    async with store.opened(tmp_path / "c") as catalog:
        one = await store.experiment(catalog)
        here = Presence(catalog, store.StillClock(), 60)
        here._gone[one] = (4194303, 1)
        write, failures = catalog.write, [1, 1]

        async def flaky(fn):
            if failures:
                failures.pop()
                raise NoSpace("full")
            return await write(fn)

        monkeypatch.setattr(catalog, "write", flaky)
        async with anyio.create_task_group() as group:
            group.start_soon(here.run)

            async def lost() -> bool:
                return await status_of(catalog, one) is ExperimentStatus.LOST

            await eventually(lost)
            group.cancel_scope.cancel()


async def test_a_lost_experiment_runs_again_when_its_trainer_beats(short_dir):
    async with daemon(short_dir) as node:
        async with node.connect() as line:
            training = await Training(line, str(node.runs)).open()
        await node.write(lambda tx: experiments.set_status(tx, training.experiment, ExperimentStatus.LOST))
        async with node.connect() as line:
            await line.ask("experiment.beat", experiment=training.experiment, step=5)
            assert node.parts.presence.is_present(training.experiment)
        row = await node.read(lambda conn: experiments.get(conn, training.experiment))
        assert (row.status, row.last_step) == (ExperimentStatus.RUNNING, 5)


def points(count: int, name: str = "loss") -> list[Point]:
    return [Point(name, step, 0.5, AT) for step in range(count)]


async def test_points_of_a_forgotten_experiment_do_not_hold_up_the_others(tmp_path):
    """Else one restarted catalog would keep every later metric of every trainer out."""
    async with store.opened(tmp_path / "c") as catalog:
        one = await store.experiment(catalog)
        buffer = MetricsBuffer(catalog, 0.01)
        buffer.put(new_id(), 1, points(3))
        buffer.put(one, 1, points(2))
        buffer.put(one, 99, points(2))
        assert await buffer.flush()
        assert len(await catalog.read(lambda conn: metrics.tail(conn, one))) == 2
        assert buffer._waiting == 0


async def test_points_that_can_not_be_written_wait_and_are_not_tried_in_a_spin(tmp_path, monkeypatch):
    async with store.opened(tmp_path / "c") as catalog:
        one = await store.experiment(catalog)
        buffer = MetricsBuffer(catalog, 0.01)
        write, tries = catalog.write, []

        async def full(_fn):
            tries.append(anyio.current_time())
            raise NoSpace("full")

        monkeypatch.setattr(catalog, "write", full)
        async with anyio.create_task_group() as group:
            group.start_soon(buffer.run)
            buffer.put(one, 1, points(3))
            await eventually(lambda: len(tries) >= 5)
            assert tries[4] - tries[0] >= 0.2, "a spin makes thousands in this time"
            monkeypatch.setattr(catalog, "write", write)

            async def stored() -> bool:
                return len(await catalog.read(lambda conn: metrics.tail(conn, one))) == 3

            await eventually(stored)
            group.cancel_scope.cancel()


async def test_a_flush_that_is_cancelled_loses_no_point(tmp_path):
    async with store.opened(tmp_path / "c") as catalog:
        one = await store.experiment(catalog)
        buffer = MetricsBuffer(catalog, 0.0)
        buffer.put(one, 1, points(50))
        async with anyio.create_task_group() as group:
            group.start_soon(buffer.run)
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        await buffer.flush()
        assert len(await catalog.read(lambda conn: metrics.tail(conn, one))) == 50


async def test_a_buffer_that_is_full_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "POINTS_WAITING_MAX", 10)
    async with store.opened(tmp_path / "c") as catalog:
        buffer = MetricsBuffer(catalog, 0.01)
        assert buffer.put("a" * 32, 1, points(10))
        assert not buffer.put("a" * 32, 1, points(1))


async def test_many_points_are_committed_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "FLUSH_POINTS_MAX", 100)
    async with store.opened(tmp_path / "c") as catalog:
        ids = [await store.experiment(catalog, f"e{n}") for n in range(5)]
        buffer = MetricsBuffer(catalog, 0.01)
        for one in ids:
            buffer.put(one, 1, points(60))
        commits = catalog._writer.commits
        assert await buffer.flush()
        assert catalog._writer.commits - commits == 3


async def test_a_run_that_ended_leaves_no_memory_lent_to_a_process_that_lives_on(short_dir):
    """A sweep of many runs in one process: what was lent while a run ended was its experiment's until the process died."""
    async with daemon(short_dir) as node:
        uses = lambda: [arena.use for arena in node.parts.pool.all()]  # noqa: E731
        async with node.connect() as line:
            training = await Training(line, str(node.runs)).open()
            for _ in range(2):
                (await training.lease(1 << 20)).close()
                await line.ask("experiment.close", experiment=training.experiment, status="completed")
        await eventually(lambda: uses() == [Use.FREE, Use.FREE])
        async with node.connect() as line:
            await line.ask("experiment.close", experiment=training.experiment, status="completed")
            training.line = line
            await training.open()
            (await training.lease(1 << 20)).close()
        await eventually(lambda: Use.LEASED in uses() and not node.parts.pool.waiting)
        await anyio.sleep(0.2)
        assert uses().count(Use.LEASED) == 1, "it goes on: whoever lost its connection may be writing"
