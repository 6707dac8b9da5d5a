"""A checkpoint as rules see it."""

from datetime import UTC, datetime
from typing import Any

from ckptd.model import Checkpoint, Level, Origin, State


def a_save(step: int | None, loss: float | None = None, **more: Any) -> Checkpoint:
    """One good save of one experiment; `more` says what is different."""
    values: dict[str, Any] = {
        "id": f"{step}-{more.get('segment', 1)}-{more.get('revision', 1)}",
        "experiment_id": "e",
        "project": "p",
        "experiment": "e",
        "state": State.LIVE,
        "level": Level.VERIFIED,
        "origin": Origin.MEMORY,
        "root": "/r",
        "path": f"/r/{step}",
        "step": step,
        "epoch": None,
        "revision": 1,
        "size_bytes": 1,
        "format": "safetensors",
        "created_at": datetime(2030, 1, 1, tzinfo=UTC),
        "metrics": {} if loss is None else {"loss": loss},
        "sequence": 0 if step is None else step,
    }
    return Checkpoint(**{**values, **more})
