"""What to keep of an experiment, as written in the configuration: [retention] and [[experiments]]."""

import zoneinfo
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ckptd.bestrule import BestRule
from ckptd.dialects import translate
from ckptd.section import PositiveSpan, Section, Size, Span

UNLIMITED = -1
LADDER = ("keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly")


def _count(value: object) -> object:
    return UNLIMITED if value == "unlimited" else value


def _milestones(value: object) -> object:
    return {"steps": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Every(Section):
    """Milestones: multiples of a number of steps or epochs, or one in each span of time; several are a union."""

    steps: int | None = Field(None, ge=1, description="Checkpoints whose step is a multiple of this.")
    epochs: int | None = Field(None, ge=1, description="Checkpoints at the end of every so many epochs.")
    time_s: PositiveSpan | None = Field(
        None, description="The oldest, and from each that is kept so the first that is at least this much younger."
    )

    @model_validator(mode="after")
    def _says_something(self) -> "Every":
        if self.steps is None and self.epochs is None and self.time_s is None:
            message = "give steps, epochs or time_s"
            raise ValueError(message)
        return self


Count = Annotated[int, BeforeValidator(_count), Field(ge=UNLIMITED)]
Milestones = Annotated[Every, BeforeValidator(_milestones)]


class Rules(Section):
    """What to keep of one experiment. No rule at all: nothing is ever deleted."""

    keep_last: int | None = Field(None, ge=1, description="The newest N verified checkpoints.")
    keep_best: tuple[BestRule, ...] = Field((), description="The best K by a metric; several rules are a union.")
    keep_total: int | None = Field(
        None, ge=1, description="The best of each rule and the newest ones, N together; the newest in any case."
    )
    keep_unmeasured: bool = Field(
        False, description="Every checkpoint that has no value yet for the metric of a keep_best rule."
    )
    keep_every: Milestones | None = Field(
        None, description='Milestones: a number of steps, or { steps = 1000 }, { epochs = 1 }, { time_s = "6h" }.'
    )
    keep_steps: tuple[int, ...] = Field((), description="These steps.")
    keep_within: PositiveSpan | None = Field(
        None, description="Everything saved within this span before the newest verified checkpoint was."
    )
    keep_hourly: Count | None = Field(
        None, description="The newest of each of the last N hours that have any; -1: all."
    )
    keep_daily: Count | None = Field(None, description="Likewise of days, from 0:00 to 24:00 in time_zone.")
    keep_weekly: Count | None = Field(None, description="Likewise of weeks, which begin on Monday.")
    keep_monthly: Count | None = Field(None, description="Likewise of calendar months.")
    keep_yearly: Count | None = Field(None, description="Likewise of calendar years.")
    time_zone: str = Field("UTC", description="Where hours, days and weeks begin: an IANA name such as Europe/Berlin.")
    keep_tags: tuple[str, ...] = Field(
        (), description="Every checkpoint that bears one of these tags, or whose experiment does."
    )
    keep_hashes: int | None = Field(
        None, ge=1, description="Every checkpoint of the newest N configurations that the experiment was run with."
    )
    save_best: bool = Field(True, description="Off: keep_best keeps nothing, and there is no `best` link.")
    save_last: bool = Field(
        True, description="Off: keep_last keeps nothing, and there is no `latest` link; the newest verified one stays."
    )
    drop: Literal["at_once", "on_pressure"] = Field(
        "at_once",
        description="on_pressure: what no rule keeps stays until a budget or the free-space floor wants its room.",
    )
    bytes_max: Size = Field(
        0, description="Budget of the experiment: the oldest that nothing holds go until it fits. 0: none."
    )
    project_bytes_max: Size = Field(0, description="Budget of all experiments of its project together. 0: none.")
    strip_after: int | None = Field(
        None,
        ge=1,
        description="Optimizer states are taken out of all but the newest N checkpoints, where nothing holds them.",
    )
    strip_files: tuple[str, ...] = Field(
        ("optimizer*.safetensors", "optim*.safetensors"), description="Which files those are: shell patterns."
    )
    brake_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="A plan that nobody asked for is held when it drops, or strips, more than this share of the experiment's "
        "live checkpoints at once, and more than brake_count_min; then a person decides. 1: none is held.",
    )
    brake_count_min: int = Field(20, ge=0, description="A plan that drops no more than so many is never held.")
    trash_grace_s: Span = Field(86400.0, description="How long a retired checkpoint stays in the trash.")
    links: bool = Field(True, description="Keep the symlinks `latest` and `best` beside managed checkpoints.")

    @model_validator(mode="before")
    @classmethod
    def _in_our_words(cls, data: Any) -> Any:
        """Take other tools' names, a single keep_best table, and the switches at their word."""
        if not isinstance(data, dict):
            return data
        ours = translate(data).table
        if isinstance(ours.get("keep_best"), dict | BestRule):
            ours["keep_best"] = (ours["keep_best"],)
        if ours.get("save_best") is False:
            ours |= {"keep_best": (), "keep_unmeasured": False}
        if ours.get("save_last") is False:
            ours |= {"keep_last": None, "keep_total": None}
        return ours

    @model_validator(mode="after")
    def _make_sense(self) -> "Rules":
        for name in LADDER:
            if getattr(self, name) == 0:
                message = f"{name} = 0 keeps nothing: leave it out"
                raise ValueError(message)
        if (self.keep_total is not None or self.keep_unmeasured) and not self.keep_best and self.save_best:
            message = "keep_total and keep_unmeasured go with keep_best; without it keep_last says the same"
            raise ValueError(message)
        names = [rule.name for rule in self.keep_best]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            message = f"two keep_best rules are called {twice[0]!r}: give each a name of its own"
            raise ValueError(message)
        try:
            zoneinfo.ZoneInfo(self.time_zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
            message = f"time_zone {self.time_zone!r} is not known here: write an IANA name such as Europe/Berlin"
            raise ValueError(message) from error
        return self

    @property
    def keeps(self) -> bool:
        """Whether any rule says what to keep, so that what no rule keeps may go."""
        return any(True for _ in self.words())

    @property
    def deletes(self) -> bool:
        """Whether a save may make something go: by the rules at once, by the experiment's budget, or by a strip."""
        return (self.keeps and self.drop == "at_once") or self.bytes_max > 0 or self.strip_after is not None

    def words(self) -> Iterator[str]:
        """Say each rule that keeps something in words, as a plan's head shows them."""
        if self.keep_last is not None:
            yield f"last {self.keep_last}"
        for rule in self.keep_best:
            yield str(rule)
        if self.keep_total is not None:
            yield f"best and last, {self.keep_total} together"
        if self.keep_unmeasured:
            yield "not measured yet"
        if self.keep_every is not None:
            yield from every_words(self.keep_every)
        if self.keep_steps:
            yield f"steps {', '.join(map(str, self.keep_steps))}"
        yield from self._words_of_time()
        if self.keep_tags:
            yield f"tags {', '.join(self.keep_tags)}"
        if self.keep_hashes is not None:
            yield f"newest {self.keep_hashes} configurations"

    def _words_of_time(self) -> Iterator[str]:
        if self.keep_within is not None:
            yield f"within {self.keep_within:g} s of the newest"
        for name in LADDER:
            count = getattr(self, name)
            if count is not None:
                yield f"{name.removeprefix('keep_')} {'all' if count == UNLIMITED else count}"


def every_words(every: Every) -> Iterator[str]:
    """Say milestones in words."""
    if every.steps is not None:
        yield f"every {every.steps} steps"
    if every.epochs is not None:
        yield f"every {every.epochs} epochs"
    if every.time_s is not None:
        yield f"every {every.time_s:g} s"


class ExperimentRules(Rules):
    """Rules for the experiments that match; the first match in the file wins."""

    project: str = Field("*", description="Shell pattern for the project's name.")
    name: str = Field("*", description="Shell pattern for the experiment's name.")
