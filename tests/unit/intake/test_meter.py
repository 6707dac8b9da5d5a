"""What is counted is what happened, once, whatever clients claim (M088, M089)."""

import pytest

from ckptd.events import Event
from ckptd.intake import meter
from ckptd.intake import requests as ask
from ckptd.model import new_id
from tests.support.in_process import Training, daemon, size_for

FILES = {"model.safetensors": b"12345678"}


async def hand_over(training: Training, stall_s: object, *, times: int = 1) -> None:
    """Save once, and say so to the daemon this often."""
    lease = await training.lease(size_for(FILES))
    checkpoint = new_id()
    try:
        training.write(lease, checkpoint, FILES, step=None)
    finally:
        lease.close()
    for _ in range(times):
        answer = await training.line.ask(
            "commit", **lease.names(), experiment=training.experiment, checkpoint=checkpoint, stall_s=stall_s
        )
        assert answer["checkpoint"] == checkpoint


async def test_a_stall_is_counted_once_however_often_its_commit_is_sent(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await hand_over(training, 0.25, times=3)
        took = node.parts.observers.meter.now()["total"]["took"]["stall"]
        assert (took["count"], took["sum_s"]) == (1, 0.25)


@pytest.mark.parametrize("claimed", [None, -1.0, 1e300, 86401])
async def test_a_stall_that_can_not_be_is_not_counted_and_the_save_is_taken(short_dir, claimed):
    """No save is ever refused for what it says about itself."""
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await hand_over(training, claimed)
        assert "stall" not in node.parts.observers.meter.now()["total"]["took"]


async def test_what_a_process_says_of_itself_is_its_experiments(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        await line.ask("experiment.beat", experiment=training.experiment, step=3, rss_bytes=5 << 20)
        points = [["loss", 9, 0.5, 1.0], ["note", None, 0.5, 1.0]]
        await line.ask("metrics", experiment=training.experiment, points=points)
        assert node.parts.observers.meter.now()["memory"]["clients_rss_bytes"] == 5 << 20
        stats = await line.ask("stats", project="demo", name="run")
        assert stats["experiment"]["client_rss_bytes"] == 5 << 20
        known = node.parts.observers.plant.front.statistics.of_experiment(training.experiment)
        assert (known.first[0], known.last[0]) == (3, 9)


async def test_what_is_remembered_of_saves_on_their_way_is_bounded(short_dir, monkeypatch):
    monkeypatch.setattr(meter, "FOLLOWED_MAX", 8)
    monkeypatch.setattr(meter, "STALLS_MAX", 8)
    async with daemon(short_dir, front=False) as node:
        counting, now = node.parts.observers.meter, node.parts.clock.now()
        for number in range(50):
            counting.note(Event("checkpoint.staged", now, checkpoint=f"c{number}"))
            counting.noticed(
                ask.Commit(id=1, experiment="e", checkpoint=f"c{number}", arena="a", generation=1, stall_s=1.0), {}
            )
        assert len(counting._staged_s) == len(counting._stalls) == 8
        counting.note(Event("checkpoint.verified", now, checkpoint="c0"))
        assert "verified" not in counting._statistics.total.took, "its beginning is forgotten"
        counting.note(Event("checkpoint.verified", now, checkpoint="c49"))
        assert counting._statistics.total.took["verified"].count == 1


async def test_an_experiment_that_is_not_one_is_a_clear_error(short_dir):
    async with daemon(short_dir, front=False) as node, node.connect() as line:
        for fields in ({"project": "demo", "name": "nothing"}, {"name": "nothing"}):
            await line.send("stats", **fields)
            reply = await line.reply(line._last)
            assert reply["error"]["code"] == "not_found"
            assert "ckpt experiments" in reply["error"]["hint"]


def test_the_daemons_own_memory_is_what_the_kernel_says():
    assert 1 << 20 < meter.rss_bytes() < 1 << 40
