"""Rows as the JSON objects of docs/reference/wire-control.md. Pure."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ckptd.catalog.bests import Best
from ckptd.catalog.experiments import Experiment
from ckptd.catalog.holds import Hold
from ckptd.catalog.hookruns import Noted
from ckptd.model import Checkpoint
from ckptd_client.wire import number


def at(when: datetime | None) -> str | None:
    """ISO 8601 with offset, or null."""
    return None if when is None else when.isoformat()


def checkpoint(row: Checkpoint, holds: Sequence[str], *, hot: bool, meta: bool = False) -> dict[str, Any]:
    """Return the checkpoint object."""
    found: dict[str, Any] = {
        "checkpoint": row.id,
        "experiment": row.experiment_id,
        "project": row.project,
        "name": row.experiment,
        "step": row.step,
        "epoch": row.epoch,
        "revision": row.revision,
        "sequence": row.sequence,
        "state": str(row.state),
        "level": str(row.level),
        "origin": str(row.origin),
        "format": row.format,
        "size_bytes": row.size_bytes,
        "root": row.root,
        "path": row.path,
        "created_at": at(row.created_at),
        "staged_at": at(row.staged_at),
        "durable_at": at(row.durable_at),
        "verified_at": at(row.verified_at),
        "metrics": {name: number(value) for name, value in row.metrics.items()},
        "note": row.note,
        "tags": list(row.tags),
        "parent": row.parent_id,
        "update_best": row.update_best,
        "holds": list(holds),
        "hot": hot,
        "error": row.error,
        "veto": row.veto,
    }
    if meta:
        found["meta"] = row.meta
    return found


def hold_words(row: Checkpoint, newest_id: str | None, winners: Sequence[Best], held: Sequence[Hold]) -> list[str]:
    """Why no rule and no command may remove `row` now, in words."""
    words = ["latest"] if row.id == newest_id else []
    words += [winner.words for winner in winners if winner.checkpoint_id == row.id]
    words += sorted({hold.kind for hold in held if hold.checkpoint_id == row.id})
    return words


def experiment(
    row: Experiment, newest: Checkpoint | None, best: list[dict[str, Any]], counts: tuple[int, int]
) -> dict[str, Any]:
    """Return the experiment object; `counts` are checkpoints and bytes on disk."""
    return {
        "experiment": row.id,
        "project": row.project,
        "name": row.name,
        "status": str(row.status),
        "dir": row.root,
        "parent": row.parent_id,
        "tags": list(row.tags),
        "uid": row.uid,
        "segment": row.segment,
        "created_at": at(row.created_at),
        "seen_at": at(row.heartbeat_at),
        "last_step": row.last_step,
        "checkpoints": counts[0],
        "size_bytes": counts[1],
        "latest": None if newest is None else {"checkpoint": newest.id, "step": newest.step},
        "best": best,
        "config": row.config,
        "facts": row.facts,
    }


def finding(noted: Noted) -> dict[str, Any]:
    """Return what a hook found about a checkpoint; its facts are with the event hook.finding."""
    return {"at": at(noted.found.at), "hook": noted.hook, "level": noted.found.level, "text": noted.found.text}
