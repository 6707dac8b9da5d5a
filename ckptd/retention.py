"""What to keep of one experiment. Pure: no clock, no disk, no catalog.

Rules vote to keep, never to drop: a checkpoint goes only when some rule is set and none of them,
no promise and no hold keeps it. Promises come before rules and can't be configured away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from ckptd.best import best
from ckptd.config import Rules
from ckptd.errors import Bug
from ckptd.model import Checkpoint, State


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that stays, and every reason for it."""

    checkpoint: Checkpoint
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A checkpoint that goes, and why nothing holds it."""

    checkpoint: Checkpoint
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`keep` and `drop` hold every input exactly once, newest first."""

    keep: tuple[Kept, ...]
    drop: tuple[Dropped, ...]


def plan(checkpoints: Sequence[Checkpoint], rules: Rules, now: datetime, holds: Mapping[str, Sequence[str]]) -> Plan:
    """Decide which checkpoints of ONE experiment stay.

    checkpoints  any states, any order; newest is by `newness`, never by a clock
    holds        checkpoint id -> reasons from outside: "pin of uid 1000", "lease of pid 7", "parent of ..."
    now          aware UTC; rules by age measure from it

    Holds for every input, and is checked before returning (Bug):
      R1  the newest verified checkpoint is in `keep`, and so is the best by every rule
      R2  nothing with a hold is in `drop`
      R3  only live, verified checkpoints are in `drop`, and only they use up a rule's count
      R4  plan(kept).drop is empty: applying a plan twice is applying it once

    ValueError  `now` is naive

    Source: reasons beside each kept item, and the refusal to drop the last one, after restic's forget.
    """
    if now.tzinfo is None:
        raise ValueError("now must be timezone-aware")
    decided = _decide(checkpoints, rules, holds)
    _check(decided, checkpoints, rules, holds)
    return decided


def _decide(checkpoints: Sequence[Checkpoint], rules: Rules, holds: Mapping[str, Sequence[str]]) -> Plan:
    ordered = sorted(checkpoints, key=newness, reverse=True)
    good = [one for one in ordered if one.is_good]
    why: dict[str, list[str]] = {one.id: [*holds.get(one.id, ())] for one in ordered}
    for one in ordered:
        if not one.is_good:
            why[one.id].append(_not_ours_to_judge(one))
    if good:
        why[_newest(good).id].append("newest verified")
    _vote(good, rules, why)
    if not rules.deletes:
        for one in good:
            why[one.id].append("no rule is set")
    keep = tuple(Kept(one, tuple(why[one.id])) for one in ordered if why[one.id])
    drop = tuple(Dropped(one, f"no rule keeps step {one.step}") for one in ordered if not why[one.id])
    return Plan(keep, drop)


def _vote(good: Sequence[Checkpoint], rules: Rules, why: dict[str, list[str]]) -> None:
    """Let each rule name what it keeps; `good` is newest first."""
    if rules.keep_last is not None:
        for one in good[: rules.keep_last]:
            why[one.id].append(f"last {rules.keep_last}")
    for rule in rules.keep_best:
        for rank, winner in enumerate(best(good, rule), start=1):
            why[winner.checkpoint.id].append(f"best:{rule.metric}" + (f" #{rank}" if rule.k > 1 else ""))
    if rules.keep_every is not None:
        for one in good:
            if one.step is not None and one.step % rules.keep_every == 0:
                why[one.id].append(f"every {rules.keep_every}")


def newness(checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    """Return the sort key of training time: numbers, never text, never a clock.

    A later execution (segment) is newer whatever its steps: it went on from an earlier step because
    what came after that was abandoned. `latest` sorts the same way. No step comes before all steps.
    """
    step = -1 if checkpoint.step is None else checkpoint.step
    return checkpoint.segment, step, checkpoint.revision, checkpoint.sequence


def _newest(good: Sequence[Checkpoint]) -> Checkpoint:
    return max(good, key=newness)


def _not_ours_to_judge(checkpoint: Checkpoint) -> str:
    if checkpoint.state is State.LIVE:
        return "not verified yet"
    return {State.PENDING: "on its way", State.CORRUPT: "corrupt: kept as evidence and for repair"}.get(
        checkpoint.state, f"nothing to remove: {checkpoint.state}"
    )


def _check(decided: Plan, checkpoints: Sequence[Checkpoint], rules: Rules, holds: Mapping[str, Sequence[str]]) -> None:
    dropped = {one.checkpoint.id for one in decided.drop}
    kept = [one.checkpoint for one in decided.keep]
    good = [one for one in checkpoints if one.is_good]
    promised = {winner.checkpoint.id for rule in rules.keep_best for winner in best(good, rule)}
    if good:
        promised.add(_newest(good).id)
    broken = [
        name
        for name, holds_true in (
            ("every input once", sorted(dropped | {one.id for one in kept}) == sorted(one.id for one in checkpoints)),
            ("R1", not promised & dropped),
            ("R2", not dropped & {one for one, reasons in holds.items() if reasons}),
            ("R3", all(one.checkpoint.is_good for one in decided.drop)),
            ("R4", not _decide(kept, rules, holds).drop),
        )
        if not holds_true
    ]
    if broken:
        raise Bug(f"the retention plan breaks {', '.join(broken)}; nothing is deleted")
