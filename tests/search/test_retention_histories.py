"""Random histories of an experiment, with everything that may come between two plans. The promises are checked in words
of their own, by bookkeeping beside the code: what was held, what was newest, what was best, at the time of each plan.
"""

import math
import random
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ckptd.model import Checkpoint, Level, State
from ckptd.retention import Given, Plan, brake, digest, plan
from ckptd.rules import Rules
from tests.support import tally
from tests.support.saved import a_save

SHORT, LONG, CHUNK = 300, 100_000, 5_000
BEGIN = datetime(2030, 1, 1, tzinfo=UTC)
TAGS = ("paper", "release")
CHANCES = {
    "save": 12, "measure": 4, "verify": 3, "damage": 1, "lose": 1, "pin": 2, "unpin": 2, "lease": 2, "expire": 2,
    "tag": 1, "object": 1, "jump": 2, "resume": 1, "restart": 2, "plan": 4, "by_itself": 4,
}  # fmt: skip


def some_rules(dice: random.Random) -> Rules:
    """Any union of keeps, with or without budgets."""
    best = [
        {"metric": metric, "mode": dice.choice(["min", "max"]), "k": dice.randint(1, 3)}
        for metric in ("loss", "acc")
        if dice.random() < 0.4
    ]
    said: dict[str, Any] = {"keep_best": best}
    numbers = {
        "keep_last": 5, "keep_hourly": 4, "keep_daily": 4, "keep_weekly": 3, "keep_monthly": 2, "keep_hashes": 3,
        "strip_after": 3,
    }  # fmt: skip
    said |= {name: dice.randint(1, most) for name, most in numbers.items() if dice.random() < 0.25}
    if dice.random() < 0.3:
        every = {"steps": dice.randint(1, 9), "epochs": 1, "time_s": dice.choice([600, 7200])}
        said["keep_every"] = dict(dice.sample(sorted(every.items()), dice.randint(1, 3)))
    if dice.random() < 0.2:
        said["keep_within"] = dice.choice(["30m", "6h", "2d"])
    if dice.random() < 0.2:
        said["keep_tags"] = list(TAGS)
    if dice.random() < 0.2:
        said["bytes_max"] = dice.randint(0, 200)
    if best and dice.random() < 0.3:
        said |= {"keep_total": dice.randint(1, 5), "keep_unmeasured": dice.random() < 0.5}
    said |= {
        "drop": dice.choice(["at_once", "at_once", "on_pressure"]),
        "time_zone": dice.choice(["UTC", "Asia/Tokyo"]),
    }
    said |= {"brake_share": dice.choice([0, 0.2, 0.5, 1]), "brake_count_min": dice.choice([0, 1, 3, 20])}
    return Rules(**said)


@dataclass
class History:
    """One experiment as it goes. `log` is for whoever reads a failure."""

    dice: random.Random
    rules: Rules
    here: dict[str, Checkpoint] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    leased: set[str] = field(default_factory=set)
    objected: set[str] = field(default_factory=set)
    stripped: set[str] = field(default_factory=set)
    now: datetime = BEGIN
    step: int = 0
    segment: int = 1
    made: int = 0
    log: list[str] = field(default_factory=list)

    def some(self) -> Checkpoint | None:
        return self.here[self.dice.choice(sorted(self.here))] if self.here else None

    def put(self, one: Checkpoint, **changed: Any) -> None:
        self.here[one.id] = replace(one, **changed)

    def save(self) -> None:
        self.made += 1
        self.step += self.dice.randint(1, 3)
        self.now += timedelta(minutes=self.dice.choice([1, 20, 300]))
        metrics = {} if self.dice.random() < 0.4 else {"loss": self.value()}
        one = a_save(
            None if self.dice.random() < 0.05 else self.step,
            id=f"{self.made:032x}",
            sequence=self.made,
            segment=self.segment,
            epoch=self.step / 4,
            size_bytes=self.dice.randint(1, 20),
            created_at=self.now,
            level=self.dice.choice([Level.VERIFIED, Level.VERIFIED, Level.VERIFIED, Level.DURABLE, Level.STAGED]),
            metrics=metrics,
            update_best=self.dice.random() < 0.9,
        )
        self.here[one.id] = replace(one, state=State.PENDING) if one.level is Level.STAGED else one

    def value(self) -> float:
        return self.dice.choice([math.nan, math.inf, 0.5, 0.5, self.dice.random(), -self.dice.random()])

    def measure(self) -> None:
        if one := self.some():
            self.put(one, metrics={**one.metrics, self.dice.choice(["loss", "acc"]): self.value()})

    def verify(self) -> None:
        if one := self.some():
            self.put(one, state=State.LIVE, level=Level.VERIFIED)

    def damage(self) -> None:
        if one := self.some():
            self.put(one, state=State.CORRUPT)

    def lose(self) -> None:
        if one := self.some():
            del self.here[one.id]

    def pin(self) -> None:
        if one := self.some():
            self.pinned.add(one.id)

    def unpin(self) -> None:
        if self.pinned:
            self.pinned.discard(self.dice.choice(sorted(self.pinned)))

    def lease(self) -> None:
        if one := self.some():
            self.leased.add(one.id)

    def expire(self) -> None:
        self.leased.clear()

    def tag(self) -> None:
        if one := self.some():
            self.put(one, tags=(self.dice.choice([*TAGS, "other"]),))

    def object(self) -> None:
        """A hook that vetoes: what it objects to stays, as by any hold."""
        if one := self.some():
            self.objected.add(one.id)

    def jump(self) -> None:
        self.now += timedelta(days=self.dice.choice([-40, -1, -0.05, 0.05, 1, 400]))

    def resume(self) -> None:
        self.segment += 1
        self.step = max(0, self.step - self.dice.randint(0, 10))

    def restart(self) -> None:
        """Nothing but what the catalog knows is left; its rows come in any order."""
        assert self.decided(shuffled=True) == self.decided()

    # -- deciding ----------------------------------------------------------------------------

    def holds(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for word, ids in (("pin", self.pinned), ("lease", self.leased), ("hook", self.objected)):
            for one in ids:
                found.setdefault(one, []).append(word)
        return found

    def decided(self, *, shuffled: bool = False) -> Plan:
        rows = list(self.here.values())
        if shuffled:
            self.dice.shuffle(rows)
        runs = {number: f"config {number % 3}" for number in range(1, self.segment + 1)}
        strippable = self.here.keys() - self.stripped
        given = Given(now=self.now, holds=self.holds(), configurations=runs, strippable=strippable)
        return plan(rows, self.rules, given)

    def plan(self) -> None:
        """A person looks; the daemon does it; it is done."""
        seen = self.decided()
        done = self.decided(shuffled=True)
        assert (seen, digest([seen])) == (done, digest([done])), "dry run equals execution"
        self.check(done)
        self.carry_out(done)

    def by_itself(self) -> None:
        """The daemon plans after a save: it carries all of it out, or nothing, and a person may still."""
        done = self.decided()
        self.check(done)
        live = sum(one.state is State.LIVE for one in self.here.values())
        spared = max(self.rules.brake_count_min, self.rules.brake_share * live)
        if brake(done, self.rules) is None:
            assert len(done.drop) <= spared >= len(done.strip), "nobody asked for so much"
            self.carry_out(done)
            return
        assert len(done.drop) > spared or len(done.strip) > spared, "a few at a time need nobody"
        assert brake(self.decided(shuffled=True), self.rules) == brake(done, self.rules), "and so says the next one"
        if self.dice.random() < 0.5:
            self.plan()

    def carry_out(self, done: Plan) -> None:
        for each in done.drop:
            del self.here[each.checkpoint.id]
        self.stripped |= {one.id for one in done.strip}
        again = self.decided()
        assert (again.drop, again.strip) == ((), ()), "to apply it twice is to apply it once"
        assert brake(again, self.rules) is None, "and nothing is held any more"

    def check(self, done: Plan) -> None:
        goes = {each.checkpoint.id for each in done.drop}
        touched = goes | {one.id for one in done.strip}
        held = self.pinned | self.leased | self.objected
        assert not touched & held
        good = [one for one in self.here.values() if one.state is State.LIVE and one.level is Level.VERIFIED]
        assert goes <= {one.id for one in good}
        if good:
            newest = max(good, key=lambda one: (one.segment, -1 if one.step is None else one.step, one.sequence))
            assert newest.id not in touched
        for rule in self.rules.keep_best:
            values = [
                one.metrics[rule.metric]
                for one in good
                if one.update_best and math.isfinite(one.metrics.get(rule.metric, math.nan))
            ]
            if values:
                edge = min(values) if rule.mode == "min" else max(values)
                winners = {one.id for one in good if one.update_best and one.metrics.get(rule.metric) == edge}
                assert winners - touched, "one of the best is there, with its optimizer"
        assert all(one.created_at <= self.now for each in done.drop for one in [each.checkpoint])
        if not self.rules.keeps and not self.rules.bytes_max:
            assert not goes, "without rules nothing is ever deleted"
        if self.rules.drop == "on_pressure" and not self.rules.bytes_max:
            assert not goes
        if self.rules.keep_tags:
            assert not goes & {one.id for one in good if set(one.tags) & set(TAGS)}
        if self.rules.keep_last:
            order = sorted(good, key=lambda one: (one.segment, -1 if one.step is None else one.step, one.sequence))
            assert not goes & {one.id for one in order[-self.rules.keep_last :]}


def live(seed: int) -> History:
    """One history. Equal seeds are equal histories."""
    dice = random.Random(seed)
    history = History(dice, some_rules(dice))
    for act in dice.choices(list(CHANCES), list(CHANCES.values()), k=dice.randint(5, 40)):
        history.log.append(act)
        getattr(history, act)()
    history.plan()
    return history


def lived(first: int, count: int) -> None:
    for seed in range(first, first + count):
        try:
            live(seed)
        except AssertionError as error:
            tally.add("violations")
            raise AssertionError(f"history {seed}: {error}") from error
    tally.add("retention histories", count)


def test_no_plan_drops_what_a_promise_holds_in_any_history() -> None:
    """M093 to M096, M100: a few hundred histories."""
    lived(0, SHORT)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first", range(SHORT, SHORT + LONG, CHUNK))
def test_no_plan_drops_what_a_promise_holds_in_a_hundred_thousand_histories(first: int) -> None:
    """M093 to M096, M100."""
    lived(first, CHUNK)
