"""Pins, leases, branches, bests, roots, audit."""

from datetime import timedelta

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError

from ckptd.best import best
from ckptd.bestrule import BestRule
from ckptd.catalog import Catalog, audits, bests, checkpoints, contenders, holds, roots, schema
from ckptd.catalog.audits import Deed
from ckptd.catalog.roots import NewRoot
from ckptd.errors import NotFound
from ckptd.model import RootKind, new_id
from tests.support.boards import put_places
from tests.support.catalog import UID, StillClock, Told, experiment, saved


async def test_a_pin_holds_until_it_is_lifted(catalog: Catalog, clock: StillClock, told: Told) -> None:
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    for note in ("paper", "thesis"):
        await catalog.write(lambda tx, what=note: holds.pin(tx, one.id, UID, what))
    held = await catalog.read(lambda conn: holds.of_checkpoint(conn, one.id, clock.now()))
    assert [(hold.kind, hold.by, hold.note) for hold in held] == [("pin", f"uid {UID}", "thesis")]
    assert await catalog.write(lambda tx: holds.unpin(tx, one.id, 1000))
    assert not await catalog.write(lambda tx: holds.unpin(tx, one.id, 1000))
    assert await catalog.read(lambda conn: holds.of_checkpoint(conn, one.id, clock.now())) == []
    assert told.names[-3:] == ["checkpoint.pinned", "checkpoint.pinned", "checkpoint.unpinned"]
    with pytest.raises(NotFound):
        await catalog.write(lambda tx: holds.pin(tx, new_id(), UID))


async def test_a_pin_that_is_carried_is_as_it_was_made_and_never_takes_anothers_place(
    catalog: Catalog, clock: StillClock, told: Told
) -> None:
    known = await experiment(catalog)
    old, new, own = [await saved(catalog, known, step) for step in (1, 2, 3)]
    await catalog.write(lambda tx: holds.pin(tx, old.id, UID, "paper"))
    await catalog.write(lambda tx: holds.pin(tx, own.id, UID, "own"))
    made = (await catalog.read(lambda conn: conn.execute(select(schema.pin.c.pinned_at)))).scalars().all()
    clock.pass_s(60)
    await catalog.write(lambda tx: holds.carry(tx, old.id, own.id))
    await catalog.write(lambda tx: holds.carry(tx, new.id, old.id))
    held = await catalog.read(lambda conn: holds.of_checkpoints(conn, [old.id, new.id, own.id], clock.now()))
    assert {(hold.checkpoint_id, hold.note) for hold in held} == {(old.id, "paper"), (own.id, "own")}
    await catalog.write(lambda tx: holds.carry(tx, old.id, new.id))
    held = await catalog.read(lambda conn: holds.of_checkpoints(conn, [old.id, new.id, own.id], clock.now()))
    assert {(hold.checkpoint_id, hold.note) for hold in held} == {(new.id, "paper"), (own.id, "own")}
    assert told.names[-2:] == ["checkpoint.unpinned", "checkpoint.pinned"]
    after = (await catalog.read(lambda conn: conn.execute(select(schema.pin.c.pinned_at)))).scalars().all()
    assert sorted(after) == sorted(made)


async def test_a_lease_holds_until_it_ends_and_is_renewed_by_its_holder(catalog: Catalog, clock: StillClock) -> None:
    known = await experiment(catalog)
    one = await saved(catalog, known, 1)
    await catalog.write(lambda tx: holds.lease(tx, one.id, "pid 1", 60))
    clock.pass_s(50)
    until = await catalog.write(lambda tx: holds.lease(tx, one.id, "pid 1", 60))
    await catalog.write(lambda tx: holds.lease(tx, one.id, "pid 2", 20))
    assert until == clock.now() + timedelta(seconds=60)
    clock.pass_s(30)
    held = await catalog.read(lambda conn: holds.of_experiment(conn, known, clock.now()))
    assert [(hold.by, hold.until) for hold in held] == [("pid 1", until)]
    assert await catalog.write(lambda tx: holds.expire(tx, clock.now())) == 1
    await catalog.write(lambda tx: holds.release(tx, one.id, "pid 1"))
    assert await catalog.read(lambda conn: holds.of_checkpoint(conn, one.id, clock.now())) == []


async def test_a_reader_that_is_gone_holds_nothing(catalog: Catalog, clock: StillClock) -> None:
    known = await experiment(catalog)
    made = [await saved(catalog, known, step) for step in range(3)]
    for one in made:
        await catalog.write(lambda tx, what=one.id: holds.lease(tx, what, "pid 1", 60))
    await catalog.write(lambda tx: holds.release_all(tx, "pid 1"))
    assert await catalog.read(lambda conn: holds.of_experiment(conn, known, clock.now())) == []


async def test_a_branch_holds_the_checkpoint_it_started_from(catalog: Catalog, clock: StillClock) -> None:
    """M094: a resume within the same experiment is no branch."""
    known = await experiment(catalog)
    trunk, other = await saved(catalog, known, 1), await saved(catalog, known, 2)
    await saved(catalog, known, 3, parent_id=other.id)
    child = await experiment(catalog, name="branch")
    await saved(catalog, child, 1, parent_id=trunk.id)
    await saved(catalog, child, 2, parent_id=trunk.id)
    grandchild = await experiment(catalog, name="twig", parent_id=trunk.id)
    held = await catalog.read(lambda conn: holds.of_experiment(conn, known, clock.now()))
    assert {(hold.checkpoint_id, hold.kind, hold.by) for hold in held} == {
        (trunk.id, "parent", child),
        (trunk.id, "parent", grandchild),
    }


async def test_best_candidates_are_enough_for_the_pure_rule(catalog: Catalog) -> None:
    """What SQL narrows down to, and what the rule says of everything, is the same."""
    known = await experiment(catalog)
    values = [3.0, 1.0, 2.0, 1.0, float("nan"), 0.5, float("-inf"), 1.0]
    made = [await saved(catalog, known, 100 - n, metrics={"loss": v}) for n, v in enumerate(values)]
    made.append(await saved(catalog, known, 200, metrics={"loss": 0.0}, update_best=False))
    made.append(await saved(catalog, known, 201))
    # A rebuild finds revisions in any order: of equal values the earlier revision wins, not the earlier row.
    made += [await saved(catalog, known, 5, revision=number, metrics={"loss": 1.0}) for number in (3, 1, 2)]
    await catalog.write(lambda tx: checkpoints.mark_corrupt(tx, made[5].id, []))
    everything = [await catalog.read(lambda conn, of=one.id: checkpoints.get(conn, of)) for one in made]
    where = await catalog.read(lambda conn: bests.whereabouts(conn, known))
    among = contenders.Among(experiment_nos=[where.experiment_no], is_one_experiment=True)
    for mode in ("min", "max"):
        for k in (1, 2, 3, 20):
            rule = BestRule(metric="loss", mode=mode, k=k)
            found = await catalog.read(lambda conn, m=mode, n=k: contenders.leaders(conn, among, "loss", m, n))
            winners = [winner.checkpoint.id for winner in best(everything, rule)]
            named = {row.id for row in found}
            assert [winner.checkpoint.id for winner in best([o for o in everything if o.id in named], rule)] == winners
            assert winners


async def test_best_changed_is_told_only_for_a_new_first_place(catalog: Catalog, told: Told) -> None:
    """M102: decided and announced in one transaction."""
    known = await experiment(catalog)
    one = await saved(catalog, known, 1, metrics={"loss": 1.0})
    two = await saved(catalog, known, 2, metrics={"loss": 2.0})
    rule = ("loss", "min")

    async def decide(*winners: tuple[str, float]) -> bool:
        return await catalog.write(lambda tx: put_places(tx, known, {rule: winners} if winners else {}))

    assert await decide((two.id, 2.0))
    assert not await decide((two.id, 2.0))
    assert await decide((one.id, 1.0), (two.id, 2.0))
    assert await decide((one.id, 1.0))
    changed = [(event.checkpoint, event.data["value"]) for event in told.events if event.name == "best.changed"]
    assert changed == [(two.id, 2.0), (one.id, 1.0)]
    now = await catalog.read(lambda conn: bests.current(conn, known))
    assert [(row.rank, row.checkpoint_id) for row in now] == [(1, one.id)]
    assert await decide()
    assert await catalog.read(lambda conn: bests.current(conn, known)) == []


async def test_a_root_is_made_once_and_takes_the_newest_permissions(catalog: Catalog, told: Told) -> None:
    first = await catalog.write(lambda tx: roots.ensure(tx, NewRoot(path="/data", kind=RootKind.WATCHED, uid=UID)))
    again = await catalog.write(
        lambda tx: roots.ensure(tx, NewRoot(path="/data", kind=RootKind.WATCHED, uid=5, project="p", allow_delete=True))
    )
    assert (again.id, again.uid, again.project, again.allow_delete) == (first.id, UID, "p", True)
    assert told.names == ["root.added"]
    await catalog.write(lambda tx: roots.mark_reconciled(tx, first.id))
    assert [root.reconciled_at is not None for root in await catalog.read(roots.all_roots)] == [True]
    assert await catalog.read(lambda conn: roots.by_path(conn, "/other")) is None
    with pytest.raises(NotFound):
        await catalog.read(lambda conn: roots.get(conn, 99))


async def test_paths_of_any_bytes_and_length_are_roots(catalog: Catalog) -> None:
    for path in ("/a\udcff\udcfe", "/" + "x" * 4000, "/with\nnewline"):
        await catalog.write(lambda tx, what=path: roots.ensure(tx, NewRoot(path=what, kind=RootKind.WATCHED, uid=UID)))
        found = await catalog.read(lambda conn, what=path: roots.by_path(conn, what))
        assert found is not None
        assert found.path == path


async def test_the_audit_trail_only_grows(catalog: Catalog) -> None:
    """M043: not even our own code can edit it."""
    deed = Deed(uid=UID, pid=5, verb="pin", subject="x", before=None, after={"note": "n"}, note="why")
    for _ in range(3):
        await catalog.write(lambda tx: audits.record(tx, deed))
    for statement in (update(schema.audit).values(uid=0), delete(schema.audit)):
        with pytest.raises(IntegrityError, match="append-only"):
            await catalog.write(lambda tx, what=statement: tx.conn.execute(what))
    first, cursor = await catalog.read(lambda conn: audits.page(conn, limit=2))
    rest, end = await catalog.read(lambda conn: audits.page(conn, limit=2, after=cursor, subject="x"))
    assert [entry.deed for entry in first + rest] == [deed] * 3
    assert end is None
