"""Retention, searched: the promises hold for whatever checkpoints, rules and holds there are."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from ckptd.best import best
from ckptd.bestrule import BestRule
from ckptd.model import Checkpoint, Level, State
from ckptd.retention import Given, newness, plan
from ckptd.rules import Rules
from tests.support.saved import a_save

NOW = datetime(2030, 1, 1, tzinfo=UTC)

VALUES = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1.0])
BEST_RULES = st.builds(
    BestRule, metric=st.sampled_from(["loss", "acc"]), mode=st.sampled_from(["min", "max"]), k=st.integers(1, 4)
)
RULES = st.builds(
    Rules,
    keep_last=st.none() | st.integers(1, 5),
    keep_best=st.lists(BEST_RULES, max_size=3, unique_by=lambda rule: rule.name).map(tuple),
    keep_every=st.none() | st.integers(1, 10),
)


@st.composite
def saves(draw: st.DrawFn) -> list[Checkpoint]:
    """One experiment's checkpoints in any condition; steps, revisions and segments as they may come."""
    found = [
        a_save(
            draw(st.none() | st.integers(0, 12)),
            id=f"{sequence:032x}",
            sequence=sequence,
            revision=draw(st.integers(1, 3)),
            segment=draw(st.integers(1, 3)),
            state=draw(st.sampled_from([State.LIVE] * 6 + list(State))),
            level=draw(st.sampled_from([Level.VERIFIED] * 6 + list(Level))),
            metrics=draw(st.dictionaries(st.sampled_from(["loss", "acc"]), VALUES)),
            update_best=draw(st.sampled_from([True, True, False])),
        )
        for sequence in range(draw(st.integers(0, 14)))
    ]
    return draw(st.permutations(found))


HOLDS = st.dictionaries(st.integers(0, 14).map(lambda n: f"{n:032x}"), st.just(("pin",)), max_size=4)


@given(found=saves(), rules=RULES, holds=HOLDS)
def test_the_promises_hold_for_every_input(
    found: list[Checkpoint], rules: Rules, holds: dict[str, tuple[str, ...]]
) -> None:
    """R1 to R4 (M093, M094), checked from the words of the promises, not by the function's own check."""
    decided = plan(found, rules, Given(now=NOW, holds=holds))
    dropped = {one.checkpoint.id for one in decided.drop}
    kept = [one.checkpoint for one in decided.keep]
    assert sorted(dropped | {one.id for one in kept}) == sorted(one.id for one in found)
    assert len(decided.keep) + len(decided.drop) == len(found)
    good = sorted((one for one in found if one.is_good), key=newness)
    if good:
        assert good[-1].id not in dropped
    for rule in rules.keep_best:
        assert not dropped & {winner.checkpoint.id for winner in best(found, rule)}
    assert not dropped & holds.keys()
    assert dropped <= {one.id for one in good}
    assert plan(kept, rules, Given(now=NOW, holds=holds)).drop == ()
    assert all(one.why for one in decided.keep)
    if not rules.deletes:
        assert not dropped


@given(found=saves(), rules=RULES, holds=HOLDS)
def test_what_is_not_verified_changes_nothing_for_what_is(
    found: list[Checkpoint], rules: Rules, holds: dict[str, tuple[str, ...]]
) -> None:
    """R3: taking the unverified ones away leaves the same ones to drop."""
    good = [one for one in found if one.is_good]
    assert plan(found, rules, Given(now=NOW, holds=holds)).drop == plan(good, rules, Given(now=NOW, holds=holds)).drop


@given(found=saves(), rules=RULES, more=BEST_RULES)
def test_a_further_rule_never_drops_more(found: list[Checkpoint], rules: Rules, more: BestRule) -> None:
    """Rules are a union of keeps."""
    wider = rules.model_copy(update={"keep_best": (*rules.keep_best, more)})
    before = {one.checkpoint.id for one in plan(found, rules, Given(now=NOW)).drop}
    after = {one.checkpoint.id for one in plan(found, wider, Given(now=NOW)).drop}
    assert after <= before or not rules.deletes


@given(found=saves(), rule=BEST_RULES)
def test_the_best_is_what_a_naive_search_says(found: list[Checkpoint], rule: BestRule) -> None:
    """Against the definition: K times, the best of what is left."""
    left = [
        one
        for one in found
        if one.is_good and one.update_best and abs(one.metrics.get(rule.metric, float("inf"))) < float("inf")
    ]
    expected = []
    while left and len(expected) < rule.k:
        champion = left[0]
        for one in left[1:]:
            new, old = one.metrics[rule.metric], champion.metrics[rule.metric]
            better = new < old if rule.mode == "min" else new > old
            earlier = newness(one) < newness(champion)
            if better or (new == old and earlier):
                champion = one
        expected.append(champion.id)
        left.remove(champion)
    assert [winner.checkpoint.id for winner in best(found, rule)] == expected
