"""Rows of checkpoints and their way along the ladder."""

import math

import pytest

from ckptd.catalog import Catalog, checkpoints, eventlog
from ckptd.errors import Bug, NotFound
from ckptd.model import Damage, Identity, Level, Origin, State, new_id
from tests.support.catalog import Told, a_checkpoint, an_identity, climb, durable, experiment, saved


async def test_a_commit_sent_twice_makes_one_row(catalog: Catalog, told: Told) -> None:
    """Idempotent by id: a client that reconnects sends its commit again."""
    known = await experiment(catalog)
    new = a_checkpoint(known, 10, metrics={"loss": 1.0})
    first = await catalog.write(lambda tx: checkpoints.stage(tx, new))
    again = await catalog.write(lambda tx: checkpoints.stage(tx, new))
    assert (first.existed, again.existed) == (False, True)
    assert again.checkpoint == first.checkpoint
    assert told.names.count("checkpoint.staged") == 1


async def test_a_step_saved_again_is_a_new_revision(catalog: Catalog) -> None:
    """M027: a duplicate step is a new revision, never an overwrite."""
    known = await experiment(catalog)
    revisions = [(await saved(catalog, known, 5)).revision for _ in range(3)]
    assert revisions == [1, 2, 3]
    assert (await saved(catalog, known, 6)).revision == 1
    assert [(await saved(catalog, known, None)).revision for _ in range(2)] == [1, 1]


async def test_a_manifest_keeps_its_revision_unless_it_is_taken(catalog: Catalog) -> None:
    known = await experiment(catalog)
    assert (await saved(catalog, known, 5, revision=3)).revision == 3
    assert (await saved(catalog, known, 5, revision=3)).revision == 4
    assert (await saved(catalog, known, 5, revision=1)).revision == 1


async def test_sequences_rise_with_arrival(catalog: Catalog) -> None:
    known = await experiment(catalog)
    sequences = [(await saved(catalog, known, step)).sequence for step in (30, 10, 20)]
    assert sequences == sorted(sequences)


async def test_everything_a_hand_off_says_comes_back(catalog: Catalog) -> None:
    """M028, M029: and NaN and the infinities as such (list row 4)."""
    known = await experiment(catalog)
    new = a_checkpoint(
        known,
        7,
        epoch=1.5,
        metrics={"nan": math.nan, "inf": math.inf, "less": -math.inf, "loss": 0.1},
        note="née \N{SNOWMAN}",
        meta={"a": [1, {"b": None}]},
        tags=("z", "a"),
        parent_id=new_id(),
        update_best=False,
        arena="ab" * 16,
        size_bytes=1 << 40,
    )
    found = (await catalog.write(lambda tx: checkpoints.stage(tx, new))).checkpoint
    assert math.isnan(found.metrics["nan"])
    assert (found.metrics["inf"], found.metrics["less"], found.metrics["loss"]) == (math.inf, -math.inf, 0.1)
    assert (found.note, found.meta, found.tags, found.parent_id) == (new.note, new.meta, ("a", "z"), new.parent_id)
    assert (found.epoch, found.update_best, found.size_bytes) == (1.5, False, 1 << 40)
    assert (found.state, found.level, found.origin) == (State.PENDING, Level.STAGED, Origin.MEMORY)
    assert await catalog.read(lambda conn: checkpoints.arena_of(conn, new.id)) == "ab" * 16


async def test_the_ladder_is_climbed_and_told_rung_by_rung(catalog: Catalog, told: Told) -> None:
    known = await experiment(catalog)
    new = a_checkpoint(known, 1)
    found = await catalog.write(lambda tx: climb(tx, new))
    assert (found.state, found.level, found.is_good) == (State.LIVE, Level.VERIFIED, True)
    assert found.durable_at is not None
    assert found.verified_at is not None
    assert told.names[1:] == [
        "checkpoint.staged",
        "checkpoint.published",
        "latest.changed",
        "checkpoint.verified",
    ]
    assert all(event.checkpoint == new.id and event.experiment == known for event in told.events[1:])


async def test_files_and_identity_come_back_exactly(catalog: Catalog) -> None:
    """Including inode numbers that use the 64th bit, and paths that are not UTF-8."""
    known = await experiment(catalog)
    new = a_checkpoint(known, 1)
    what = durable("/data/caf\udce9")
    big = Identity(dev=(1 << 64) - 1, ino=(1 << 63) + 5, size_bytes=1, mtime_ns=2, ctime_ns=3)

    async def publish(tx: checkpoints.Tx) -> None:
        await checkpoints.stage(tx, new)
        await checkpoints.mark_durable(
            tx, new.id, checkpoints.Durable(path=what.path, files=what.files, identity=big, size_bytes=9)
        )

    await catalog.write(publish)
    assert await catalog.read(lambda conn: checkpoints.files(conn, new.id)) == what.files
    assert await catalog.read(lambda conn: checkpoints.identity(conn, new.id)) == big
    found = await catalog.read(lambda conn: checkpoints.get(conn, new.id))
    assert (found.path, found.size_bytes) == (what.path, 9)


async def test_durable_twice_with_the_same_files_is_one_mark_and_with_others_a_bug(
    catalog: Catalog, told: Told
) -> None:
    known = await experiment(catalog)
    new = a_checkpoint(known, 1)
    await catalog.write(lambda tx: climb(tx, new, Level.STAGED))
    for _ in range(2):
        await catalog.write(lambda tx: checkpoints.mark_durable(tx, new.id, durable()))
    assert told.names.count("checkpoint.published") == 1
    other = checkpoints.Durable(path="/x", files=(), identity=an_identity(), size_bytes=0)
    with pytest.raises(Bug):
        await catalog.write(lambda tx: checkpoints.mark_durable(tx, new.id, other))


async def test_what_is_not_durable_cannot_be_verified(catalog: Catalog) -> None:
    known = await experiment(catalog)
    new = a_checkpoint(known, 1)
    await catalog.write(lambda tx: climb(tx, new, Level.STAGED))
    with pytest.raises(Bug):
        await catalog.write(lambda tx: checkpoints.mark_verified(tx, new.id))


async def test_damage_ends_goodness_keeps_the_level_and_is_told_in_detail(catalog: Catalog, told: Told) -> None:
    """The level says what was reached; the state, that it no longer counts."""
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    damage = [Damage("model.safetensors", "digest", "", (3, 4), ("w",))]
    found = await catalog.write(lambda tx: checkpoints.mark_corrupt(tx, one.id, damage))
    assert (found.state, found.level, found.is_good) == (State.CORRUPT, Level.VERIFIED, False)
    assert found.error is not None
    assert found.error["damage"][0]["mib"] == [3, 4]
    assert told.names[-1] == "checkpoint.corrupt"
    assert told.events[-1].data["damage"][0]["tensors"] == ["w"]
    healed = await catalog.write(lambda tx: checkpoints.mark_verified(tx, one.id))
    assert healed.is_good
    assert healed.error is None


async def test_latest_changed_is_told_when_the_newest_good_one_is_another(catalog: Catalog, told: Told) -> None:
    known = await experiment(catalog)
    older = await saved(catalog, known, 1)
    newer = await saved(catalog, known, 2)
    await catalog.write(lambda tx: checkpoints.mark_missing(tx, newer.id, "gone"))
    changed = [event.checkpoint for event in told.events if event.name == "latest.changed"]
    assert changed == [older.id, newer.id, older.id]
    await saved(catalog, known, 0)  # good, but not the newest
    assert [e.checkpoint for e in told.events if e.name == "latest.changed"] == changed


async def test_a_transition_that_is_not_in_the_table_is_a_bug_and_changes_nothing(catalog: Catalog) -> None:
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    with pytest.raises(Bug):
        await catalog.write(lambda tx: checkpoints.mark_failed(tx, one.id, {"code": "x"}))
    assert await catalog.read(lambda conn: checkpoints.get(conn, one.id)) == one


async def test_a_failed_one_is_tried_again_and_a_replaced_one_is_not(catalog: Catalog, told: Told) -> None:
    known = await experiment(catalog)
    new = a_checkpoint(known, 1)
    await catalog.write(lambda tx: climb(tx, new, Level.STAGED))
    failed = await catalog.write(lambda tx: checkpoints.mark_failed(tx, new.id, {"code": "no_space"}))
    assert (failed.state, failed.error) == (State.FAILED, {"code": "no_space"})
    again = await catalog.write(lambda tx: checkpoints.mark_pending(tx, new.id))
    assert (again.state, again.error) == (State.PENDING, None)
    await catalog.write(lambda tx: checkpoints.mark_replaced(tx, new.id, by="next"))
    assert told.events[-1].data["by"] == "next"
    with pytest.raises(Bug):
        await catalog.write(lambda tx: checkpoints.mark_pending(tx, new.id))


async def test_what_comes_back_from_the_trash_unchanged_is_still_verified(catalog: Catalog, told: Told) -> None:
    """A rename changes ctime alone."""
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    await catalog.write(lambda tx: checkpoints.mark_trashed(tx, one.id, one.id, "no rule keeps it"))
    recorded = await catalog.read(lambda conn: checkpoints.identity(conn, one.id))
    assert recorded is not None
    moved = an_identity(recorded.ino, ctime_ns=99)
    back = await catalog.write(lambda tx: checkpoints.mark_restored(tx, one.id, one.path, moved))
    assert (back.state, back.level, back.trashed_at) == (State.LIVE, Level.VERIFIED, None)
    assert told.names[-1] == "checkpoint.restored"


async def test_what_comes_back_as_other_bytes_must_be_verified_again(catalog: Catalog) -> None:
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    await catalog.write(lambda tx: checkpoints.mark_missing(tx, one.id))
    back = await catalog.write(lambda tx: checkpoints.mark_restored(tx, one.id, one.path, an_identity(12345)))
    assert (back.state, back.level, back.is_good) == (State.LIVE, Level.DURABLE, False)


DAMAGE = Damage("model.safetensors", "digest", "1 of 1 MiB differ", (0,), ("weight",))


async def test_what_was_damaged_when_it_went_to_the_trash_comes_back_damaged(catalog: Catalog, told: Told) -> None:
    """M082: whatever was done to the bytes meanwhile, only a reading makes them good again."""
    known = await experiment(catalog)
    for inode in (None, 12345):
        one = await saved(catalog, known, 1)
        await catalog.write(lambda tx, of=one: checkpoints.mark_corrupt(tx, of.id, [DAMAGE]))  # type: ignore[misc]
        await catalog.write(lambda tx, of=one: checkpoints.mark_trashed(tx, of.id, of.id, "cleaned up"))  # type: ignore[misc]
        recorded = await catalog.read(lambda conn, of=one: checkpoints.identity(conn, of.id))  # type: ignore[misc]
        assert recorded is not None
        seen = recorded if inode is None else an_identity(inode)
        back = await catalog.write(lambda tx, of=one, s=seen: checkpoints.mark_restored(tx, of.id, of.path, s))  # type: ignore[misc]
        assert (back.state, back.is_good, back.is_whole) == (State.CORRUPT, False, False)
        assert back.error is not None
        assert (back.error["code"], back.error["damage"][0]["mib"]) == ("corrupt", [0])
        assert told.events[-1].data["state"] == "corrupt"
        good = await catalog.write(lambda tx, of=one: checkpoints.mark_verified(tx, of.id))  # type: ignore[misc]
        assert (good.state, good.error) == (State.LIVE, None)


async def test_damaged_bytes_that_were_gone_for_a_while_are_no_better_when_they_are_back(catalog: Catalog) -> None:
    """A disk that is not mounted for an hour makes nothing whole; other bytes in their place are read first."""
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    recorded = await catalog.read(lambda conn: checkpoints.identity(conn, one.id))
    assert recorded is not None
    for seen, state in ((recorded, State.CORRUPT), (an_identity(12345), State.LIVE)):
        await catalog.write(lambda tx: checkpoints.mark_corrupt(tx, one.id, [DAMAGE]))
        gone = await catalog.write(lambda tx: checkpoints.mark_missing(tx, one.id))
        assert gone.error is not None
        assert gone.error["code"] == "missing"
        back = await catalog.write(lambda tx, s=seen: checkpoints.mark_restored(tx, one.id, one.path, s))  # type: ignore[misc]
        assert (back.state, back.is_good) == (state, False)


async def test_trash_then_drop_is_told_and_final(catalog: Catalog, told: Told) -> None:
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    await saved(catalog, known, 2)
    await catalog.write(lambda tx: checkpoints.mark_trashed(tx, one.id, "t1", "no rule keeps step 1"))
    await catalog.write(lambda tx: checkpoints.mark_dropped(tx, one.id))
    assert told.names[-2:] == ["checkpoint.trashed", "checkpoint.dropped"]
    with pytest.raises(Bug):
        await catalog.write(lambda tx: checkpoints.mark_restored(tx, one.id, one.path, an_identity()))


async def test_late_metrics_are_merged_and_listed(catalog: Catalog) -> None:
    """M106: validation ends after the save."""
    known = await experiment(catalog)
    one = await saved(catalog, known, 1, metrics={"loss": 2.0, "acc": 0.5})
    found = await catalog.write(lambda tx: checkpoints.add_metrics(tx, one.id, {"acc": 0.75, "val": math.nan}))
    assert (found.metrics["loss"], found.metrics["acc"]) == (2.0, 0.75)
    assert math.isnan(found.metrics["val"])


async def test_events_are_in_the_log_under_their_numbers(catalog: Catalog, told: Told) -> None:
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    logged = await catalog.read(lambda conn: eventlog.page(conn, checkpoint_id=one.id))
    assert [entry.event for entry in logged] == told.events[1:]
    assert [entry.sequence for entry in logged] == [event.seq for event in told.events[1:]]
    newest = await catalog.read(lambda conn: eventlog.newest(conn, 2))
    assert [entry.event for entry in newest] == told.events[-2:]


async def test_the_event_log_is_bounded(catalog: Catalog) -> None:
    known = await experiment(catalog)
    for step in range(5):
        await saved(catalog, known, step)
    await catalog.write(lambda tx: eventlog.trim(tx, 3))
    assert len(await catalog.read(eventlog.page)) == 3


async def test_get_many_returns_what_exists(catalog: Catalog) -> None:
    known = await experiment(catalog)
    ids = [(await saved(catalog, known, step)).id for step in range(3)]
    found = await catalog.read(lambda conn: checkpoints.get_many(conn, [*ids, new_id()] * 300))
    assert found.keys() == set(ids)
    with pytest.raises(NotFound):
        await catalog.read(lambda conn: checkpoints.get(conn, new_id()))
