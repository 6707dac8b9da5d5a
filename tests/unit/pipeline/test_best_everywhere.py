"""Rules for the best in a running daemon: several at once, over a project, late metrics, links, protection, requests."""

import os
from pathlib import Path

import pytest

from ckptd.catalog import checkpoints
from ckptd.model import State
from tests.support.in_process import Training, daemon, eventually
from tests.unit.pipeline.test_winners import reload

LOSS = {"metric": "loss", "mode": "min"}
SHARP = {"metric": "acc", "mode": "max", "name": "sharp", "min_delta": 0.1}
OVERALL = {"metric": "loss", "mode": "min", "name": "overall", "scope": "project"}


async def two(node, line) -> tuple[Training, Training]:
    return (
        await Training(line, str(node.runs), name="one").open(),
        await Training(line, str(node.runs), name="two").open(),
    )


def leads(link: Path, to: str) -> bool:
    return link.is_symlink() and os.readlink(link) == to


async def state(node, checkpoint: str) -> State:
    return await node.read(lambda conn: checkpoints.state_of(conn, checkpoint))


async def test_each_rule_has_its_own_winner_and_a_link_that_follows_it(short_dir, monkeypatch):
    """M102, M103, M104, M108: of three rules, one over the project; links are symlinks, never second copies."""
    async with daemon(short_dir, retention={"keep_best": [LOSS, SHARP, OVERALL]}) as node, node.connect() as line:
        one, other = await two(node, line)
        first = await one.saved(1, metrics={"loss": 0.1, "acc": 0.5})
        sharp = await one.saved(2, metrics={"loss": 0.5, "acc": 0.9})
        await one.saved(3, metrics={"loss": 0.6, "acc": 0.95})  # better than 0.9, but not by more than 0.1
        demo = node.runs / "demo"
        await eventually(lambda: leads(demo / "one/latest", "step_0000000003"))
        assert leads(demo / "one/best", "step_0000000001")
        assert leads(demo / "one/best_loss", "step_0000000001")
        assert leads(demo / "one/best_sharp", "step_0000000002")
        assert leads(demo / "best_overall", "one/step_0000000001")
        elsewhere = await other.saved(1, metrics={"loss": 0.01})
        await eventually(lambda: leads(demo / "best_overall", "two/step_0000000001"))

        async def named(selector: str) -> str:
            return (await line.ask("resolve", selector=selector))["checkpoint"]

        assert await named("demo/one@best") == await named("demo/one@best:loss") == first
        assert await named("demo/one@best:sharp") == await named("demo/one@best_sharp") == sharp
        assert await named("demo/one@best:acc") == sharp  # no rule is called so, and one is by this metric
        assert await named("demo/one@best:overall") == await named("demo/two@best:overall") == elsewhere
        await line.ask("checkpoint.metrics", checkpoint=sharp, metrics={"loss": 0.001})
        await eventually(lambda: leads(demo / "best_overall", "one/step_0000000002"))
        assert await named("demo/one@best") == sharp
        await reload(node, monkeypatch, keep_best=[SHARP])
        await eventually(lambda: not (demo / "one/best_loss").is_symlink())
        await one.saved(4, metrics={"acc": 0.0})
        await eventually(lambda: not (demo / "best_overall").is_symlink())
        assert leads(demo / "one/best", "step_0000000002")


async def test_a_winner_over_the_project_is_kept_in_whichever_experiment_it_lies(short_dir):
    """M102, M094: retention of one experiment knows that another one's board holds its checkpoint."""
    rules = {"keep_last": 1, "keep_best": [OVERALL], "links": False}  # what a link leads to stays anyway
    async with daemon(short_dir, retention=rules) as node, node.connect() as line:
        one, other = await two(node, line)
        best, plain = await one.saved(1, metrics={"loss": 0.1}), await one.saved(2, metrics={"loss": 0.5})
        await one.saved(3, metrics={"loss": 0.6})

        async def is_retired(checkpoint: str) -> bool:
            return await state(node, checkpoint) is not State.LIVE

        await eventually(lambda: is_retired(plain))
        assert not await is_retired(best)
        shown = await line.ask("show", selector=best)
        assert "best:overall" in shown["checkpoint"]["holds"]
        with pytest.raises(Exception, match="is kept: best:overall"):
            await line.ask("remove", selector=best)
        await other.saved(1, metrics={"loss": 0.01})
        await one.saved(4)
        await eventually(lambda: is_retired(best))


async def test_a_late_metric_and_a_veto_of_update_best_decide_at_once(short_dir):
    """M105, M106: what is told late counts from the same transaction on; what may not become best never does."""
    # On pressure: else the one that has no metric yet may be retired before it is told one.
    rules = {"keep_best": [LOSS], "drop": "on_pressure"}
    async with daemon(short_dir, retention=rules) as node, node.connect() as line:
        training = await Training(line, str(node.runs)).open()
        kept_out = await training.saved(1, metrics={"loss": 0.0}, update_best=False)
        late, plain = await training.saved(2), await training.saved(3, metrics={"loss": 0.5})
        assert (await line.ask("resolve", selector="best:loss"))["checkpoint"] == plain
        await line.ask("checkpoint.metrics", checkpoint=late, metrics={"loss": 0.2})
        assert (await line.ask("resolve", selector="best:loss"))["checkpoint"] == late
        await line.ask("checkpoint.metrics", checkpoint=kept_out, metrics={"loss": -1.0})
        assert (await line.ask("resolve", selector="best:loss"))["checkpoint"] == late
        [found] = (await line.ask("best", project="demo", name="run", places=5))["experiments"]
        [board] = found["boards"]
        assert [(place["step"], place["value"]) for place in board["places"]] == [(2, 0.2)]
        again = await line.ask("best.recompute", project="demo", dry_run=False)
        assert (again["looked_at"], again["experiments"]) == (1, [])
