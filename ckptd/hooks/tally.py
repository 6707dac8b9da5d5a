"""What one hook has done since the daemon started: counts, and how long it took, from a bounded sample."""

from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ckptd.hooks.result import Outcome, Run

SAMPLE_MAX = 512  # of the newest runs that really ran
_RAN = {Outcome.OK, Outcome.FAILED, Outcome.TIMEOUT, Outcome.VETOED}


@dataclass(slots=True)
class Tally:
    """The counts of one hook."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLE_MAX))
    last_at: datetime | None = None
    last_error: str = ""

    def record(self, run: Run) -> None:
        """Count one run."""
        self.outcomes[run.outcome] += 1
        if run.outcome in _RAN:
            self.durations_s.append(run.duration_s)
            self.last_at = run.at
        if run.outcome in {Outcome.FAILED, Outcome.TIMEOUT}:
            self.last_error = run.error

    def percentile_s(self, share: float) -> float | None:
        """Return the duration that `share` of the sample does not exceed (nearest rank), None of an empty sample."""
        if not self.durations_s:
            return None
        ordered = sorted(self.durations_s)
        return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object of it. `calls` is how often it really ran."""
        return {
            "calls": sum(self.outcomes[outcome] for outcome in _RAN),
            **{str(outcome): self.outcomes[outcome] for outcome in Outcome},
            "p50_s": self.percentile_s(0.50),
            "p95_s": self.percentile_s(0.95),
            "last_at": None if self.last_at is None else self.last_at.isoformat(),
            "last_error": self.last_error,
        }
