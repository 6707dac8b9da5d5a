"""What the daemon has seen since it started, in bounded memory: counts, and how long things took.

    in all            since the start
    by time           SLOTS of SLOT_S each, then HOURS: what `--since` adds up, to the minute and to the hour
    by experiment     the EXPERIMENTS_MAX that saved last

For the event loop's thread. Nothing here waits or reads a clock: who counts says when.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from ckptd.query.distribution import Distribution

SLOT_S = 60.0
SLOTS = 61  # the last hour, and the minute that it began in
HOUR_S = 3600.0
HOURS = 24  # a minute for each of them would be some MiB, which grew for a day
EXPERIMENTS_MAX = 256
STEPS_MIN = 2  # fewer do not say how long a step takes

# What is measured, and what it is.
MEASURES = {
    "stall": "save() in the training process, from its call to its return, as the client measured it",
    "durable": "from the hand-off until every byte was fsynced",
    "verified": "from the hand-off until it was read back and found equal",
    "write": "writing and fsyncing, in the I/O worker",
    "hash": "SHA-256 of the same bytes, beside it",
}


@dataclass(slots=True)
class Period:
    """What happened in some stretch of time."""

    counts: Counter[str] = field(default_factory=Counter)
    took: dict[str, Distribution] = field(default_factory=dict)

    def count(self, what: str, by: int = 1) -> None:
        """Count `by` more of something."""
        self.counts[what] += by

    def time(self, what: str, took_s: float) -> None:
        """Note how long one of MEASURES took."""
        if what not in self.took:
            self.took[what] = Distribution()
        self.took[what].add(took_s)

    def merge(self, other: "Period") -> None:
        """Add another stretch."""
        self.counts.update(other.counts)
        for what, distribution in other.took.items():
            self.took.setdefault(what, Distribution()).merge(distribution)


@dataclass(slots=True)
class Training:
    """One experiment as its steps and stalls show it, since its process opened it."""

    stalls: Distribution = field(default_factory=Distribution)
    first: tuple[int, float] | None = None  # step, monotonic time
    last: tuple[int, float] | None = None
    stalled_s: float = 0.0  # between the two

    def step(self, step: int, at_s: float) -> None:
        """Training has reached `step` at `at_s`; one that it has passed before says nothing new."""
        if self.first is None or self.last is None:
            self.first = self.last = (step, at_s)
        elif step > self.last[0]:
            self.last = (step, at_s)

    def restart(self) -> None:
        """Its process began anew: steps may come again."""
        self.first = self.last = None
        self.stalled_s = 0.0

    def stall(self, took_s: float) -> None:
        """A save held training up for this long."""
        self.stalls.add(took_s)
        if self.first is not None:
            self.stalled_s += took_s

    @property
    def step_s(self) -> float | None:
        """How long a step takes, stalls included; None while too few were seen."""
        if self.first is None or self.last is None or self.last[0] - self.first[0] < STEPS_MIN:
            return None
        return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0])

    @property
    def cost(self) -> float | None:
        """Saving as a share of training's time between its first and its last step, 0 to 1; None while unknown."""
        if self.step_s is None or self.first is None or self.last is None or self.last[1] <= self.first[1]:
            return None
        return min(self.stalled_s / (self.last[1] - self.first[1]), 1.0)


class Statistics:
    """Counts. `now_s` is monotonic time everywhere."""

    def __init__(self) -> None:
        """Nothing was seen."""
        self.total = Period()
        self._slots: OrderedDict[int, Period] = OrderedDict()
        self._hours: OrderedDict[int, Period] = OrderedDict()  # of slots that are over long since
        self._experiments: OrderedDict[str, Training] = OrderedDict()
        self.clients_rss_bytes: OrderedDict[str, int] = OrderedDict()

    def count(self, what: str, now_s: float, by: int = 1) -> None:
        """Count `by` more of something."""
        self.total.count(what, by)
        self._slot(now_s).count(what, by)

    def time(self, what: str, took_s: float, now_s: float) -> None:
        """Note how long one of MEASURES took, now."""
        self.total.time(what, took_s)
        self._slot(now_s).time(what, took_s)

    def stalled(self, experiment_id: str, took_s: float, now_s: float) -> None:
        """A save of this experiment held training up for so long."""
        self.time("stall", took_s, now_s)
        self._training(experiment_id).stall(took_s)

    def stepped(self, experiment_id: str, step: int, now_s: float) -> None:
        """An experiment has reached a step."""
        self._training(experiment_id).step(step, now_s)

    def restarted(self, experiment_id: str) -> None:
        """A process opened the experiment."""
        self._training(experiment_id).restart()

    def client(self, experiment_id: str, rss_bytes: int) -> None:
        """Remember the memory of an experiment's process."""
        self.clients_rss_bytes[experiment_id] = rss_bytes
        self.clients_rss_bytes.move_to_end(experiment_id)  # the one that said it last
        while len(self.clients_rss_bytes) > EXPERIMENTS_MAX:
            self.clients_rss_bytes.popitem(last=False)

    def since(self, from_s: float) -> Period:
        """Add up what ends after `from_s`: a minute that began before it counts whole, and so does an hour long ago."""
        found = Period()
        for periods, length_s in ((self._hours, HOUR_S), (self._slots, SLOT_S)):
            for number, period in periods.items():
                if (number + 1) * length_s > from_s:
                    found.merge(period)
        return found

    def of_experiment(self, experiment_id: str) -> Training | None:
        """What is known of one experiment; None when nothing is, or others were seen since."""
        return self._experiments.get(experiment_id)

    def _slot(self, now_s: float) -> Period:
        number = int(now_s // SLOT_S)
        if number not in self._slots:
            self._slots[number] = Period()
            while next(iter(self._slots)) <= number - SLOTS:
                self._age(*self._slots.popitem(last=False))
        return self._slots[number]

    def _age(self, number: int, slot: Period) -> None:
        hour = int(number * SLOT_S // HOUR_S)
        self._hours.setdefault(hour, Period()).merge(slot)
        while next(iter(self._hours)) < hour - HOURS:
            self._hours.popitem(last=False)

    def _training(self, experiment_id: str) -> Training:
        found = self._experiments.setdefault(experiment_id, Training())
        self._experiments.move_to_end(experiment_id)
        while len(self._experiments) > EXPERIMENTS_MAX:
            self._experiments.popitem(last=False)
        return found
