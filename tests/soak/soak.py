"""One soak: a crew keeps a node busy, faults come by a seeded schedule, and after each phase everything is looked at.

    warm-up, no faults          base of descriptors
    phase: load and faults      again and again until the time is over
    rest: nothing broken        every invariant, then a sample of the memory at rest
    end: every trainer ended    descriptors back to base

Late in a long run no fault ends a process of ckptd: what grows with a process's age shows only in one that lives.
A while of that goes at ten times the pace, with most of the storms, so that the most that ever happens at once has been;
then memory is judged.
"""

import contextlib
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import format_exception
from typing import Self

from ckptd.worker.examine import TIDY_S
from tests.soak.audit import audit
from tests.soak.crew import LEGACY, Legacy, Member, Part, Training
from tests.soak.faults import Stage, act, faults, schedule, storm
from tests.soak.ground import Ground
from tests.soak.ledger import Ledger
from tests.soak.meter import Meter, Sample
from tests.soak.run_daemon import GIVEN_BACK_S
from tests.support.node import NotAnswering
from tests.support.trainer import Nursery

REST_S = 180.0  # how long a member may take to come to rest: its saves have to arrive
PROGRESS_S = 10.0
LOOKS = 3  # at the memory of a node at rest, each after some was given back: the least of them is what it needs
SHOWN_MAX = 10  # violations of one rest
QUIET_S = 2 * TIDY_S + 5.0  # a parser ends when idle, and is buried at its worker's next look
DEADLY_SHARE = 0.25  # of a long run; then no process of ckptd is ended any more
FILLING_SHARE = 0.3  # of what comes then: caches fill, as fast as ten times the pace, or the machine, allows
STEADY_SHARE = 0.35  # likewise: now memory is judged; what each connection keeps of rare statements comes slowly
FILLING_PACE = 0.1  # else the most that ever happens at once, and with it the memory, still rises within the hour
# Likewise, in each phase of that while; in any other one or none comes. What is allocated beside two hundred
# connections comes to lie between what they leave.
FILLING_STORMS = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, how hard."""

    seconds: float
    seed: int
    phase_s: float = 40.0
    pause_s: float = 4.0  # between two faults, on average
    fault_s: float = 7.0  # the longest time that something stays broken
    warm_s: float = 15.0
    sample_s: float = 5.0
    restore_s: float = 30.0
    pace: float = 1.0  # 0.5: everybody saves twice as often
    lives_on: bool = False  # in the later part no process of ckptd is ended
    calm: bool = False  # no faults at all: what grows with the number of saves
    old_events: bool = True  # begin with a full event log


@dataclass
class Outcome:
    """What came of it."""

    plan: Plan
    took_s: float = 0.0
    saves: int = 0
    refused: int = 0
    of_unknown_fate: int = 0
    restores: int = 0
    files: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    nobody_there: int = 0
    phases: int = 0
    violations: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    at_rest: list[Sample] = field(default_factory=list)
    steady_from_s: float = 0.0  # samples before it are left out of the slope
    base: Sample | None = None
    end: Sample | None = None


class Soak:
    """with Soak(plan, say) as soak: outcome = soak.run()"""

    def __init__(self, plan: Plan, say: Callable[[str], None] = print) -> None:
        self.plan, self._say = plan, say
        self.outcome = Outcome(plan)
        self.ledger = Ledger()
        self._broken: set[str] = set()  # members that can't go on, each told of once
        self._stack = contextlib.ExitStack()
        self._began_s = self._said_s = time.monotonic()
        self._until_s = plan.seconds
        self._dice = random.Random(f"{plan.seed}/faults")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            directory = Path(tempfile.mkdtemp(prefix="ck"))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            self.ground = Ground(directory, arena_bytes=96 << 20)
            stack.callback(self.ground.give_back)
            self.ground.prepare()
            if self.plan.old_events:
                self.ground.fill_event_log()
            try:
                self.ground.start()
            except NotAnswering:
                self._say(self.ground.tail())
                raise
            added = self.ground.ask("root.add", path=str(self.ground.watched), kind="watched", project=LEGACY)
            assert added["ok"], added
            nurseries = {plain: stack.enter_context(Nursery(directory, plain=plain)) for plain in (False, True)}
            self.parts = self._cast()
            self.trainers = [Training(part, self.ground, nurseries[part.plain], self.ledger) for part in self.parts]
            dice = random.Random(f"{self.plan.seed}/legacy")
            self.legacy = Legacy(self.ground.watched, self.ledger, 1.5 * self.plan.pace, dice)
            self.meter = stack.enter_context(Meter(self._pids, self.plan.sample_s))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for member in self._members():
                member.rest()
            for member in self._members():
                if member.thread.is_alive():
                    member.end()
        finally:
            self._stack.close()

    def _cast(self) -> list[Part]:
        """About 120 saves a minute: with rules and without, large and small, on a disk that is soon full."""
        pace, restore_s, ground = self.plan.pace, self.plan.restore_s, self.ground
        return [
            Part("kept-torch", ground.runs, 96 << 10, 4.0 * pace, restore_s=restore_s),
            Part("last-large", ground.runs, 4 << 20, 3.0 * pace, restore_s=restore_s),
            Part("best-small", ground.runs, 64 << 10, 1.5 * pace, restore_s=restore_s),
            Part("last-plain", ground.runs, 32 << 10, 2.0 * pace, plain=True, restore_s=restore_s),
            Part("last-on-small-disk", ground.small, 512 << 10, 3.0 * pace, restore_s=restore_s),
        ]

    def _members(self) -> list[Member]:
        return [*self.trainers, self.legacy]

    def _pids(self) -> list[int]:
        supervisor = self.ground.supervisor
        return [] if supervisor is None else [supervisor.pid, *self.ground.family()]

    # -- the run ------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Go through the whole of it. Never raises for a violation: the outcome lists them."""
        plan, out = self.plan, self.outcome
        self._began_s = self.meter.began_s = time.monotonic()
        for member in self._members():
            member.thread.start()
        self._wait(plan.warm_s)
        self._wait_for_everybody()
        with self._at_rest():
            self._leave_all()
            self.ground.stir()
            out.base = self.meter.now()
        turn = schedule(self._harmless(faults(self.ground), late=False), self._dice)
        late = plan.seconds * DEADLY_SHARE if plan.lives_on else plan.seconds
        out.steady_from_s = plan.seconds * STEADY_SHARE if plan.calm else 0.0
        mild, filled_s = plan.calm, 0.0
        self._until_s = max(plan.seconds, self._passed_s() + plan.phase_s)  # on a busy machine one phase all the same
        while self._passed_s() < self._until_s:
            if not mild and self._passed_s() >= late:
                mild = True
                self.ground.stir()
                turn = schedule(self._harmless(faults(self.ground), late=True), self._dice)
                out.steady_from_s = self._passed_s() + (plan.seconds - late) * STEADY_SHARE
                filled_s = self._passed_s() + (plan.seconds - late) * FILLING_SHARE
            filling = plan.lives_on and mild and self._passed_s() < filled_s
            for member in self._members():
                member.pace = FILLING_PACE if filling else 1.0
            self._phase(turn, storms=FILLING_STORMS if filling else 0)
        with self._at_rest(for_good=True):
            self._leave_all()
            self.ground.stir()
            self.ground.idle(plan.phase_s)
            out.end = self._quiet(out.base)
        return self._sum_up()

    def _harmless(self, known: list, *, late: bool) -> list:
        return [fault for fault in known if not (late and fault.ends_processes)]

    def _phase(self, turn: Iterator, *, storms: int) -> None:
        """A while of load and faults, so many storms before them, then a rest in which everything must be right."""
        end_s = self._passed_s() + self.plan.phase_s
        stage = Stage(self.ground, self.trainers, self._dice, self.plan.fault_s)
        for _ in range(storms):
            storm(stage)
        while (left_s := min(end_s, self._until_s) - self._passed_s()) > 0:
            if self.plan.calm:
                self._wait(left_s)
                continue
            self._wait(self._dice.uniform(0.2, 1.8) * self.plan.pause_s)
            fault = next(turn)
            if act(fault, stage):
                self.outcome.faults[fault.name] = self.outcome.faults.get(fault.name, 0) + 1
            else:
                self.outcome.nobody_there += 1
        with self._at_rest():
            looks = LOOKS if self.plan.lives_on or self.plan.calm else 1
            self.outcome.at_rest.append(min((self._look() for _ in range(looks)), key=lambda one: one.lasting_bytes))
        self.outcome.phases += 1

    def _look(self) -> Sample:
        time.sleep(GIVEN_BACK_S if self.plan.lives_on or self.plan.calm else 0.0)
        return replace(self.meter.now(), **self.ground.in_use())

    @contextmanager
    def _at_rest(self, *, for_good: bool = False) -> Iterator[None]:
        """Everybody rests, everything is looked at; then the load goes on, unless it was the last time."""
        for member in self._members():
            member.rest()
        for member in self._members():
            while not member.resting(1.0):
                self._tell()
                assert member.thread.is_alive(), f"{member.name} ended"
        found = audit(self.ground, self.ledger, self.parts)
        for member in self._members():
            if member.broke is not None and member.name not in self._broken:
                self._broken.add(member.name)
                found.append(f"{member.name} broke: {''.join(format_exception(member.broke))}")
        for each in found[:SHOWN_MAX]:
            self._say(f"VIOLATION {each[:2000]}")
        self.outcome.violations += found
        yield
        for member in () if for_good else self._members():
            member.go_on()

    def _quiet(self, base: Sample) -> Sample:
        """Look once what is kept for a next question has ended: a parser holds three descriptors of its worker's."""
        until_s = time.monotonic() + QUIET_S
        while (now := self.meter.now()).descriptors > base.descriptors and time.monotonic() < until_s:
            time.sleep(1.0)
        return now

    def _leave_all(self) -> None:
        for trainer in self.trainers:
            trainer.quit()
        self.ground.idle(self.plan.phase_s)

    # -- what is said -------------------------------------------------------------------------

    def _passed_s(self) -> float:
        return time.monotonic() - self._began_s

    def _wait(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 1.0))
            self._tell()

    def _wait_for_everybody(self) -> None:
        """Until each has saved once: a worker is started by the first who needs it, and belongs to the base."""
        end_s = time.monotonic() + REST_S
        while not all((*(any(self.ledger.of(part.name)) for part in self.parts), self.ledger.files)):
            assert time.monotonic() < end_s, "not everybody has saved"
            self._wait(1.0)

    def _tell(self) -> None:
        if time.monotonic() - self._said_s < PROGRESS_S:
            return
        self._said_s = time.monotonic()
        saves, refused, _ = self.ledger.counts()
        now = self.meter.samples[-1] if self.meter.samples else self.meter.now()
        self._say(
            f"{self._passed_s() / 60:6.1f} min  saves {saves} (refused {refused})  files {len(self.ledger.files)}  "
            f"restores {self.ledger.restores}  faults {sum(self.outcome.faults.values())}  "
            f"violations {len(self.outcome.violations)}  RSS {now.rss_bytes >> 20} MiB  descriptors {now.descriptors}"
        )

    def _sum_up(self) -> Outcome:
        out = self.outcome
        out.saves, out.refused, out.of_unknown_fate = self.ledger.counts()
        out.restores, out.files = self.ledger.restores, sum(self.ledger.files.values())
        out.samples, out.took_s = list(self.meter.samples), self._passed_s()
        return out
