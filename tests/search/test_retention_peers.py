"""Our plans beside what restic and Orbax document, on the same histories.

The references below are written from the two projects' documentation, in plain code and with nothing of ours: restic's
"removing snapshots according to a policy", and Orbax's checkpoint preservation policies. What we keep beyond them is
what we promise (the newest verified, the best by a rule), and that alone.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from zoneinfo import ZoneInfo

import pytest

from ckptd.model import Checkpoint
from ckptd.retention import Given, plan
from ckptd.rules import Rules
from tests.support import tally
from tests.support.saved import a_save

HISTORIES, MANY = 150, 10_000
NOW = datetime(2031, 1, 1, tzinfo=UTC)


def saves(dice: random.Random) -> list[Checkpoint]:
    """A history in order: steps and times rise together, with pauses of all lengths."""
    found = []
    at = datetime(2029, 12, 1, tzinfo=UTC)
    step = 0
    for number in range(dice.randint(0, 40)):
        at += timedelta(minutes=dice.choice([1, 15, 45, 600, 3000, 20_000]) * dice.random())
        step += dice.randint(1, 20)
        metrics = {} if dice.random() < 0.3 else {"loss": round(dice.random(), 2)}
        tags = ("keep",) if dice.random() < 0.1 else ()
        one = a_save(step, id=f"{number:032x}", created_at=at, metrics=metrics, tags=tags, sequence=number)
        found.append(one)
    return found


def ours(found: Sequence[Checkpoint], rules: Rules) -> set[str]:
    mixed = list(found)
    random.Random(7).shuffle(mixed)
    return {one.checkpoint.id for one in plan(mixed, rules, Given(now=NOW)).keep}


# -- restic, as documented ------------------------------------------------------------------------


def hour(at: datetime) -> tuple[int, ...]:
    return at.year, at.month, at.day, at.hour


def day(at: datetime) -> tuple[int, ...]:
    return at.year, at.month, at.day


def week(at: datetime) -> tuple[int, ...]:
    monday = at.date() - timedelta(days=at.weekday())
    return monday.year, monday.month, monday.day


def month(at: datetime) -> tuple[int, ...]:
    return at.year, at.month


def year(at: datetime) -> tuple[int, ...]:
    return (at.year,)


PERIODS: dict[str, Callable[[datetime], tuple[int, ...]]] = {
    "hourly": hour, "daily": day, "weekly": week, "monthly": month, "yearly": year,
}  # fmt: skip


def forget(found: Sequence[Checkpoint], policy: dict[str, Any], zone: ZoneInfo) -> set[str]:
    """--keep-last n: the n most recent. --keep-hourly n (daily, ...): for the last n hours that have snapshots the most
    recent of each; when there is not enough history, the oldest is kept too. --keep-within d: all within d of the
    latest. --keep-tag: all that have it.
    """
    recent_first = sorted(found, key=lambda one: one.created_at, reverse=True)
    kept = {one.id for one in recent_first[: policy.get("last", 0)]}
    for period, label in PERIODS.items():
        wanted = policy.get(period, 0)
        most_recent: dict[tuple[int, ...], Checkpoint] = {}
        for one in recent_first:
            most_recent.setdefault(label(one.created_at.astimezone(zone)), one)
        kept |= {one.id for one in list(most_recent.values())[:wanted]}
        if recent_first and len(most_recent) < wanted:
            kept.add(recent_first[-1].id)
    if recent_first and "within" in policy:
        since = recent_first[0].created_at - policy["within"]
        kept |= {one.id for one in recent_first if one.created_at >= since}
    if policy.get("tag"):
        kept |= {one.id for one in recent_first if policy["tag"] in one.tags}
    return kept


def as_restic_does(first: int, count: int) -> None:
    for seed in range(first, first + count):
        dice = random.Random(seed)
        found = saves(dice)
        zone = dice.choice(["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns"])
        policy: dict[str, Any] = {name: dice.randint(1, 6) for name in (*PERIODS, "last") if dice.random() < 0.4}
        if dice.random() < 0.3:
            policy["within"] = timedelta(hours=dice.choice([1, 30, 500]))
        if dice.random() < 0.3:
            policy["tag"] = "keep"
        if not policy:
            policy["last"] = 1  # restic refuses an empty policy
        said: dict[str, Any] = {f"keep_{name}": policy[name] for name in (*PERIODS, "last") if name in policy}
        if "within" in policy:
            said["keep_within"] = policy["within"].total_seconds()
        if "tag" in policy:
            said["keep_tags"] = ["keep"]
        promised = {found[-1].id} if found else set()
        theirs = forget(found, policy, ZoneInfo(zone)) | promised
        assert ours(found, Rules(**said, time_zone=zone)) == theirs, f"history {seed}: {policy} in {zone}"
    tally.add("retention histories", count)


# -- Orbax, as documented -------------------------------------------------------------------------


class Policy(Protocol):
    """Which of a list of checkpoints, oldest first, are preserved."""

    def preserve(self, found: Sequence[Checkpoint]) -> set[str]: ...


@dataclass
class LatestN:
    """The n latest."""

    n: int

    def preserve(self, found: Sequence[Checkpoint]) -> set[str]:
        return {one.id for one in found[-self.n :]}


@dataclass
class EveryNSteps:
    """Steps that n divides."""

    n: int

    def preserve(self, found: Sequence[Checkpoint]) -> set[str]:
        return {one.id for one in found if one.step is not None and one.step % self.n == 0}


@dataclass
class EveryNSeconds:
    """The first, and each that is at least so much later than the one preserved before it."""

    seconds: float

    def preserve(self, found: Sequence[Checkpoint]) -> set[str]:
        kept: list[Checkpoint] = []
        for one in found:
            if not kept or (one.created_at - kept[-1].created_at).total_seconds() >= self.seconds:
                kept.append(one)
        return {one.id for one in kept}


@dataclass
class CustomSteps:
    """Steps by name."""

    steps: list[int]

    def preserve(self, found: Sequence[Checkpoint]) -> set[str]:
        return {one.id for one in found if one.step in self.steps}


@dataclass
class BestN:
    """The n best by a metric; what has none is preserved as well, unless told otherwise."""

    n: int
    mode: str
    keep_without: bool = True

    def preserve(self, found: Sequence[Checkpoint]) -> set[str]:
        measured = [one for one in found if "loss" in one.metrics]
        sign = 1 if self.mode == "min" else -1
        best = sorted(measured, key=lambda one: (sign * one.metrics["loss"], one.step or 0))[: self.n]
        rest = [one for one in found if "loss" not in one.metrics] if self.keep_without else []
        return {one.id for one in (*best, *rest)}


@dataclass
class AnyPreservationPolicy:
    """What any of them preserves."""

    policies: list[Policy]

    def preserve(self, found: Sequence[Checkpoint]) -> set[str]:
        return set().union(*(policy.preserve(found) for policy in self.policies))


def as_written(policy: Policy) -> dict[str, Any]:
    """A policy as it stands in a configuration."""
    if isinstance(policy, BestN):
        said: Any = {"n": policy.n, "metric": "loss", "mode": policy.mode}
        said["keep_checkpoints_without_metrics"] = policy.keep_without
        return {"BestN": said}
    (value,) = vars(policy).values()
    return {type(policy).__name__: value}


def as_orbax_does(first: int, count: int) -> None:
    for seed in range(first, first + count):
        dice = random.Random(seed)
        found = saves(dice)
        some: list[Policy] = [
            LatestN(dice.randint(1, 6)),
            EveryNSteps(dice.randint(1, 30)),
            EveryNSeconds(dice.choice([60, 3600, 86400])),
            CustomSteps([dice.randint(1, 200) for _ in range(3)]),
            BestN(dice.randint(1, 4), dice.choice(["min", "max"]), dice.random() < 0.5),
        ]
        chosen = dice.sample(some, dice.randint(1, len(some)))
        rules = Rules(preservation_policy={"AnyPreservationPolicy": [as_written(policy) for policy in chosen]})
        promised = {found[-1].id} if found else set()
        theirs = AnyPreservationPolicy(chosen).preserve(found) | promised
        assert ours(found, rules) == theirs, f"history {seed}: {chosen}"
    tally.add("retention histories", count)


@pytest.mark.parametrize("compared", [as_restic_does, as_orbax_does])
def test_we_keep_what_they_document_and_what_we_promise(compared: Callable[[int, int], None]) -> None:
    """M095."""
    compared(0, HISTORIES)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("compared", [as_restic_does, as_orbax_does])
def test_we_keep_what_they_document_in_many_histories(compared: Callable[[int, int], None]) -> None:
    """M095."""
    compared(HISTORIES, MANY)
