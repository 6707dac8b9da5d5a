"""Each rule names what it keeps. Rules know nothing of one another: together they are a union.

`good` is newest first and holds only what is live and verified: nothing else uses up a rule's count.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from typing import Protocol
from zoneinfo import ZoneInfo

from ckptd.best import best
from ckptd.bestrule import BestRule
from ckptd.model import Checkpoint
from ckptd.retention.age import by_clock, newest
from ckptd.rules import LADDER, UNLIMITED, Every, Rules

EPOCH_SLACK = 1e-6  # of an epoch: trainers count them as floats, 2.9999999 is the third


class Known(Protocol):
    """What rules look at beside the checkpoints; decide.Given has it."""

    @property
    def now(self) -> datetime:
        """Aware time of the decision."""

    @property
    def configurations(self) -> Mapping[int, str]:
        """Segment -> digest of the configuration that it was run with."""

    @property
    def tags(self) -> frozenset[str]:
        """The experiment's own tags."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One rule, in words, and what it keeps: id -> reason."""

    rule: str
    words: str
    keeps: Mapping[str, str]


def votes(good: Sequence[Checkpoint], rules: Rules, known: Known) -> Iterator[Vote]:
    """Yield the vote of every rule that is set."""
    if rules.keep_last is not None:
        words = f"last {rules.keep_last}"
        yield Vote("keep_last", words, {one.id: words for one in good[: rules.keep_last]})
    yield from _of_metrics(good, rules)
    if rules.keep_every is not None:
        yield from _every(good, rules.keep_every, known.now)
    if rules.keep_steps:
        wanted = frozenset(rules.keep_steps)
        keeps = {one.id: f"step {one.step}" for one in good if one.step in wanted}
        yield Vote("keep_steps", f"steps {', '.join(map(str, rules.keep_steps))}", keeps)
    yield from _by_time(good, rules, known.now)
    if rules.keep_tags:
        yield _tagged(good, rules.keep_tags, known.tags)
    if rules.keep_hashes is not None:
        yield _configurations(good, rules.keep_hashes, known.configurations)


def winners(good: Sequence[Checkpoint], rule: BestRule) -> list[Checkpoint]:
    """Return the best by a rule that these checkpoints alone decide; none for one that looks at others as well.

    A rule that remembers what was retired, or looks at several experiments, is decided where those are known:
    its winners come as holds.
    """
    if rule.remembers or rule.scope != "experiment":
        return []
    return [winner.checkpoint for winner in best(good, rule)]


def _of_metrics(good: Sequence[Checkpoint], rules: Rules) -> Iterator[Vote]:
    won: dict[str, None] = {}
    for rule in rules.keep_best:
        places = [one.id for one in winners(good, rule)]
        won |= dict.fromkeys(places)
        ranked = {
            one: f"best:{rule.name}" + (f" #{rank}" if rank > 1 else "") for rank, one in enumerate(places, start=1)
        }
        yield Vote("keep_best", str(rule), ranked)
    if rules.keep_total is not None and good:
        words = f"best and last, {rules.keep_total} together"
        together = {good[0].id: words} | dict.fromkeys(won, words)
        for one in good:
            if len(together) >= rules.keep_total:
                break
            together[one.id] = words
        yield Vote("keep_total", words, together)
    if rules.keep_unmeasured:
        metrics = {term.metric for rule in rules.keep_best for term in rule.criteria}
        keeps = {
            one.id: f"no {', no '.join(sorted(metrics - one.metrics.keys()))} yet"
            for one in good
            if metrics - one.metrics.keys()
        }
        yield Vote("keep_unmeasured", "not measured yet", keeps)


def _every(good: Sequence[Checkpoint], every: Every, now: datetime) -> Iterator[Vote]:
    if every.steps is not None:
        keeps = {one.id: f"every {every.steps}" for one in good if one.step is not None and one.step % every.steps == 0}
        yield Vote("keep_every", f"every {every.steps} steps", keeps)
    if every.epochs is not None:
        words = f"every {every.epochs} epochs"
        yield Vote("keep_every", words, {one.id: words for one in good if _ends_epoch(one.epoch, every.epochs)})
    if every.time_s is not None:
        words = f"every {every.time_s:g} s"
        keeps = {}
        due = None
        for one in reversed(by_clock(good, now)):
            if due is None or one.created_at >= due:
                keeps[one.id] = words
                due = one.created_at + timedelta(seconds=every.time_s)
        yield Vote("keep_every", words, keeps)


def _ends_epoch(epoch: float | None, every: int) -> bool:
    return epoch is not None and abs(epoch - every * round(epoch / every)) <= EPOCH_SLACK


def _by_time(good: Sequence[Checkpoint], rules: Rules, now: datetime) -> Iterator[Vote]:
    past = by_clock(good, now)
    if rules.keep_within is not None:
        words = f"within {rules.keep_within:g} s of the newest"
        since = past[0].created_at - timedelta(seconds=rules.keep_within) if past else now
        yield Vote("keep_within", words, {one.id: words for one in past if one.created_at >= since})
    zone = UTC if rules.time_zone == "UTC" else ZoneInfo(rules.time_zone)
    for name in LADDER:
        count = getattr(rules, name)
        if count is not None:
            word = name.removeprefix("keep_")
            words = f"{word} {'all' if count == UNLIMITED else count}"
            kept = _buckets(past, count, partial(_label, _BUCKET_OF[word], zone))
            yield Vote(name, words, {one.id: f"{word}: newest of {label}" for one, label in kept})


def _label(bucket: Callable[[datetime], str], zone: tzinfo, one: Checkpoint) -> str:
    return bucket(one.created_at.astimezone(zone))


def _buckets(
    past: Sequence[Checkpoint], count: int, label: Callable[[Checkpoint], str]
) -> Iterator[tuple[Checkpoint, str]]:
    """Yield the newest of each of the last `count` buckets that have any.

    Empty buckets are not counted. Where the history is shorter than what was asked for, its oldest is
    kept as well: it is what the next bucket would have held.

    Source: the calendar rules of restic's forget, as documented.
    """
    left, before = count, ""
    for one in past:
        here = label(one)
        if left == 0:
            return
        if here != before:
            yield one, here
            before = here
            left -= 1  # below 0 from the start where all are kept
        elif one is past[-1]:
            yield one, f"{here}, and the oldest there is"


# An hour that a clock shows twice, when summer time ends, is two hours: so its offset is a part of its name.
_BUCKET_OF: dict[str, Callable[[datetime], str]] = {
    "hourly": lambda at: f"{at:%Y-%m-%d %H}h{at:%z}",
    "daily": lambda at: f"{at:%Y-%m-%d}",
    "weekly": lambda at: "{}-W{:02}".format(*at.isocalendar()[:2]),
    "monthly": lambda at: f"{at:%Y-%m}",
    "yearly": lambda at: f"{at:%Y}",
}


def _tagged(good: Sequence[Checkpoint], wanted: Sequence[str], shared: frozenset[str]) -> Vote:
    keeps = {}
    for one in good:
        borne = sorted(set(wanted) & {*one.tags, *shared})
        if borne:
            keeps[one.id] = f"tag {', '.join(borne)}"
    return Vote("keep_tags", f"tags {', '.join(wanted)}", keeps)


def _configurations(good: Sequence[Checkpoint], count: int, known: Mapping[int, str]) -> Vote:
    """Keep all of the newest configurations; one that was returned to counts from its newest checkpoint."""
    chosen: dict[str, None] = {}
    keeps = {}
    for one in good:
        digest = configuration(one, known)
        if digest not in chosen and len(chosen) < count:
            chosen[digest] = None
        if digest in chosen:
            keeps[one.id] = f"configuration {digest[:12] or 'unknown'}"
    return Vote("keep_hashes", f"newest {count} configurations", keeps)


def configuration(one: Checkpoint, known: Mapping[int, str]) -> str:
    """Return the digest of what a checkpoint was trained with: its own word, else its execution's."""
    said = one.meta.get("experiment_hash")
    return said if isinstance(said, str) and said else known.get(one.segment, "")


def newest_reason(good: Sequence[Checkpoint]) -> dict[str, str]:
    """Return the promise that is no rule: the newest verified one stays."""
    return {newest(good).id: "newest verified"} if good else {}
