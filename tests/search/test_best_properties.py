"""What is best, searched: one by one and all at once give the same answer, whatever comes late or goes."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.best import Contender, Decision, admit, contender, decide, measure
from ckptd.bestrule import BestRule, Term
from ckptd.model import Checkpoint, Level, State
from tests.unit.test_best import a_save

METRICS = ("a", "b", "c")
VALUES = st.integers(0, 12).map(lambda n: n / 4) | st.floats(allow_nan=True, allow_infinity=True)
MODES = st.sampled_from(["min", "max"])
KINDS = ("metric", "metric", "weighted", "lexicographic", "pareto")
DELTAS = (0.0, 0.0, 0.25, 0.5, 1.0)


@st.composite
def rules(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, deltas: tuple[float, ...] = DELTAS) -> BestRule:
    """Any kind of rule among these."""
    by = draw(st.sampled_from(kinds))
    k = draw(st.integers(1, 4))
    delta = draw(st.sampled_from(deltas))
    if by == "metric":
        return BestRule(metric="a", mode=draw(MODES), min_delta=delta, k=k)
    count = draw(st.integers(2, 3))
    more = {"weighted": "weight", "lexicographic": "tolerance", "pareto": "scale"}[by]
    terms = tuple(
        Term.model_validate({"metric": name, "mode": draw(MODES), more: draw(st.sampled_from([0.5, 1.0, 2.0]))})
        for name in METRICS[:count]
    )
    if by == "pareto":
        return BestRule(name="r", by="pareto", terms=terms, k=draw(st.none() | st.just(k)))
    return BestRule(name="r", by=by, terms=terms, k=k, min_delta=delta if by == "weighted" else 0.0)


@st.composite
def histories(draw: st.DrawFn) -> list[Checkpoint]:
    """Checkpoints of one experiment in the order in which they become known, which is not that of training."""
    saves = [
        a_save(
            draw(st.none() | st.integers(0, 9)),
            id=f"{sequence:032x}",
            sequence=sequence,
            segment=draw(st.integers(1, 2)),
            metrics=draw(st.dictionaries(st.sampled_from(METRICS), VALUES)),
            update_best=draw(st.sampled_from([True] * 5 + [False])),
        )
        for sequence in range(draw(st.integers(0, 12)))
    ]
    return draw(st.permutations(saves))


def taking_part(saves: list[Checkpoint], rule: BestRule) -> list[Contender]:
    return [one for one in (contender(rule, save) for save in saves) if one is not None]


def ids(decided: Decision) -> list[str]:
    return [one.id for one in decided.places]


@settings(max_examples=60)
@given(saves=histories(), rule=rules())
def test_one_by_one_is_the_same_as_all_at_once(saves: list[Checkpoint], rule: BestRule) -> None:
    """M105, M106: the live answer, kept up save by save, is the answer of a recomputation."""
    live = Decision(())
    known: list[Contender] = []
    for one in taking_part(saves, rule):
        known.append(one)
        live = admit(live, one, rule) or decide(known, rule)
        assert live == decide(known, rule)


@settings(max_examples=60)
@given(saves=histories(), rule=rules(), chance=st.randoms(use_true_random=False))
def test_the_order_in_which_checkpoints_become_known_changes_nothing(
    saves: list[Checkpoint], rule: BestRule, chance: object
) -> None:
    """M106: a metric that comes late counts as if it had come at once."""
    found = taking_part(saves, rule)
    again = list(found)
    chance.shuffle(again)  # type: ignore[attr-defined]
    assert decide(found, rule) == decide(again, rule)


@settings(max_examples=60)
@given(saves=histories(), rule=rules(), data=st.data())
def test_retiring_what_has_no_place_moves_no_place(
    saves: list[Checkpoint], rule: BestRule, data: st.DataObject
) -> None:
    """M102: retention drops losers, and the winners stay who they are."""
    found = taking_part(saves, rule)
    before = decide(found, rule)
    retired = [
        save.id for save in saves if save.id not in ids(before) and data.draw(st.booleans(), label=f"retire {save.id}")
    ]
    after = [
        a_save(
            save.step,
            **{
                name: getattr(save, name)
                for name in ("id", "sequence", "segment", "metrics", "update_best", "revision")
            },
            state=State.DROPPED if save.id in retired else State.LIVE,
            level=Level.VERIFIED,
            verified_at=save.created_at,
        )
        for save in saves
    ]
    assert ids(decide(taking_part(after, rule), rule)) == ids(before)


@settings(max_examples=60)
@given(saves=histories(), rule=rules())
def test_only_what_can_be_compared_has_a_place(saves: list[Checkpoint], rule: BestRule) -> None:
    """M102: NaN and Inf are never best, a missing metric is not comparable; update_best=False never wins (M105)."""
    by_id = {save.id: save for save in saves}
    decided = decide(taking_part(saves, rule), rule)
    assert len(set(ids(decided))) == len(decided.places) <= (rule.places or len(saves))
    for one in decided.places:
        save = by_id[one.id]
        assert save.update_best
        assert all(math.isfinite(save.metrics[term.metric]) for term in rule.criteria)
        assert math.isfinite(one.value)
    comparable = [save for save in saves if save.update_best and measure(rule, save.metrics) is not None]
    assert bool(comparable) == bool(decided.places)


@settings(max_examples=60)
@given(saves=histories(), rule=rules(("pareto",)))
def test_a_pareto_set_is_what_nobody_dominates(saves: list[Checkpoint], rule: BestRule) -> None:
    """M103, against the definition: for each left out there is one at least as good in all, and each kept has none better."""
    rule = rule.model_copy(update={"k": None})
    everyone = taking_part(saves, rule)
    kept = decide(everyone, rule).places

    def dominates(one: Contender, other: Contender) -> bool:
        pairs = list(zip(one.vector, other.vector, strict=True))
        return all(mine <= others for mine, others in pairs) and any(mine < others for mine, others in pairs)

    for one in everyone:
        if one in kept:
            assert not any(dominates(other, one) for other in everyone)
        else:
            assert any(dominates(other, one) or (other.vector == one.vector and other.age < one.age) for other in kept)


@settings(max_examples=60)
@given(saves=histories(), rule=rules(("metric", "weighted"), (0.25, 1.0)))
def test_who_holds_the_first_place_was_passed_by_no_later_one_by_more_than_min_delta(
    saves: list[Checkpoint], rule: BestRule
) -> None:
    """M102, min_delta against its words: walked through in the order of training, one at a time."""
    holder: Contender | None = None
    for one in sorted(taking_part(saves, rule), key=lambda one: one.age):
        if holder is None or holder.vector[0] - one.vector[0] > rule.min_delta:
            holder = one
    places = decide(taking_part(saves, rule), rule).places
    assert (places[0] if places else None) == holder
