"""The configuration: every limit of the system, with its unit, its default and its reason.

TOML as written becomes `Settings` as meant: frozen, checked together, all errors at once. Sizes
may be written "200G", durations "7d12h"; an unknown key is an error. `ckptd.origins` says where
the files lie and which value came from which.
"""

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ckptd.hookconfig import Threshold, VerbEntry
from ckptd.model import RootKind
from ckptd.rules import ExperimentRules, Rules
from ckptd.section import PositiveSpan, Section, Size, Span

TOKEN_CHARS_MIN = 16


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
    hot_bytes_max: Size = Field(
        default_factory=lambda: int(_memory_bytes() * 0.4),
        description="Copies that stay in memory after a save, all together; 0: none. Default: 40 % of the machine's memory.",
    )
    hot_policy: tuple[Literal["newest", "best", "pinned"], ...] = Field(
        ("newest", "best", "pinned"),
        description="Which copies to keep when not all fit, the dearest first: the newest of an experiment, a best one, "
        "a pinned one. What is none of these goes first.",
    )
    hot_s: Span = Field(86400.0, description="A copy that nobody has read for this long gives its memory back.")
    memory_free_bytes_min: Size = Field(
        default_factory=lambda: int(_memory_bytes() * 0.05),
        description="Unused arenas, then copies, are given up while the machine has less memory left than this. "
        "Default: 5 % of the machine's memory.",
    )

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
        description="The longest it may become: in a large tree of which all events are seen it is 600 times as long as its "
        "scan took, and under a managed root it doubles with each scan that finds nothing new.",
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
    answers_bytes_max: Size = Field(
        8 << 20, description="Answers to `ls`, `show` and `experiments` kept in memory, with their keys; 0: none."
    )
    answers_max: int = Field(512, ge=1, description="How many of them.")
    answers_s: PositiveSpan = Field(60.0, description="How long one is kept at most; a write ends it sooner.")


class Disk(Section):
    """How full disks may become before what nothing holds goes. A [[roots]] entry may set its own limits."""

    free_bytes_min: Size = Field(
        0,
        description="Below this disk.relief is told, then the trash is emptied and what no rule and no promise holds goes, "
        "the oldest first. 0: never. The alarm for people is alerts.disk_free_bytes_min.",
    )
    root_bytes_max: Size = Field(0, description="Budget of each root: what is spare goes until it fits. 0: none.")
    look_s: PositiveSpan = Field(30.0, description="How often to look; also after saves, and when a disk was full.")


class Root(Section):
    """A directory tree that ckptd manages or watches."""

    path: Path
    kind: RootKind = RootKind.MANAGED
    project: str = Field("", description="Project of what is found here; empty: the root's own name.")
    allow_delete: bool = Field(False, description="Watched roots: retention may remove other people's files here.")
    allow_links: bool = Field(False, description="Watched roots: `latest` and `best` may be placed here.")
    quiet_s: Span | None = Field(None, description="Overrides watching.quiet_s here.")
    bytes_max: Size | None = Field(None, description="Overrides disk.root_bytes_max here.")
    free_bytes_min: Size | None = Field(None, description="Overrides disk.free_bytes_min here.")

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


class Cache(Section):
    """Files fetched back from an archive, kept on a local disk."""

    directory: Path = Field(Path(), description="Where they lie; ckptd's own. Empty: `cache` in the state directory.")
    bytes_max: Size = Field(
        50 << 30, description="All of them together; the longest unused go first, those in use never. 0: keep none."
    )


class Alerts(Section):
    """When to raise an alarm. Each is told once when it begins and once when it ends; 0 switches a limit off."""

    look_s: PositiveSpan = Field(15.0, ge=0.1, description="How often the daemon looks.")
    rss_bytes_max: Size = Field(1 << 30, description="Memory of the daemon's own process, arenas not counted.")
    backlog_jobs_max: int = Field(1000, ge=0, description="Jobs that wait.")
    backlog_age_s: Span = Field(3600.0, description="Age of the longest waiting job.")
    disk_free_bytes_min: Size = Field(
        1 << 30, description="Free space on each disk that holds a root: less is disk.low."
    )
    disk_free_share_min: float = Field(0.05, ge=0, le=1, description="The same, as a share of the disk.")
    corrupt: bool = Field(True, description="A checkpoint on disk is damaged.")
    stalled_s: Span = Field(
        3600.0, description="A running experiment that had a step before has had no further one for this long."
    )


class Web(Section):
    """Figures and health over HTTP: /metrics for Prometheus, /healthz."""

    enabled: bool = Field(True, description="Listen. What serves is loaded with the first request, not before.")
    socket: Path = Field(
        Path(),
        description="Unix socket, mode 0660; at most 107 bytes. Empty: beside the daemon's socket, ending in `.web`.",
    )
    port: int = Field(0, ge=0, le=65535, description="TCP port as well; needs a token. 0: none.")
    host: str = Field("127.0.0.1", description="Address of that port; another than loopback is open to the network.")
    token: str = Field(
        "", description="What a client must send over TCP as `Authorization: Bearer TOKEN`; 16 characters or more."
    )
    connections_max: int = Field(64, ge=1, description="Connections at once; more are answered 503.")

    @model_validator(mode="after")
    def _guarded(self) -> "Web":
        if self.port and len(self.token) < TOKEN_CHARS_MIN:
            message = f"web.port needs web.token, at least {TOKEN_CHARS_MIN} characters: a port has no file mode"
            raise ValueError(message)
        if not self.token.isascii():
            message = "web.token must be ASCII: a header carries nothing else"
            raise ValueError(message)
        return self


class HooksDefaults(Section):
    """Limits of all hooks; an entry may set its own where it has the key."""

    enabled: bool = Field(True, description="false: no hook runs at all, configured or installed.")
    entry_points: bool = Field(True, description="Use the hooks of installed packages (entry point group ckptd.hooks).")
    timeout_s: PositiveSpan = Field(10.0, description="Longest run of a hook; then it is killed with its children.")
    memory_bytes_max: Size = Field(
        2 << 30,
        description="Writable memory of each process of a hook, and resident memory of all of them. 0: no limit.",
    )
    ask_s_max: PositiveSpan = Field(
        30.0, description="Longest time an act waits for all hooks that are asked before it; then it goes on."
    )
    output_bytes_max: Size = Field(
        64 << 10, le=1 << 20, description="What is kept of what a run prints; the rest is read and thrown away."
    )
    processes_max: int = Field(64, ge=1, description="Processes that one hook may have at once.")
    running_max: int = Field(4, ge=1, le=64, description="Hooks after the fact that run at once.")
    hosts_max: int = Field(16, ge=2, description="Child hosts kept ready; the longest idle one ends for another.")
    idle_s: PositiveSpan = Field(300.0, description="A child host without work ends after this.")
    failures_max: int = Field(5, ge=1, description="Failures in a row after which a hook is given a rest.")
    rest_s: PositiveSpan = Field(60.0, description="First rest; then one run decides. Doubles while that fails.")
    rest_s_max: PositiveSpan = Field(3600.0, description="Longest rest.")
    nice: int = Field(10, ge=0, le=19, description="CPU niceness of child hosts.")


class HookEntry(Section):
    """One hook. Exactly one of python, exec, url, mail and builtin says what it is."""

    name: str = Field(
        "", max_length=100, description="Unique. Empty: the builtin's name, else what the target is called."
    )
    python: str = Field("", description='"module:object" or "module"; imported in a child host only.')
    exec: tuple[str, ...] = Field((), description="A program by its absolute path, and its arguments.")
    url: str = Field("", description="A webhook: https://..., or http:// to this machine.")
    mail: str = Field("", description='A mail server: "smtp://host:port" or "smtps://host:port".')
    builtin: str = Field("", description="A hook that comes with ckptd.")
    events: tuple[str, ...] = Field((), description="Where it runs. Empty: where its own declaration says.")
    priority: int | Literal["critical", "high", "normal", "low", "background"] | None = Field(
        None, description="Smaller runs earlier: critical 0, high 10, normal 50, low 90, background 100."
    )
    when: str = Field("", max_length=1000, description='Condition, such as "data.val_loss < 0.2". Empty: always.')
    timeout_s: PositiveSpan | None = Field(None, description="Overrides hooks_defaults.timeout_s.")
    memory_bytes_max: Size | None = Field(None, description="Overrides hooks_defaults.memory_bytes_max.")
    enabled: bool = Field(True, description="false: known, not run.")
    import_path: tuple[Path, ...] = Field((), description="Directories searched first for a python hook's module.")
    environment: dict[str, str] = Field(default_factory=dict, description="Variables set for python and exec.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="python, builtin: arguments of the class or function; url, mail: settings (see reference/hooks.md).",
    )

    @model_validator(mode="after")
    def _one_target(self) -> "HookEntry":
        given = [key for key in ("python", "exec", "url", "mail", "builtin") if getattr(self, key)]
        if len(given) != 1:
            message = f"a hook has exactly one of python, exec, url, mail and builtin, this one has {given or 'none'}"
            raise ValueError(message)
        return self


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
    hooks_defaults: HooksDefaults = Field(default_factory=HooksDefaults)
    cache: Cache = Field(default_factory=Cache)
    alerts: Alerts = Field(default_factory=Alerts)
    web: Web = Field(default_factory=Web)
    disk: Disk = Field(default_factory=Disk)
    retention: Rules = Field(
        default_factory=Rules, description="Rules for experiments that no [[experiments]] entry matches."
    )
    experiments: tuple[ExperimentRules, ...] = ()
    roots: tuple[Root, ...] = ()
    hooks: tuple[HookEntry, ...] = ()
    thresholds: tuple[Threshold, ...] = ()
    verbs: tuple[VerbEntry, ...] = ()

    @property
    def web_socket(self) -> Path:
        """Where /metrics is served."""
        return self.socket.with_suffix(".web") if self.web.socket == Path() else self.web.socket

    @property
    def cache_dir(self) -> Path:
        """Where files lie that were fetched back."""
        return self.state_dir / "cache" if self.cache.directory == Path() else self.cache.directory

    def disk_limits(self, root: str) -> tuple[int, int]:
        """Return the free-space floor and the budget of a root, in bytes; 0 for none."""
        own = next((one for one in self.roots if str(one.path) == root), None)
        floor = own.free_bytes_min if own is not None else None
        most = own.bytes_max if own is not None else None
        return (
            self.disk.free_bytes_min if floor is None else floor,
            self.disk.root_bytes_max if most is None else most,
        )

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
        if self.hooks_defaults.rest_s_max < self.hooks_defaults.rest_s:
            message = "hooks_defaults.rest_s_max must not be below hooks_defaults.rest_s"
            raise ValueError(message)
        return self
