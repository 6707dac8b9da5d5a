"""Thresholds of metrics and verbs of plug-ins, as written in the configuration: [[thresholds]] and [[verbs]]."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ckptd.section import PositiveSpan, Section, Size, Span

VERB_PATTERN = r"^x-[a-z0-9][a-z0-9_-]{0,31}\.[a-z0-9][a-z0-9_.-]{0,31}$"


class Threshold(Section):
    """A limit for a logged metric; the event `metric.crossed` says that it was passed. NaN and infinities always pass it."""

    metric: str = Field(min_length=1, description="Name of the metric.")
    above: float | None = Field(None, description="Told when a value is greater.")
    below: float | None = Field(None, description="Told when a value is smaller.")
    project: str = Field("*", description="Shell pattern for the project's name.")
    name: str = Field("*", description="Shell pattern for the experiment's name.")
    again_s: Span = Field(60.0, description="Within this time after it was told, another crossing is not.")

    @model_validator(mode="after")
    def _has_a_limit(self) -> "Threshold":
        if self.above is None and self.below is None:
            message = f"threshold of {self.metric!r}: above or below says what the limit is"
            raise ValueError(message)
        return self


class VerbEntry(Section):
    """A verb that a plug-in adds to the socket. It runs in a child host, as a hook does."""

    name: str = Field(pattern=VERB_PATTERN, description='"x-PLUGIN.VERB"; no built-in verb begins with "x-".')
    python: str = Field(
        min_length=1, description='"module:object", called with a context whose `data` is what was sent.'
    )
    timeout_s: PositiveSpan | None = Field(None, description="Overrides hooks_defaults.timeout_s.")
    memory_bytes_max: Size | None = Field(None, description="Overrides hooks_defaults.memory_bytes_max.")
    import_path: tuple[Path, ...] = Field((), description="Directories searched first for its module.")
    environment: dict[str, str] = Field(default_factory=dict, description="Variables set for it.")
    options: dict[str, Any] = Field(default_factory=dict, description="Arguments of the class or function.")
