"""What a hook may return, and what became of running it.

None, True          ok
False, Veto("why")  veto; only at the points that are asked (before_*), else the run has failed
Finding(...)        ok, and something worth keeping beside the checkpoint
a list of these     all of them; one veto is enough
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

FINDINGS_MAX = 64  # of one run; more is a failed run
TEXT_CHARS_MAX = 2000  # of a reason, an error or a finding; the rest is cut off


class Level(StrEnum):
    """How bad a finding is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Veto:
    """The act must not happen, and why: for the person who reads it."""

    why: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a hook found: stored with the checkpoint and told as the event "hook.finding". `facts` are JSON values."""

    level: Level
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object of it."""
        return {"level": str(self.level), "text": self.text, "facts": dict(self.facts)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "Finding":
        """Rebuild what `to_wire` wrote. KeyError, TypeError or ValueError for anything else."""
        return cls(Level(wire["level"]), str(wire["text"])[:TEXT_CHARS_MAX], dict(wire.get("facts") or {}))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a hook returned, understood."""

    veto: Veto | None = None
    findings: tuple[Finding, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object of it."""
        return {
            "veto": None if self.veto is None else self.veto.why,
            "findings": [finding.to_wire() for finding in self.findings],
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "Answer":
        """Rebuild what `to_wire` wrote. KeyError, TypeError or ValueError for anything else."""
        findings = tuple(Finding.from_wire(found) for found in wire["findings"])
        return cls(None if wire["veto"] is None else Veto(str(wire["veto"])[:TEXT_CHARS_MAX]), findings)


def understand(returned: object) -> Answer:
    """Return what a hook's return value means. TypeError when it means nothing, ValueError when it is too much."""
    parts = list(returned) if isinstance(returned, Sequence) and not isinstance(returned, str | bytes) else [returned]
    veto: Veto | None = None
    findings: list[Finding] = []
    for part in parts:
        if part is None or part is True:
            continue
        if part is False:
            veto = veto or Veto("returned False")
        elif isinstance(part, Veto):
            veto = veto or Veto(str(part.why)[:TEXT_CHARS_MAX])
        elif isinstance(part, Finding):
            findings.append(Finding(Level(part.level), str(part.text)[:TEXT_CHARS_MAX], dict(part.facts)))
        else:
            message = (
                f"returned a {type(part).__name__}: a hook returns None, True, False, Veto, Finding or a list of these"
            )
            raise TypeError(message)
    if len(findings) > FINDINGS_MAX:
        message = f"returned {len(findings)} findings; {FINDINGS_MAX} are the most of one run"
        raise ValueError(message)
    return Answer(veto, tuple(findings))


class Outcome(StrEnum):
    """How a run ended."""

    OK = "ok"
    SKIPPED = "skipped"  # its condition was false
    FAILED = "failed"
    TIMEOUT = "timeout"
    VETOED = "vetoed"
    OPEN = "open"  # not run: it failed too often and is given a rest


@dataclass(frozen=True, slots=True)
class Run:
    """One hook, one fact, what became of it. Everything here is bounded and JSON."""

    hook: str
    event: str
    key: str
    at: datetime
    outcome: Outcome
    duration_s: float = 0.0
    error: str = ""  # why it failed, or the reason of its veto
    findings: tuple[Finding, ...] = ()
    output: str = ""  # what it printed, as far as it was kept
    attempts: int = 1  # of a webhook or a mail
    opened: bool = False  # the failure after which the hook is given a rest

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object of it."""
        return {
            "hook": self.hook,
            "event": self.event,
            "key": self.key,
            "at": self.at.isoformat(),
            "outcome": str(self.outcome),
            "duration_s": self.duration_s,
            "error": self.error,
            "findings": [finding.to_wire() for finding in self.findings],
            "output": self.output,
            "attempts": self.attempts,
            "opened": self.opened,
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the hooks of a before_* point said together. The first veto decides; hooks after it are not asked."""

    runs: tuple[Run, ...] = ()

    @property
    def vetoed_by(self) -> Run | None:
        """The run that vetoed, None when the act may happen."""
        return next((run for run in self.runs if run.outcome is Outcome.VETOED), None)

    @property
    def allowed(self) -> bool:
        """Whether the act may happen."""
        return self.vetoed_by is None

    @property
    def why(self) -> str:
        """Which hook vetoed, and why; "" when none did."""
        run = self.vetoed_by
        return "" if run is None else f"hook {run.hook!r}: {run.error or 'no reason given'}"

    @property
    def findings(self) -> tuple[tuple[str, Finding], ...]:
        """Every finding with the name of its hook."""
        return tuple((run.hook, finding) for run in self.runs for finding in run.findings)


ALLOWED = Verdict()
