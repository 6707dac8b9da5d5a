"""The configuration: every limit of the system, with its unit, its default and its reason.

TOML as written becomes `Settings` as meant: frozen, checked together, all errors at once. Sizes
may be written "200G", durations "7d12h"; an unknown key is an error. `ckptd.origins` says where
the files lie and which value came from which.
"""

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ckptd.model import RootKind

_SIZE = re.compile(r"(?i)\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(?:i?b)?\s*")
_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_SPAN = re.compile(r"(?i)(?:\s*\d+(?:\.\d+)?\s*(?:ms|[smhdw]))+\s*")
_SPAN_PART = re.compile(r"(?i)(\d+(?:\.\d+)?)\s*(ms|[smhdw])")
_SPAN_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_size(value: object) -> object:
    """Turn "64M" into bytes (powers of 1024); anything but text passes through.

    >>> parse_size("1.5G")
    1610612736
    """
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value)
    if found is None:
        message = f'{value!r} is no size; write for instance "512M" or "200G"'
        raise ValueError(message)
    return int(float(found[1]) * _SIZE_UNITS[found[2].lower()])


def parse_span(value: object) -> object:
    """Turn "7d12h" into seconds; anything but text passes through.

    >>> parse_span("1h30m")
    5400.0
    """
    if not isinstance(value, str):
        return value
    if _SPAN.fullmatch(value) is None:
        message = f'{value!r} is no duration; write for instance "30s", "24h" or "7d12h"'
        raise ValueError(message)
    return sum(float(n) * _SPAN_UNITS[unit.lower()] for n, unit in _SPAN_PART.findall(value))


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Span = Annotated[float, BeforeValidator(parse_span), Field(ge=0)]
PositiveSpan = Annotated[float, BeforeValidator(parse_span), Field(gt=0)]


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Section(BaseModel):
    """A table of the configuration file: frozen, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Arenas(Section):
    """Memory lent to trainers."""

    bytes_max: Size = Field(
        default_factory=lambda: int(_memory_bytes() * 0.4),
        description="All arenas together. Default: 40 % of the machine's memory.",
    )
    bytes_per_uid_max: Size = Field(
        0, description="Arenas of one user, where a daemon of root serves several. 0: half of bytes_max."
    )
    per_experiment_max: int = Field(
        2, ge=1, le=8, description="Arenas of one experiment: two let a save overlap the publish before it."
    )
    lease_wait_s: Span = Field(
        60.0, description="Longest time a lease request waits for an arena before it is answered `no_arena`."
    )
    idle_s: Span = Field(600.0, description="A free arena unused for this long gives its memory back.")

    @property
    def share_bytes(self) -> int:
        """What one user may have who is not the daemon's own: that one pays for all of it and has no share."""
        return self.bytes_per_uid_max or self.bytes_max // 2


class Intake(Section):
    """The socket."""

    connections_max: int = Field(4096, ge=8, description="Open connections of all users.")
    connections_per_uid_max: int = Field(256, ge=4, description="Open connections of one user.")
    backlog: int = Field(512, ge=16, description="Connections the kernel queues before accept.")
    idle_frame_s: PositiveSpan = Field(10.0, description="Longest time a frame may take to arrive once begun.")
    send_bytes_max: Size = Field(4 << 20, description="Bytes queued for one peer that does not read; more closes it.")
    pushes_max: int = Field(4096, ge=16, description="Level changes one connection may follow at once.")
    lost_after_s: PositiveSpan = Field(
        60.0, description="Silence after which an experiment with no connection is `lost`."
    )


class Watching(Section):
    """Legacy files."""

    reconcile_s: PositiveSpan = Field(60.0, description="Interval of the scan that finds what events missed.")
    reconcile_max_s: PositiveSpan = Field(
        600.0,
        description="The longest it may become in a large tree: while all events of a root are seen, it rests 300 times as "
        "long as its scan took.",
    )
    reconcile_remote_s: PositiveSpan = Field(
        20.0, description="The same on network and FUSE file systems, where events are not seen."
    )
    quiet_s: Span = Field(5.0, description="Unchanged for this long: done, when nothing better tells.")
    quiet_remote_s: Span = Field(30.0, description="The same on network file systems.")
    entries_max: int = Field(2_000_000, ge=1000, description="Entries one scan may visit.")


class Workers(Section):
    """I/O worker processes."""

    request_s: PositiveSpan = Field(
        120.0, description="Longest silence of a worker during a request; then it is abandoned."
    )
    stuck_max: int = Field(2, ge=1, description="Abandoned workers of one mount that may exist at once.")
    threads: int = Field(4, ge=2, le=64, description="Threads of one worker; each request takes one, a publish two.")
    nice: int = Field(10, ge=0, le=19, description="CPU niceness of workers, so that training wins.")
    idle_io: bool = Field(True, description="Workers use the idle I/O class where the kernel has one.")
    parser_bytes_max: Size = Field(512 << 20, description="Address space of the child that parses foreign headers.")
    parser_cpu_s: PositiveSpan = Field(10.0, description="CPU time of that child.")


class Jobs(Section):
    """The queue behind the doors."""

    running_max: int = Field(8, ge=1, description="Jobs on their way at once, all experiments.")
    lease_s: PositiveSpan = Field(600.0, description="A claimed job not renewed for this long may be claimed again.")
    retries_max: int = Field(8, ge=0, description="Tries after a passing error before a job is parked.")
    backoff_s: PositiveSpan = Field(1.0, description="First pause before a retry; doubles each time.")
    backoff_s_max: PositiveSpan = Field(300.0, description="Longest pause before a retry.")


class Catalog(Section):
    """The database."""

    url: str = Field("", description="SQLAlchemy URL; empty: SQLite in the state directory.")
    readers: int = Field(4, ge=1, le=64, description="Connections that only read.")
    metrics_flush_s: PositiveSpan = Field(
        0.05, description="Metrics of all experiments are committed together this often."
    )
    ballast_bytes: Size = Field(
        64 << 20, description="Reserve released when the disk is full, so that deletions can be recorded."
    )
    wal_bytes_max: Size = Field(64 << 20, description="WAL size beyond which it is truncated and an alarm is logged.")


class BestRule(Section):
    """Keep the best K by one metric. The direction is never guessed from the name."""

    metric: str = Field(min_length=1)
    mode: Literal["min", "max"]
    k: int = Field(1, ge=1)


class Rules(Section):
    """What to keep of one experiment. No rule at all: nothing is ever deleted."""

    keep_last: int | None = Field(None, ge=1, description="The newest N verified checkpoints.")
    keep_best: tuple[BestRule, ...] = Field((), description="The best K by a metric; several rules are a union.")
    keep_every: int | None = Field(None, ge=1, description="Every checkpoint whose step is a multiple of this.")
    trash_grace_s: Span = Field(86400.0, description="How long a retired checkpoint stays in the trash.")
    links: bool = Field(True, description="Keep the symlinks `latest` and `best` beside managed checkpoints.")

    @model_validator(mode="before")
    @classmethod
    def _one_best_rule(cls, data: Any) -> Any:
        """Accept keep_best = {metric = ..., mode = ..., k = ...} for the common case of one rule."""
        if isinstance(data, dict) and isinstance(data.get("keep_best"), dict):
            return {**data, "keep_best": (data["keep_best"],)}
        return data

    @property
    def deletes(self) -> bool:
        """Whether any rule is set, so that what no rule keeps may go."""
        return self.keep_last is not None or bool(self.keep_best) or self.keep_every is not None


class ExperimentRules(Rules):
    """Rules for the experiments that match; the first match in the file wins."""

    project: str = Field("*", description="Shell pattern for the project's name.")
    name: str = Field("*", description="Shell pattern for the experiment's name.")


class Root(Section):
    """A directory tree that ckptd manages or watches."""

    path: Path
    kind: RootKind = RootKind.MANAGED
    project: str = Field("", description="Project of what is found here; empty: the root's own name.")
    allow_delete: bool = Field(False, description="Watched roots: retention may remove other people's files here.")
    allow_links: bool = Field(False, description="Watched roots: `latest` and `best` may be placed here.")
    quiet_s: Span | None = Field(None, description="Overrides watching.quiet_s here.")

    @model_validator(mode="after")
    def _absolute(self) -> "Root":
        if not self.path.is_absolute() or ".." in self.path.parts:
            message = f"root path {str(self.path)!r} must be absolute and without '..'"
            raise ValueError(message)
        return self


class Log(Section):
    """What the daemon says."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: readable on a terminal, JSON lines elsewhere."
    )


class Settings(Section):
    """Everything."""

    mode: Literal["user", "system"] = Field(
        "user",
        description="user: one user's daemon, a trainer's `dir` becomes a root by itself. system: only the roots below.",
    )
    state_dir: Path = Field(Path(), description="Catalog, spool and token; node-local. Empty: chosen by mode.")
    socket: Path = Field(Path(), description="Where clients connect; at most 107 bytes. Empty: chosen by mode.")
    drain_s: Span = Field(30.0, description="On SIGTERM: how long running jobs may take to finish.")
    watchdog_lag_s: PositiveSpan = Field(5.0, description="Event-loop lag beyond which the watchdog is not fed.")
    orphan_age_s: PositiveSpan = Field(3600.0, description="Our own temporary directories older than this are swept.")
    arenas: Arenas = Field(default_factory=Arenas)
    intake: Intake = Field(default_factory=Intake)
    watching: Watching = Field(default_factory=Watching)
    workers: Workers = Field(default_factory=Workers)
    jobs: Jobs = Field(default_factory=Jobs)
    catalog: Catalog = Field(default_factory=Catalog)
    log: Log = Field(default_factory=Log)
    retention: Rules = Field(
        default_factory=Rules, description="Rules for experiments that no [[experiments]] entry matches."
    )
    experiments: tuple[ExperimentRules, ...] = ()
    roots: tuple[Root, ...] = ()

    def rules_for(self, project: str, name: str) -> Rules:
        """Return the rules of one experiment: the first [[experiments]] entry that matches, else [retention]."""
        for rules in self.experiments:
            if fnmatchcase(project, rules.project) and fnmatchcase(name, rules.name):
                return rules
        return self.retention

    @model_validator(mode="after")
    def _agree(self) -> "Settings":
        """Limits that depend on one another are checked here, not in comments."""
        if self.jobs.lease_s < self.workers.request_s * 2:
            message = "jobs.lease_s must be at least twice workers.request_s, or a slow request is claimed twice"
            raise ValueError(message)
        if self.orphan_age_s < self.jobs.lease_s:
            message = "orphan_age_s must not be below jobs.lease_s, or a running publish could be swept"
            raise ValueError(message)
        if self.jobs.backoff_s_max < self.jobs.backoff_s:
            message = "jobs.backoff_s_max must not be below jobs.backoff_s"
            raise ValueError(message)
        if self.intake.connections_per_uid_max > self.intake.connections_max:
            message = "intake.connections_per_uid_max must not exceed intake.connections_max"
            raise ValueError(message)
        return self
