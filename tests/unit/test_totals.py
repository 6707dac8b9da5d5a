"""Counting over the whole catalog. M155"""

from ckptd.catalog import checkpoints
from ckptd.model import Level
from ckptd.query.totals import totals
from tests.support.boards import put_places
from tests.support.catalog import UID, a_checkpoint, climb, experiment, opened, saved


async def _best(catalog, experiment_id, decided):
    await catalog.write(lambda tx: put_places(tx, experiment_id, decided))


async def test_an_empty_catalog_has_nothing_of_anything(tmp_path):
    async with opened(tmp_path / "c.sqlite") as catalog:
        found = await catalog.read(totals)
    assert found["count"] == found["size_bytes"] == found["valid"] == found["recoverable"] == 0
    assert found["newest"] is found["oldest"] is None
    assert found["best"] == []


async def test_the_best_over_experiments_follows_each_metrics_direction(tmp_path):
    """The catalog ranks within an experiment; over several the direction must not be lost."""
    async with opened(tmp_path / "c.sqlite") as catalog:
        won = {}
        for name, loss, acc in (("a", 0.5, 0.9), ("b", 0.3, 0.7), ("c", 0.4, 0.8)):
            of = await experiment(catalog, name)
            row = won[name] = await saved(catalog, of, 1)
            worse = await saved(catalog, of, 2)
            ranked = {
                ("loss", "min"): [(row.id, loss), (worse.id, 9.0)],
                ("acc", "max"): [(row.id, acc), (worse.id, 0.0)],
            }
            await _best(catalog, of, ranked)
        found = await catalog.read(totals)
        narrowed = await catalog.read(lambda conn: totals(conn, name="c"))
    assert [(best["metric"], best["value"], best["checkpoint"]) for best in found["best"]] == [
        ("acc", 0.9, won["a"].id),
        ("loss", 0.3, won["b"].id),
    ]
    assert {best["checkpoint"] for best in narrowed["best"]} == {won["c"].id}


async def test_what_was_replaced_or_dropped_is_not_counted_and_the_trash_is_recoverable(tmp_path):
    async with opened(tmp_path / "c.sqlite") as catalog:
        of = await experiment(catalog)
        kept = await saved(catalog, of, 1)
        trashed, dropped = [await saved(catalog, of, step) for step in (2, 3)]
        replaced = await catalog.write(lambda tx: climb(tx, a_checkpoint(of, 4), Level.STAGED))

        async def retire(tx):
            await checkpoints.mark_trashed(tx, trashed.id, "t1", "rule")
            await checkpoints.mark_trashed(tx, dropped.id, "t2", "rule")
            await checkpoints.mark_dropped(tx, dropped.id)
            await checkpoints.mark_replaced(tx, replaced.id)

        await catalog.write(retire)
        found = await catalog.read(totals)
    assert found["by_state"] == {"live": 1, "trashed": 1}
    assert (found["count"], found["valid"], found["invalid"], found["recoverable"]) == (2, 1, 0, 1)
    assert found["newest"]["checkpoint"] == found["oldest"]["checkpoint"] == kept.id


async def test_one_user_is_told_nothing_of_another(tmp_path):
    async with opened(tmp_path / "c.sqlite") as catalog:
        await saved(catalog, await experiment(catalog, "mine"), 1)
        await saved(catalog, await experiment(catalog, "theirs", uid=UID + 1), 1)
        everybody = await catalog.read(totals)
        mine = await catalog.read(lambda conn: totals(conn, UID))
    assert everybody["count"] == 2
    assert (mine["count"], mine["newest"]["name"]) == (1, "mine")
