"""When to tell a person: rules over events, a rate limit for each, quiet hours. Pure but for the state it holds.

A notice is a finding of the hook `notify`, told as the event hook.finding; webhooks, mails and executables
that listen to it deliver it, with their retries. What a rule holds back is counted, and said with its next notice.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, time
from fnmatch import fnmatchcase
from typing import Any

from ckptd.hooks.condition import parse
from ckptd.hooks.context import Context
from ckptd.hooks.result import Level
from ckptd.section import parse_span

SEVERITIES = (Level.INFO, Level.WARNING, Level.ERROR)
KEYS_REMEMBERED_MAX = 4096  # deliveries that are known to be repeats
BURST, PER_S = 3, 600.0


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of notice.

    events    names, or shell patterns of names: "experiment.lost", "worker.*"
    when      a safe expression over the context; "" always
    severity  how bad it is; of a finding, the finding's own level where that is worse
    burst     so many may follow one another at once
    per_s     then one in so many seconds
    quiet     False: told in quiet hours as well
    """

    name: str
    events: tuple[str, ...]
    when: str = ""
    severity: Level = Level.WARNING
    burst: int = BURST
    per_s: float = PER_S
    quiet: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for a rule that could never say anything."""
        if not self.events or self.burst < 1 or self.per_s <= 0:
            message = f"rule {self.name!r}: events must not be empty, burst at least 1, per_s above 0"
            raise ValueError(message)

    def fits(self, event: str) -> bool:
        """Whether the rule is about events of this name."""
        return any(fnmatchcase(event, pattern) for pattern in self.events)


STANDARD = (
    Rule("stalled", ("experiment.stalled", "experiment.lost", "experiment.failed"), severity=Level.ERROR),
    Rule("disk", ("disk.low",), severity=Level.ERROR, burst=1, per_s=3600.0),
    Rule("relief", ("disk.relief",), burst=1, per_s=3600.0),
    Rule("corrupt", ("checkpoint.corrupt", "checkpoint.missing", "checkpoint.failed"), severity=Level.ERROR),
    Rule(
        "backlog",
        ("job.parked", "alert.raised"),
        when="event == 'job.parked' or data.alert in ['backlog', 'backlog_age', 'rss']",
        burst=2,
        per_s=1800.0,
    ),
    Rule("trouble", ("worker.lost", "root.degraded", "catalog.failed", "hook.opened", "retention.held")),
    Rule("findings", ("hook.finding",), when="data.level == 'error'", severity=Level.ERROR),
)


@dataclass(frozen=True, slots=True)
class QuietHours:
    """A time of day, possibly over midnight, in the daemon's time zone. Errors are told nevertheless unless `errors`."""

    begin: time
    end: time
    errors: bool = False

    def cover(self, now: datetime, severity: Level) -> bool:
        """Whether something of this severity keeps quiet at `now` (local time)."""
        at = now.time()
        within = self.begin <= at < self.end if self.begin <= self.end else at >= self.begin or at < self.end
        return within and (self.errors or severity is not Level.ERROR)


@dataclass(slots=True)
class Bucket:
    """A token bucket on a monotonic clock: `burst` at once, then one in `per_s` seconds."""

    burst: int
    per_s: float
    tokens: float
    at_s: float

    @classmethod
    def full(cls, rule: Rule, now_s: float) -> "Bucket":
        """Return a bucket from which nothing was taken yet."""
        return cls(rule.burst, rule.per_s, float(rule.burst), now_s)

    def ready(self, now_s: float) -> bool:
        """Whether there is a token, after what came in since the last question. A clock that stands still adds none."""
        self.tokens = min(self.burst, self.tokens + max(0.0, now_s - self.at_s) / self.per_s)
        self.at_s = max(self.at_s, now_s)
        return self.tokens >= 1 - 1e-9

    def take(self) -> None:
        """Take one token."""
        self.tokens = max(0.0, self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Notice:
    """What is told now. `held_back`: how many notices of the rule were not told since its last one."""

    rule: str
    severity: Level
    text: str
    held_back: int = 0


@dataclass
class Notices:
    """Decides, for one event after the other. Not thread-safe."""

    rules: Sequence[Rule]
    quiet: QuietHours | None = None
    _buckets: dict[str, Bucket] = field(default_factory=dict)
    _held: dict[str, int] = field(default_factory=dict)
    _worst: dict[str, Level] = field(default_factory=dict)
    _seen: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        """Raise ValueError for a name used twice or a condition that does not parse."""
        names = [rule.name for rule in self.rules]
        if len(set(names)) != len(names):
            message = f"notice rules need names of their own, not {sorted(names)}"
            raise ValueError(message)
        self._conditions = {rule.name: parse(rule.when) for rule in self.rules if rule.when}

    def see(self, context: Context, now: datetime, now_s: float) -> list[Notice]:
        """Return what is to be told after this event: its own notices, and that others were held back before.

        now    local time, for quiet hours        now_s  monotonic, for rates

        A second delivery of the same fact says nothing.
        """
        if not self._first_time(context.key):
            return self._overdue(now, now_s, told=set())
        notices: list[Notice] = []
        for rule in self.rules:
            if not rule.fits(context.event) or not self._holds(rule, context):
                continue
            severity = _severity(rule, context)
            bucket = self._bucket(rule, now_s)
            if not bucket.ready(now_s) or self._is_quiet(rule, now, severity):
                self._hold(rule, severity)
                continue
            bucket.take()
            held = self._held.pop(rule.name, 0)
            self._worst.pop(rule.name, None)
            notices.append(Notice(rule.name, severity, _with_held(describe(context), held), held))
        return notices + self._overdue(now, now_s, told={notice.rule for notice in notices})

    def _overdue(self, now: datetime, now_s: float, *, told: set[str]) -> list[Notice]:
        """Say of rules that held notices back, and may speak again, how many there were."""
        notices = []
        for rule in self.rules:
            held = self._held.get(rule.name, 0)
            if not held or rule.name in told:
                continue
            bucket, severity = self._bucket(rule, now_s), self._worst[rule.name]
            if bucket.ready(now_s) and not self._is_quiet(rule, now, severity):
                bucket.take()
                del self._held[rule.name], self._worst[rule.name]
                notices.append(Notice(rule.name, severity, f"{held} notices of this rule were held back", held))
        return notices

    def _hold(self, rule: Rule, severity: Level) -> None:
        self._held[rule.name] = self._held.get(rule.name, 0) + 1
        self._worst[rule.name] = _worse(severity, self._worst.get(rule.name, severity))

    def _is_quiet(self, rule: Rule, now: datetime, severity: Level) -> bool:
        return rule.quiet and self.quiet is not None and self.quiet.cover(now, severity)

    def _bucket(self, rule: Rule, now_s: float) -> Bucket:
        return self._buckets.setdefault(rule.name, Bucket.full(rule, now_s))

    def _holds(self, rule: Rule, context: Context) -> bool:
        condition = self._conditions.get(rule.name)
        return condition is None or condition(context)

    def _first_time(self, key: str) -> bool:
        if key in self._seen:
            return False
        self._seen[key] = None
        while len(self._seen) > KEYS_REMEMBERED_MAX:
            self._seen.popitem(last=False)
        return True


def describe(context: Context) -> str:
    """Return one line for a person: what happened to what, and why, as far as the event says it."""
    data = context.data
    place = "/".join(str(data[key]) for key in ("project", "name") if data.get(key))
    if place and data.get("step") is not None:
        place += f" at step {data['step']}"
    subject = place or str(data.get("mount") or data.get("path") or data.get("job") or _by_id(context))
    reasons = [_said(data[key]) for key in ("text", "why", "error") if data.get(key)]
    line = " ".join(part for part in (context.event, str(data.get("hook", "")), subject) if part)
    command = (data.get("recovery") or {}).get("command") if isinstance(data.get("recovery"), Mapping) else None
    return ": ".join([line, *reasons[:1]]) + (f"; resume with: {command}" if command else "")


def _by_id(context: Context) -> str:
    """Name what it is about as `ckpt show` and `ckpt recovery` take it."""
    if context.checkpoint_id:
        return f"checkpoint {context.checkpoint_id}"
    return f"experiment {context.experiment_id}" if context.experiment_id else ""


def _said(reason: object) -> str:
    if isinstance(reason, Mapping):
        return str(reason.get("message") or reason.get("code") or "")
    return str(reason)


def _severity(rule: Rule, context: Context) -> Level:
    own = str(context.data.get("level", ""))
    known = {str(level): level for level in SEVERITIES}
    return _worse(rule.severity, known.get(own, rule.severity))


def _worse(one: Level, other: Level) -> Level:
    return max(one, other, key=SEVERITIES.index)


def _with_held(text: str, held: int) -> str:
    return f"{text} ({held} more were held back)" if held else text


def rule_from(name: str, table: Mapping[str, Any]) -> Rule:
    """Build a rule from a table of the configuration. ValueError or TypeError says what is wrong with it.

    A rule named like one of STANDARD changes only what the table says.
    """
    known = next((rule for rule in STANDARD if rule.name == name), None)
    if unknown := sorted(table.keys() - _READ.keys()):
        message = f"rule {name!r}: unknown {unknown}; known are {sorted(_READ)}"
        raise ValueError(message)
    given = {_READ[key][0]: _READ[key][1](value) for key, value in table.items()}
    return Rule(**{"events": (), **given, "name": name}) if known is None else replace(known, **given)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        message = f"{value!r} is neither true nor false"
        raise TypeError(message)
    return value


def _span(value: object) -> float:
    found = parse_span(value)
    if isinstance(found, bool) or not isinstance(found, int | float):
        message = f"{value!r} is no duration"
        raise TypeError(message)
    return float(found)


# A key as the configuration writes it: the field, and how its value is read.
_READ: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "events": ("events", tuple),
    "when": ("when", str),
    "severity": ("severity", Level),
    "burst": ("burst", int),
    "per": ("per_s", _span),
    "quiet": ("quiet", _flag),
}


def quiet_from(text: str, *, errors: bool = False) -> QuietHours:
    """Read "22:00-07:00". ValueError when it is nothing of the kind."""
    begin, dash, end = text.partition("-")
    if not dash:
        message = f'quiet = {text!r}: write for instance "22:00-07:00"'
        raise ValueError(message)
    return QuietHours(time.fromisoformat(begin.strip()), time.fromisoformat(end.strip()), errors)
