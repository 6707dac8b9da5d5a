"""Why one checkpoint stays or goes: which rules looked at it, what each said, and what would change that."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from ckptd.errors import NotFound
from ckptd.model import Checkpoint, Level, State
from ckptd.retention.age import newest, newness
from ckptd.retention.decide import Dropped, Given, Kept, Plan, plan
from ckptd.retention.vote import Vote, votes
from ckptd.rules import LADDER, Rules

SAVES_AHEAD_MAX = 16  # further saves that are thought through


@dataclass(frozen=True, slots=True)
class Looked:
    """One rule's word: `keeps` with its reason, or why it does not."""

    rule: str
    words: str
    keeps: bool
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """verdict  "keep", "spare" (kept while nothing needs its room) or "drop", and its reasons
    strip    its optimizer states would be taken out
    looked   every rule that is set, in order
    changes  what would change the verdict, each as one sentence
    """

    checkpoint: Checkpoint
    verdict: str
    why: tuple[str, ...]
    strip: bool
    looked: tuple[Looked, ...]
    changes: tuple[str, ...]


def explain(checkpoints: Sequence[Checkpoint], rules: Rules, given: Given, checkpoint_id: str) -> Explanation:
    """Explain the plan's word on one of an experiment's checkpoints. NotFound when it is none of them."""
    one = next((one for one in checkpoints if one.id == checkpoint_id), None)
    if one is None:
        raise NotFound(f"checkpoint {checkpoint_id} is not on disk: retention has nothing to decide")
    decided = plan(checkpoints, rules, given)
    found = _of(decided, checkpoint_id)
    good = sorted((each for each in checkpoints if each.is_good), key=newness, reverse=True)
    looked = tuple(_looked(vote, one, good) for vote in votes(good, rules, given))
    why = found.why if isinstance(found, Kept) else (found.why,)
    return Explanation(
        one,
        _verdict(found),
        why,
        any(each.id == checkpoint_id for each in decided.strip),
        looked,
        tuple(_changes(checkpoints, rules, given, found)),
    )


def _of(decided: Plan, checkpoint_id: str) -> Kept | Dropped:
    found: tuple[Kept | Dropped, ...] = (*decided.keep, *decided.drop)
    return next(each for each in found if each.checkpoint.id == checkpoint_id)


def _verdict(found: Kept | Dropped) -> str:
    if isinstance(found, Dropped):
        return "drop"
    return "spare" if found.spare else "keep"


def _looked(vote: Vote, one: Checkpoint, good: Sequence[Checkpoint]) -> Looked:
    reason = vote.keeps.get(one.id)
    if reason is not None:
        return Looked(vote.rule, vote.words, keeps=True, why=reason)
    if not one.is_good:
        return Looked(vote.rule, vote.words, keeps=False, why="it counts verified checkpoints only")
    if vote.rule == "keep_last":
        return Looked(vote.rule, vote.words, keeps=False, why=f"it is number {good.index(one) + 1} from the newest")
    if vote.rule == "keep_best" and not one.update_best:
        return Looked(vote.rule, vote.words, keeps=False, why="it was saved with update_best = false")
    return Looked(vote.rule, vote.words, keeps=False, why="others are kept by it" if vote.keeps else "it keeps none")


def _changes(checkpoints: Sequence[Checkpoint], rules: Rules, given: Given, found: Kept | Dropped) -> Iterator[str]:
    """Yield what would turn the verdict: lifting a hold, leaving out a rule, or saving on."""
    one, now = found.checkpoint, _verdict(found)
    if not one.is_good:
        return

    def verdict(of: Sequence[Checkpoint] = checkpoints, by: Rules = rules, with_: Given = given) -> str:
        return _verdict(_of(plan(of, by, with_), one.id))

    held = given.holds.get(one.id, ())
    for reason in held:
        rest = [other for other in held if other != reason]
        then = verdict(with_=replace(given, holds={**given.holds, one.id: rest}))
        if then != now:
            yield f"without the {reason}: {then}"
    for name, without in _without(rules):
        then = verdict(by=without)
        if then != now:
            yield f"without {name}: {then}"
    if isinstance(found, Kept):
        saves = list(checkpoints)
        for number in range(1, SAVES_AHEAD_MAX + 1):
            saves.append(_next(saves, number))
            later = replace(given, now=max(given.now, saves[-1].created_at))
            if (then := verdict(saves, with_=later)) != now:
                yield f"after {number} more verified save{'s' if number > 1 else ''}: {then}"
                return
    else:
        yield f"a pin, or a tag of keep_tags, would keep it: ckpt pin {one.id[:12]}"


def _without(rules: Rules) -> Iterator[tuple[str, Rules]]:
    unset: dict[str, Any] = dict.fromkeys(
        ("keep_last", "keep_total", "keep_every", "keep_within", "keep_hashes", *LADDER)
    )
    unset |= {"keep_best": (), "keep_steps": (), "keep_tags": (), "keep_unmeasured": False, "bytes_max": 0}
    for name, nothing in unset.items():
        if getattr(rules, name) not in {None, nothing}:
            changed = {name: nothing} | ({"keep_total": None, "keep_unmeasured": False} if name == "keep_best" else {})
            yield name, rules.model_copy(update=changed)


def _next(saves: Sequence[Checkpoint], number: int) -> Checkpoint:
    """Imagine the next save: one step on, by the usual interval, unmeasured and untagged."""
    last = newest([one for one in saves if one.is_good])
    return replace(
        last,
        id=f"{number:032x}",
        state=State.LIVE,
        level=Level.VERIFIED,
        step=None if last.step is None else last.step + 1,
        created_at=last.created_at + timedelta(seconds=1),
        metrics={},
        tags=(),
        sequence=max(one.sequence for one in saves) + 1,
        size_bytes=last.size_bytes,
    )
