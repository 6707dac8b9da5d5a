"""Which checkpoints are the best by a rule. Pure: no clock, no disk, no catalog.

`decide` says it from everything that takes part; `admit` says the same from what was decided before
and one checkpoint more, so that a save costs what the places cost and not what the history costs:

    admit(decide(some, rule), one, rule) == decide([*some, one], rule)      or None: decide again

Who takes part: what is verified, was saved with update_best, and has a finite value of every metric
of the rule. A missing metric is not comparable; NaN and the infinities are never the best. Of equal
ones the earlier stays. No order of arrival matters, only the order of training (`age`).

Two kinds of rules go on counting what was retired (`rule.remembers`), because dropping a loser must
not move a place: with min_delta a retired one remains the bar that others had to pass, in a Pareto
set of k places it still beats what it beat. Should none of the winners by such a rule be there any
more, what is there is compared as if nothing else had ever been.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptd.bestrule import BestRule
from ckptd.model import Checkpoint, State

Vector = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Contender:
    """What a rule sees of a checkpoint."""

    id: str
    sequence: int
    age: tuple[int, ...]  # the order of training; unique
    vector: Vector  # what is compared: lower is better everywhere
    value: float  # what people are shown
    present: bool = True  # False: retired, but remembered
    experiment_no: int = 0  # where it lies


@dataclass(frozen=True, slots=True)
class Decision:
    """`places` are there, best first. `members` are what must be remembered beside them to admit one more."""

    places: tuple[Contender, ...]
    members: tuple[Contender, ...] = ()


@dataclass(frozen=True, slots=True)
class Winner:
    """A checkpoint and the value it won with."""

    checkpoint: Checkpoint
    value: float


def measure(rule: BestRule, metrics: Mapping[str, float]) -> tuple[Vector, float] | None:
    """Return what is compared and what is shown of one checkpoint's metrics; None when it can't be compared.

    A weighted sum is of value * weight / scale, negative where higher is better: scales are fixed by the
    rule, never taken from the other checkpoints, so that a sum stays what it is when others come and go.
    """
    values = [metrics.get(term.metric) for term in rule.criteria]
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    known = [(term, value) for term, value in zip(rule.criteria, values, strict=True) if value is not None]
    first = known[0][1]
    if rule.by == "weighted":
        total = math.fsum(term.sign * term.weight * (value / term.scale) for term, value in known)
        return ((total,), total) if math.isfinite(total) else None
    if rule.by != "lexicographic":
        return tuple(term.sign * value for term, value in known), first
    marks = [value / term.tolerance if term.tolerance else value for term, value in known]
    if not all(map(math.isfinite, marks)):
        return None
    read = (math.floor(mark) if term.tolerance else mark for (term, _), mark in zip(known, marks, strict=True))
    return tuple(term.sign * float(mark) for (term, _), mark in zip(known, read, strict=True)), first


def age(rule: BestRule, segment: int, step: int | None, revision: int, sequence: int) -> tuple[int, ...]:
    """Return where a checkpoint stands in the order of training.

    Within an experiment that is as for `latest`: execution, step, revision, arrival; no step comes before all
    steps. Among several experiments steps say nothing, and the arrival alone counts.
    """
    if rule.scope != "experiment":
        return (sequence,)
    return segment, -1 if step is None else step, revision, sequence


def contender(rule: BestRule, checkpoint: Checkpoint) -> Contender | None:
    """Return what the rule sees of a checkpoint; None when it takes no part."""
    found = measure(rule, checkpoint.metrics)
    retired = checkpoint.state in {State.TRASHED, State.DROPPED} and checkpoint.verified_at is not None
    unblemished = checkpoint.error is None and checkpoint.veto is None
    counts = checkpoint.is_good or (rule.remembers and retired and unblemished)
    if found is None or not counts or not checkpoint.update_best:
        return None
    vector, value = found
    when = age(rule, checkpoint.segment, checkpoint.step, checkpoint.revision, checkpoint.sequence)
    return Contender(checkpoint.id, checkpoint.sequence, when, vector, value, present=checkpoint.is_good)


def best(checkpoints: Iterable[Checkpoint], rule: BestRule) -> tuple[Winner, ...]:
    """Return the best of these checkpoints by one rule, best first."""
    given = {one.id: one for one in checkpoints}
    taking_part = [one for one in (contender(rule, checkpoint) for checkpoint in given.values()) if one is not None]
    return tuple(Winner(given[place.id], place.value) for place in decide(taking_part, rule).places)


def decide(contenders: Iterable[Contender], rule: BestRule) -> Decision:
    """Decide from everything that takes part, in whatever order it is given."""
    everyone = list(contenders)
    if rule.by == "pareto":
        return _pareto(everyone, rule)
    present = [one for one in everyone if one.present]
    if not rule.min_delta:
        return Decision(_top(present, rule.places))
    bars: list[Contender] = []
    for one in sorted(everyone, key=lambda one: one.age):
        if not bars or _passes(one, bars[-1], rule):
            bars.append(one)
    return _with_holder(bars, present, rule)


def admit(before: Decision, one: Contender, rule: BestRule) -> Decision | None:
    """Decide with one more that took no part before. None: only `decide` can say.

    What `before` holds must be as it was decided, apart from `present`, which may have become False.
    """
    if rule.by == "pareto":
        return _admit_to_front(before, one, rule)
    if not rule.min_delta:
        return Decision(_top([*before.places, one], rule.places)) if one.present else before
    earlier = [bar for bar in before.members if bar.age < one.age]
    present = [*before.places, one] if one.present else list(before.places)
    if earlier and not _passes(one, earlier[-1], rule):
        return _with_holder(before.members, present, rule)
    if len(earlier) < len(before.members):
        return None  # a new bar before others: those may not have passed it
    return _with_holder([*before.members, one], present, rule)


def _passes(one: Contender, bar: Contender, rule: BestRule) -> bool:
    return bar.vector[0] - one.vector[0] > rule.min_delta


def _with_holder(bars: Sequence[Contender], present: Sequence[Contender], rule: BestRule) -> Decision:
    """The last to pass all bars has the first place; the other places go by value alone."""
    holder = [one for one in present if bars and one.id == bars[-1].id]
    places = _top([one for one in present if one not in holder], rule.places)
    return Decision(tuple((*holder, *places)[: rule.places]), tuple(bars))


def _top(present: Iterable[Contender], places: int | None) -> tuple[Contender, ...]:
    return tuple(sorted(present, key=_rank)[:places])


def _rank(one: Contender) -> tuple[Vector, tuple[int, ...]]:
    return one.vector, one.age


# -- sets that nothing beats --------------------------------------------------------------------


def _pareto(everyone: Sequence[Contender], rule: BestRule) -> Decision:
    front = _front(everyone)
    places = [one for one in front if one.present] or _front([one for one in everyone if one.present])
    return _chosen(places, front, rule)


def _admit_to_front(before: Decision, one: Contender, rule: BestRule) -> Decision | None:
    front = before.members if rule.k is not None else before.places
    if any(_beats(other, one) for other in front):
        # Stand-ins for winners that are gone are no part of the front: this one may be one of them.
        return before if any(other.present for other in front) else None
    after = sorted((*(other for other in front if not _beats(one, other)), one), key=_rank)
    present = [other for other in after if other.present]
    return _chosen(present, after, rule) if present else None


def _beats(one: Contender, other: Contender) -> bool:
    """No worse in anything, and better in something or, all being equal, earlier."""
    if any(mine > others for mine, others in zip(one.vector, other.vector, strict=True)):
        return False
    return one.vector != other.vector or one.age < other.age


def _front(contenders: Iterable[Contender]) -> list[Contender]:
    """Return those that no other one beats, in order; whatever beats one comes before it in that order."""
    front: list[Contender] = []
    lowest = math.inf
    for one in sorted(contenders, key=_rank):
        if len(one.vector) == 2:  # noqa: PLR2004 - in a plane the last one found has the lowest second value
            if one.vector[1] < lowest:
                lowest = one.vector[1]
                front.append(one)
        elif not any(_beats(other, one) for other in front):
            front.append(one)
    return front


def _chosen(present: Sequence[Contender], front: Sequence[Contender], rule: BestRule) -> Decision:
    """Of more than k keep k spread out: first the best by the first metric, then whichever is farthest from those kept.

    Distances are in units of each term's scale. Leaving out what was not chosen changes no later choice; to
    take the most crowded away instead would.
    """
    if rule.k is None:
        return Decision(tuple(sorted(present, key=_rank)))
    left = {one.id: (one, _scaled(one, rule)) for one in sorted(present, key=_rank)}
    room = dict.fromkeys(left, math.inf)  # of each its distance to the nearest chosen one
    chosen: list[Contender] = []
    while left and len(chosen) < rule.k:
        farthest = max(room.values())
        taken, point = left.pop(next(key for key in left if room[key] == farthest))
        del room[taken.id]
        chosen.append(taken)
        for key, (_, other) in left.items():
            room[key] = min(room[key], math.dist(point, other))
    return Decision(tuple(chosen), tuple(sorted(front, key=_rank)))


def _scaled(one: Contender, rule: BestRule) -> Vector:
    return tuple(value / term.scale for value, term in zip(one.vector, rule.terms, strict=True))
