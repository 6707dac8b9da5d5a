"""What "the best checkpoint" means, as written in the configuration."""

import hashlib
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ckptd.section import Section

TERMS_MAX = 8  # metrics of one rule; more than a few make nearly every checkpoint non-dominated
PLACES_MAX = 1000  # of one rule; all of them are read when a save is decided

Finite = Annotated[float, Field(allow_inf_nan=False)]
Mode = Literal["min", "max"]


class Term(Section):
    """One metric of a rule that looks at several."""

    metric: str = Field(min_length=1, max_length=256, description="The metric's name.")
    mode: Mode = Field(description="Whether lower or higher is better; never guessed from the name.")
    weight: Finite = Field(1.0, gt=0, description='`by = "weighted"`: how much one unit of `scale` counts.')
    scale: Finite = Field(
        1.0, gt=0, description="Weighted and Pareto with `k`: a difference of this much of the metric is one unit."
    )
    tolerance: Finite = Field(
        0.0,
        ge=0,
        description='`by = "lexicographic"`: the metric is read off a ruler with marks this far apart, and equal '
        "readings are a tie. 0: only equal values are.",
    )

    @property
    def sign(self) -> float:
        """1 where lower is better, -1 where higher is: times this, lower is always better."""
        return 1.0 if self.mode == "min" else -1.0


_OF_TERMS: dict[str, frozenset[str]] = {
    "weighted": frozenset({"metric", "mode", "weight", "scale"}),
    "lexicographic": frozenset({"metric", "mode", "tolerance"}),
    "pareto": frozenset({"metric", "mode", "scale"}),
}


class BestRule(Section):
    """What is best, and how many of the best are kept: by one metric, or by several. Directions are never guessed."""

    name: str = Field(
        "",
        max_length=256,
        description="What `best:NAME`, the link `best_NAME` and reasons call it. Default: the metric; a rule by "
        "several metrics needs one.",
    )
    by: Literal["metric", "weighted", "lexicographic", "pareto"] = Field(
        "metric",
        description="One `metric`; or of several `terms` the lowest weighted sum, the first that differs, or all "
        "that no other one beats.",
    )
    metric: str = Field("", max_length=256, description='The metric, where `by = "metric"`.')
    mode: Mode | None = Field(None, description="Whether lower or higher is better; never guessed from the name.")
    terms: tuple[Term, ...] = Field((), max_length=TERMS_MAX, description="The metrics, where there are several.")
    min_delta: Finite = Field(
        0.0,
        ge=0,
        description="A later checkpoint must be better by more than this to take the first place: units of the "
        "metric, or of the weighted sum.",
    )
    scope: Literal["experiment", "tree", "project"] = Field(
        "experiment", description="Best of the experiment, of it and all that descend from it, or of its whole project."
    )
    k: int | None = Field(
        None, ge=1, le=PLACES_MAX, description="Places. Default: 1; of a Pareto set all, however many they are."
    )

    @model_validator(mode="before")
    @classmethod
    def _name(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name") and data.get("metric"):
            return {**data, "name": data["metric"]}
        return data

    @model_validator(mode="after")
    def _agrees(self) -> "BestRule":
        """Every key belongs to the kind of rule that uses it; what would be ignored is an error."""
        if self.by == "metric":
            self._check_one()
        else:
            self._check_several(self.by)
        return self

    def _check_one(self) -> None:
        if not self.metric:
            raise ValueError('a rule names its `metric`, or `by` and `terms`: metric = "val_loss", mode = "min"')
        if self.mode is None:
            raise ValueError(f'mode of {self.metric!r} is missing: "min" if lower is better, "max" if higher is')
        if self.terms:
            raise ValueError('`terms` needs by = "weighted", "lexicographic" or "pareto"')

    def _check_several(self, by: str) -> None:
        if self.metric or self.mode is not None:
            raise ValueError(f"by = {by!r} takes its metrics and their modes from `terms`")
        if not self.name:
            raise ValueError(f"a rule by = {by!r} needs a `name`")
        if len(self.terms) < 2:  # noqa: PLR2004 - of one metric it would be a rule by metric
            raise ValueError(f"by = {by!r} needs two `terms` or more")
        twice = sorted({term.metric for term in self.terms if [t.metric for t in self.terms].count(term.metric) > 1})
        if twice:
            raise ValueError(f"`terms` name {', '.join(twice)} twice")
        for term in self.terms:
            stray = sorted(term.model_fields_set - _OF_TERMS[by])
            if stray:
                raise ValueError(f"{stray[0]} of {term.metric!r} means nothing to by = {by!r}")
        if self.min_delta and by != "weighted":
            hint = "give its terms a tolerance" if by == "lexicographic" else "a set has no first place to defend"
            raise ValueError(f"min_delta means nothing to by = {by!r}: {hint}")

    @property
    def places(self) -> int | None:
        """How many places there are; None: as many as take part in a Pareto set."""
        return self.k if self.k is not None or self.by == "pareto" else 1

    @property
    def criteria(self) -> tuple[Term, ...]:
        """The metrics in their order, also where there is one."""
        return self.terms if self.mode is None else (Term(metric=self.metric, mode=self.mode),)

    @property
    def remembers(self) -> bool:
        """Whether what was retired still counts for what comes later: its dropping must not move a place."""
        return self.min_delta > 0 or (self.by == "pareto" and self.k is not None)

    @property
    def digest(self) -> str:
        """32 hex digits that are others when the rule is another."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        """Say the rule in words, as heads of plans and lists show it."""
        many = "" if self.places == 1 else "all " if self.places is None else f"{self.places} "
        within = "" if self.scope == "experiment" else f" of the {self.scope}"
        if self.by == "metric":
            delta = f", by more than {self.min_delta:g}" if self.min_delta else ""
            return f"best {many}by {self.metric} ({self.mode}{delta}){within}"
        terms = ", ".join(f"{term.metric} {term.mode}" for term in self.terms)
        return f"best {many}by {self.name} ({self.by}: {terms}){within}"
