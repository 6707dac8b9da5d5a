"""The decision for one experiment: what stays and why, what goes and why, what is stripped."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ckptd.errors import Bug
from ckptd.model import Checkpoint, State
from ckptd.retention.age import is_future, newest, newness
from ckptd.retention.shed import Spare, on_disk, shed
from ckptd.retention.vote import newest_reason, votes, winners
from ckptd.rules import Rules

DIGEST_DIGITS = 16
NOTHING_ASKS = "nothing needs its room"
NO_RULE = "no rule is set"
FUTURE = "saved in the future: a clock is wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What is known beside the checkpoints and the rules.

    now             aware UTC; what was saved after it stays
    holds           checkpoint id -> reasons from outside: "pin of uid 1000", "lease of pid 7", "parent of ..."
    configurations  segment -> digest of the configuration that it was run with
    tags            the experiment's own
    strippable      ids that have files which strip_files means
    """

    now: datetime
    holds: Mapping[str, Sequence[str]] = field(default_factory=dict)
    configurations: Mapping[int, str] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    strippable: Collection[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that stays, and every reason for it. `spare`: no rule and no promise is among them."""

    checkpoint: Checkpoint
    why: tuple[str, ...]
    spare: bool = False


@dataclass(frozen=True, slots=True)
class Dropped:
    """A checkpoint that goes, and why nothing holds it."""

    checkpoint: Checkpoint
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`keep` and `drop` hold every input exactly once, newest first; `strip` is a part of `keep`."""

    keep: tuple[Kept, ...]
    drop: tuple[Dropped, ...]
    strip: tuple[Checkpoint, ...] = ()


def plan(checkpoints: Sequence[Checkpoint], rules: Rules, given: Given) -> Plan:
    """Decide which checkpoints of ONE experiment stay.

    checkpoints  any states, any order; newest is by `newness`, never by a clock

    Holds for every input, and is checked before returning (Bug):
      R1  the newest verified checkpoint is in `keep`, and so is the best by every rule
      R2  nothing with a hold is in `drop`, nor in `strip`
      R3  only live, verified checkpoints are in `drop`, and only they use up a rule's count
      R4  plan(kept).drop is empty: applying a plan twice is applying it once

    ValueError  `now` is naive

    Source: reasons beside each kept item, and the refusal to drop the last one, after restic's forget.
    """
    if given.now.tzinfo is None:
        raise ValueError("now must be timezone-aware")
    decided = _decide(checkpoints, rules, given)
    _check(decided, checkpoints, rules, given)
    return decided


def digest(plans: Iterable[Plan]) -> str:
    """Return a name for what plans would do: equal when they drop and strip the same checkpoints."""
    done = [f"drop {one.checkpoint.id}" for plan in plans for one in plan.drop]
    done += [f"strip {one.id}" for plan in plans for one in plan.strip]
    return hashlib.sha256("\n".join(sorted(done)).encode()).hexdigest()[:DIGEST_DIGITS]


def reasons(checkpoints: Sequence[Checkpoint], rules: Rules, given: Given) -> dict[str, list[str]]:
    """Return for every id why it stays whoever wants its room; an empty list: nothing holds it."""
    good = sorted((one for one in checkpoints if one.is_good), key=newness, reverse=True)
    why: dict[str, list[str]] = {one.id: [*given.holds.get(one.id, ())] for one in checkpoints}
    for one in checkpoints:
        if not one.is_good:
            why[one.id].append(_not_ours_to_judge(one))
        elif is_future(one, given.now):
            why[one.id].append(FUTURE)
    for checkpoint_id, reason in newest_reason(good).items():
        why[checkpoint_id].append(reason)
    for vote in votes(good, rules, given):
        for checkpoint_id, reason in vote.keeps.items():
            if reason not in why[checkpoint_id]:  # the best of a rule is a hold as well
                why[checkpoint_id].append(reason)
    return why


def _decide(checkpoints: Sequence[Checkpoint], rules: Rules, given: Given) -> Plan:
    ordered = sorted(checkpoints, key=newness, reverse=True)
    why = reasons(ordered, rules, given)
    held = {one.id for one in ordered if why[one.id]}
    goes: dict[str, str] = {}
    if rules.keeps and rules.drop == "at_once":
        goes = {one.id: f"no rule keeps step {one.step}" for one in ordered if one.id not in held}
    if rules.bytes_max:
        left = [one for one in ordered if one.id not in goes]
        spare = [Spare(one) for one in left if one.id not in held]
        excess = sum(on_disk(one) for one in left) - rules.bytes_max
        words = f"over the experiment's budget of {rules.bytes_max} bytes, and nothing holds it"
        goes |= {one.checkpoint.id: words for one in shed(spare, excess)}
    idle = NOTHING_ASKS if rules.keeps or rules.bytes_max else NO_RULE
    keep = tuple(
        Kept(one, tuple(why[one.id]) or (idle,), spare=one.id not in held) for one in ordered if one.id not in goes
    )
    drop = tuple(Dropped(one, goes[one.id]) for one in ordered if one.id in goes)
    return Plan(keep, drop, _to_strip(keep, rules, given))


def _to_strip(keep: Sequence[Kept], rules: Rules, given: Given) -> tuple[Checkpoint, ...]:
    """Take those that training would hardly go on from: not the newest N, not the newest or best, none that is held."""
    if rules.strip_after is None:
        return ()
    good = [one.checkpoint for one in keep if one.checkpoint.is_good]
    won = {one.id for rule in rules.keep_best for one in winners(good, rule)}
    spared = won | {one.id for one in good[: rules.strip_after]}
    spared |= {one for one, why in given.holds.items() if why}
    return tuple(
        one for one in good if one.id in given.strippable and one.id not in spared and not is_future(one, given.now)
    )


def _not_ours_to_judge(checkpoint: Checkpoint) -> str:
    if checkpoint.is_whole:
        return f"a hook objects, and a person must look: {checkpoint.veto}"
    if checkpoint.state is State.LIVE:
        return "not verified yet"
    return {State.PENDING: "on its way", State.CORRUPT: "corrupt: kept as evidence and for repair"}.get(
        checkpoint.state, f"nothing to remove: {checkpoint.state}"
    )


def _check(decided: Plan, checkpoints: Sequence[Checkpoint], rules: Rules, given: Given) -> None:
    dropped = {one.checkpoint.id for one in decided.drop}
    stripped = {one.id for one in decided.strip}
    kept = [one.checkpoint for one in decided.keep]
    good = [one for one in checkpoints if one.is_good]
    held = {one for one, why in given.holds.items() if why}
    promised = {one.id for rule in rules.keep_best for one in winners(good, rule)}
    if good:
        promised.add(newest(good).id)
    broken = [
        name
        for name, holds_true in (
            ("every input once", sorted(dropped | {one.id for one in kept}) == sorted(one.id for one in checkpoints)),
            ("R1", not promised & (dropped | stripped)),
            ("R2", not held & (dropped | stripped)),
            ("R3", all(one.checkpoint.is_good for one in decided.drop)),
            ("R4", not _decide(kept, rules, given).drop),
        )
        if not holds_true
    ]
    if broken:
        raise Bug(f"the retention plan breaks {', '.join(broken)}; nothing is deleted")
