"""Lists and selectors."""

import math
import random
from datetime import timedelta
from typing import Any

import pytest

from ckptd.bestrule import BestRule
from ckptd.catalog import Catalog, checkpoints, listing, roots
from ckptd.catalog.listing import Filter, Scope
from ckptd.catalog.roots import NewRoot
from ckptd.catalog.tx import Tx
from ckptd.errors import Ambiguous, BadRequest, NotFound, UnknownRule
from ckptd.model import Checkpoint, Level, Origin, RootKind, State
from tests.support.boards import put_places
from tests.support.catalog import UID, StillClock, a_checkpoint, climb, experiment, saved


async def pages(catalog: Catalog, **wanted: Any) -> list[Checkpoint]:
    """Follow the cursors to the end."""
    found: list[Checkpoint] = []
    after = None
    while True:
        page = await catalog.read(lambda conn, at=after: listing.find(conn, Filter(after=at, **wanted)))
        found += page.checkpoints
        after = page.next
        if after is None:
            return found


async def resolve(catalog: Catalog, selector: str, **scope: Any) -> Checkpoint:
    return await catalog.read(lambda conn: listing.resolve(conn, selector, Scope(**scope)))


async def test_pages_hold_everything_once_newest_first(catalog: Catalog) -> None:
    known = await experiment(catalog)
    made = [await saved(catalog, known, step) for step in range(7)]
    assert [one.id for one in await pages(catalog, limit=3)] == [one.id for one in made[::-1]]


async def test_pages_by_step_sort_numbers_and_put_stepless_ones_last(catalog: Catalog) -> None:
    """M027: 999,999 comes before 1,000,000, never by text."""
    known = await experiment(catalog)
    for step in (1_000_000, None, 999_999, 5, None, 5, 10**12):
        await saved(catalog, known, step)
    for limit in (1, 2, 3, 50):
        found = await pages(catalog, sort="step", limit=limit)
        assert [one.step for one in found] == [10**12, 1_000_000, 999_999, 5, 5, None, None]
        assert len({one.id for one in found}) == 7


async def test_pages_by_metric_leave_out_what_cannot_be_compared(catalog: Catalog) -> None:
    known = await experiment(catalog)
    values = [3.0, math.nan, 0.1 + 0.2, 0.3, math.inf, -1e-300, 0.3]
    for step, value in enumerate(values):
        await saved(catalog, known, step, metrics={"loss": value})
    await saved(catalog, known, 99)
    for limit in (1, 2, 50):
        found = await pages(catalog, sort="metric", metric="loss", limit=limit)
        assert [one.metrics["loss"] for one in found] == [-1e-300, 0.3, 0.3, 0.1 + 0.2, 3.0]
        best_first = await pages(catalog, sort="metric", metric="loss", mode="max", limit=limit, experiment_id=known)
        assert [one.metrics["loss"] for one in best_first] == [3.0, 0.1 + 0.2, 0.3, 0.3, -1e-300]


async def test_filters_narrow_what_is_listed(catalog: Catalog) -> None:
    """M114: a tag is the checkpoint's own or its experiment's."""
    first = await experiment(catalog, name="a", tags=("base",))
    second = await experiment(catalog, name="b", uid=UID + 1)
    one = await saved(catalog, first, 1)
    two = await saved(catalog, second, 2, tags=("base",))
    three = await catalog.write(lambda tx: climb(tx, a_checkpoint(second, 3), Level.STAGED))

    async def ids(**wanted: Any) -> set[str]:
        return {found.id for found in await pages(catalog, **wanted)}

    assert await ids(tag="base") == {one.id, two.id}
    assert await ids(name="b") == {two.id, three.id}
    assert await ids(project="demo") == {one.id, two.id, three.id}
    assert await ids(project="demo", uid=UID) == {one.id}
    assert await ids(uid=UID + 1, state=State.PENDING) == {three.id}
    assert await ids(level=Level.DURABLE) == {one.id, two.id}
    assert await ids(experiment_id=first) == {one.id}
    assert await ids(project="nothing") == set()


@pytest.mark.parametrize("common", [1, 5000])
async def test_a_common_tag_and_a_rare_one_give_the_same_list(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, common: int
) -> None:
    """Two forms of the query, one meaning."""
    monkeypatch.setattr(listing, "COMMON", common)
    shared, other = await experiment(catalog, name="a", tags=("t",)), await experiment(catalog, name="b")
    made = [
        await saved(catalog, shared, 1),
        await saved(catalog, other, 1, tags=("t", "u")),
        await saved(catalog, shared, 2, tags=("t",)),
    ]
    await saved(catalog, other, 2, tags=("u",))
    for limit in (1, 50):
        assert [one.id for one in await pages(catalog, tag="t", limit=limit)] == [one.id for one in made[::-1]]
    assert [one.id for one in await pages(catalog, tag="t", name="b")] == [made[1].id]
    assert await pages(catalog, tag="v") == []


@pytest.mark.parametrize("common", [1, listing.COMMON])
async def test_a_long_list_by_step_and_a_short_one_are_the_same(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, common: int
) -> None:
    """Walked by step or collected and sorted: one meaning, whichever column narrows it."""
    monkeypatch.setattr(listing, "COMMON", common)
    mine, other = await experiment(catalog, name="a"), await experiment(catalog, name="b")
    made = [await saved(catalog, mine, step) for step in (3, None, 1, 2)]
    await saved(catalog, other, 2)
    wanted = [made[index].id for index in (0, 3, 2, 1)]
    for limit in (1, 50):
        assert [one.id for one in await pages(catalog, sort="step", name="a", limit=limit)] == wanted
    for narrowed in ({"state": State.LIVE}, {"uid": UID}, {"project": (await pages(catalog))[0].project}):
        found = [one.id for one in await pages(catalog, sort="step", **narrowed)]
        assert [each for each in found if each in wanted] == wanted
        assert len(found) == 5
    assert await pages(catalog, sort="step", state=State.CORRUPT) == []


async def test_the_newest_of_many_experiments_are_those_of_each(catalog: Catalog) -> None:
    """A page's `latest` marks are looked up at once; no experiment's may be missing or another's."""
    first, second, empty = [await experiment(catalog, name=name) for name in "abc"]
    await saved(catalog, first, 1)
    await saved(catalog, second, 7)
    newest = {(await saved(catalog, first, 5)).id, (await saved(catalog, second, 9)).id}
    ids = [first, second, empty]
    assert await catalog.read(lambda conn: listing.latest_of(conn, ids)) == newest
    assert await catalog.read(lambda conn: listing.latest_of(conn, [])) == set()


async def test_bad_cursors_and_limits_are_refused(catalog: Catalog) -> None:
    for wanted in (
        Filter(limit=0),
        Filter(limit=501),
        Filter(after="x"),
        Filter(after="n:abc"),
        Filter(sort="step", after="n:5"),
        Filter(sort="metric"),
    ):
        with pytest.raises(BadRequest):
            await catalog.read(lambda conn, what=wanted: listing.find(conn, what))


async def test_latest_is_the_newest_verified_by_step_not_by_arrival(catalog: Catalog) -> None:
    """M010: and never one that is damaged, missing, or not yet verified."""
    known = await experiment(catalog)
    steps = list(range(0, 10_000, 1000))
    random.Random(5).shuffle(steps)
    made = {step: await saved(catalog, known, step) for step in steps}
    await catalog.write(lambda tx: climb(tx, a_checkpoint(known, 50_000), Level.DURABLE))
    assert (await resolve(catalog, "latest")).id == made[9000].id
    await catalog.write(lambda tx: checkpoints.mark_missing(tx, made[9000].id))
    assert (await resolve(catalog, "demo/run")).id == made[8000].id


async def test_latest_prefers_the_newest_segment_that_has_one(catalog: Catalog) -> None:
    """A resume from step 5 abandons what came after it; until it has saved, the old ones count."""
    known = await experiment(catalog)
    await saved(catalog, known, 5)
    abandoned = await saved(catalog, known, 10)
    await experiment(catalog)
    assert (await resolve(catalog, "latest")).id == abandoned.id
    resumed = await saved(catalog, known, 6)
    assert (await resolve(catalog, "latest")).id == resumed.id


async def test_a_step_means_its_newest_revision_even_when_damaged(catalog: Catalog) -> None:
    """Promise 8: never another checkpoint in its place."""
    known = await experiment(catalog)
    await saved(catalog, known, 5)
    second = await saved(catalog, known, 5)
    await catalog.write(lambda tx: checkpoints.mark_corrupt(tx, second.id, []))
    assert (await resolve(catalog, "step:5")).id == second.id
    assert (await resolve(catalog, "5")).id == second.id


async def test_a_retired_step_gives_way_to_a_live_revision_but_can_still_be_shown(catalog: Catalog) -> None:
    known = await experiment(catalog)
    first = await saved(catalog, known, 5)
    second = await saved(catalog, known, 5)
    await catalog.write(lambda tx: checkpoints.mark_trashed(tx, second.id, "t", "why"))
    assert (await resolve(catalog, "5")).id == first.id
    await catalog.write(lambda tx: checkpoints.mark_trashed(tx, first.id, "u", "why"))
    assert (await resolve(catalog, "5")).state is State.TRASHED


async def test_an_id_or_a_unique_prefix_names_one(catalog: Catalog) -> None:
    known = await experiment(catalog)
    one = await saved(catalog, known, 1, id="aaaaaa" + "0" * 26)
    await saved(catalog, known, 2, id="aaaaaa" + "1" * 26)
    await saved(catalog, known, 3, id="bbbbbb" + "f" * 26)
    assert (await resolve(catalog, one.id)).id == one.id
    assert (await resolve(catalog, "bbbbbb")).step == 3
    assert (await resolve(catalog, "aaaaaa1")).step == 2
    with pytest.raises(Ambiguous):
        await resolve(catalog, "aaaaaa")
    with pytest.raises(NotFound):
        await resolve(catalog, "cccccc")
    with pytest.raises(NotFound):
        await resolve(catalog, one.id, uid=UID + 1)


async def test_best_is_by_its_rule_and_says_when_it_cannot_tell(catalog: Catalog) -> None:
    """M104: the direction comes from a rule, never from the metric's name."""
    known = await experiment(catalog)
    one = await saved(catalog, known, 1, metrics={"val/loss": 1.0})
    two = await saved(catalog, known, 2, metrics={"val/loss": 2.0})
    with pytest.raises(NotFound):
        await resolve(catalog, "best:val/loss")

    async def decide(tx: Tx) -> None:
        await put_places(
            tx, known, {("val/loss", "min"): [(one.id, 1.0), (two.id, 2.0)], ("acc", "max"): [(two.id, 2.0)]}
        )

    await catalog.write(decide)
    assert (await resolve(catalog, "best:val/loss")).id == one.id
    assert (await resolve(catalog, "best_val/loss")).id == one.id
    assert (await resolve(catalog, "demo/run@best:acc")).id == two.id
    assert (await resolve(catalog, "best", rules=lambda *_: [BestRule(metric="val/loss", mode="min")])).id == one.id
    with pytest.raises(Ambiguous):
        await resolve(catalog, "best")


async def test_a_rule_that_nobody_wrote_is_another_answer_than_one_that_has_no_winner_yet(catalog: Catalog) -> None:
    """M010. Who resumes from the best there is begins afresh on the second, and must not on the first."""
    known = await experiment(catalog)
    await saved(catalog, known, step=1)

    def rules(project: str, name: str) -> list[BestRule]:
        assert (project, name) == ("demo", "run")
        return [BestRule(metric="acc", mode="max"), BestRule(metric="val_loss", mode="min", name="record")]

    for none_yet in ("best", "best:acc", "best:record", "best:val_loss", "demo/run@best:record"):
        with pytest.raises(NotFound, match="no best checkpoint"):
            await resolve(catalog, none_yet, rules=rules)
    with pytest.raises(UnknownRule, match=r"demo/run has no rule 'nope'; there are: acc, record"):
        await resolve(catalog, "best:nope", rules=rules)
    with pytest.raises(UnknownRule, match="demo/run has no rule that says what is best"):
        await resolve(catalog, "best", rules=lambda *_: [])


async def test_several_experiments_are_never_guessed_between(catalog: Catalog) -> None:
    first = await experiment(catalog, name="a")
    second = await experiment(catalog, name="b@c")
    one, two = await saved(catalog, first, 5), await saved(catalog, second, 5)
    for selector in ("latest", "5", "best"):
        with pytest.raises(Ambiguous):
            await resolve(catalog, selector)
    assert (await resolve(catalog, "demo/a@step:5")).id == one.id
    assert (await resolve(catalog, "demo/b@c")).id == two.id
    assert (await resolve(catalog, "demo/b@c@latest")).id == two.id
    assert (await resolve(catalog, "latest", project="demo", name="a")).id == one.id


async def test_what_names_nothing_says_what_would(catalog: Catalog) -> None:
    await experiment(catalog)
    for selector, error in (
        ("newest", BadRequest),
        ("", BadRequest),
        ("v3", BadRequest),
        ("demo/run@", BadRequest),
        ("demo/other", NotFound),
        ("latest", NotFound),
        ("step:3", NotFound),
        ("/no/such/path", NotFound),
    ):
        with pytest.raises(error) as caught:
            await resolve(catalog, selector)
        assert caught.value.hint


async def test_a_path_names_what_lies_there_now(catalog: Catalog) -> None:
    known = await experiment(catalog)
    gone = await saved(catalog, known, 1, path="/data/x.pt")
    await catalog.write(lambda tx: checkpoints.set_arena(tx, gone.id, None))
    one = await saved(catalog, known, 2)
    assert (await resolve(catalog, one.path)).id == one.id
    assert (await catalog.read(lambda conn: listing.by_path(conn, one.path))).id == one.id
    await catalog.write(lambda tx: checkpoints.mark_trashed(tx, one.id, "t", "why"))
    assert await catalog.read(lambda conn: listing.by_path(conn, one.path)) is None


async def test_reconcile_gets_every_known_path_of_a_root_in_pages(catalog: Catalog) -> None:
    root = await catalog.write(lambda tx: roots.ensure(tx, NewRoot(path="/data", kind=RootKind.WATCHED, uid=UID)))
    known = await experiment(catalog)
    made = [await saved(catalog, known, step, root_id=root.id, origin=Origin.WATCH) for step in range(5)]
    await saved(catalog, known, 9)  # under no root
    await catalog.write(lambda tx: climb(tx, a_checkpoint(known, 10, root_id=root.id), Level.STAGED))  # no path yet
    await catalog.write(lambda tx: checkpoints.mark_trashed(tx, made[4].id, "t", "why"))
    found: list[listing.Known] = []
    cursor: int | None = 0
    while cursor is not None:
        page, cursor = await catalog.read(lambda conn, at=cursor: listing.known(conn, root.id, after=at, limit=2))
        found += page
    assert [one.path for one in found] == [one.path for one in made[:4]]
    assert found[0].identity is not None
    assert found[0].identity.ino == made[0].sequence
    assert not found[0].is_ours


async def test_the_trash_is_emptied_oldest_first(catalog: Catalog, clock: StillClock) -> None:
    known = await experiment(catalog)
    made = [await saved(catalog, known, step) for step in range(3)]
    for one in made[1::-1]:
        await catalog.write(lambda tx, what=one: checkpoints.mark_trashed(tx, what.id, f"t-{what.step}", "why"))
        clock.pass_s(10)
    horizon = clock.now() - timedelta(seconds=10)
    found = await catalog.read(lambda conn: listing.trashed_before(conn, horizon))
    assert [(one.step, trash) for one, trash in found] == [(1, "t-1"), (0, "t-0")]
    earlier = clock.now() - timedelta(seconds=15)
    assert len(await catalog.read(lambda conn: listing.trashed_before(conn, earlier))) == 1


async def test_recovery_sees_what_is_unfinished(catalog: Catalog) -> None:
    known = await experiment(catalog)
    await saved(catalog, known, 1)
    new = a_checkpoint(known, 2)
    await catalog.write(lambda tx: climb(tx, new, Level.STAGED))
    assert [one.id for one in await catalog.read(listing.unfinished)] == [new.id]
