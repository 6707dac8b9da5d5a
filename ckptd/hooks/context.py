"""What a hook is told: plain data, the same in the daemon, in a child and on the wire."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

CONTEXT_BYTES_MAX = 256 << 10  # as JSON; who builds one leaves out what is larger


@dataclass(frozen=True, slots=True)
class Context:
    """One fact, or one question before an act.

    event          a HookEvent's value
    key            idempotency key: equal at every delivery of the same fact to the same hook
    at             aware UTC; for people, never for order
    experiment_id  "" where it is about none
    checkpoint_id  "" likewise
    data           JSON values under the keys that the point documents, all optional
    """

    event: str
    key: str
    at: datetime
    experiment_id: str = ""
    checkpoint_id: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self, **more: str) -> bytes:
        """Return what executables and webhooks get: one line of strict JSON, NaN and the infinities as their names."""
        return json.dumps(_named({**more, **self.to_wire()}), allow_nan=False).encode() + b"\n"

    def to_wire(self) -> dict[str, Any]:
        """Return the fields as a dictionary; numbers stay as they are, NaN included."""
        return {
            "event": self.event,
            "key": self.key,
            "at": self.at.isoformat(),
            "experiment_id": self.experiment_id,
            "checkpoint_id": self.checkpoint_id,
            "data": dict(self.data),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "Context":
        """Rebuild what `to_wire` wrote. KeyError, TypeError or ValueError for anything else."""
        return cls(
            event=str(wire["event"]),
            key=str(wire["key"]),
            at=datetime.fromisoformat(wire["at"]),
            experiment_id=str(wire["experiment_id"]),
            checkpoint_id=str(wire["checkpoint_id"]),
            data=dict(wire["data"]),
        )


def _named(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _named(inner) for key, inner in value.items()}
    return [_named(inner) for inner in value] if isinstance(value, list | tuple) else value


def with_metrics(data: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` with the metrics under "metrics" and, where no key of the point is in the way, under their own names.

    So that `context.data.get("val_loss")` and `when = "data.val_loss < 0.2"` find what the trainer called val_loss.
    """
    return {**metrics, **data, "metrics": dict(metrics)}
