"""What hooks are told: an event, or a question before an act, with what the catalog knows of its checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ckptd.catalog import Catalog, checkpoints
from ckptd.catalog.columns import EPOCH
from ckptd.events import Event
from ckptd.hooks.context import CONTEXT_BYTES_MAX, Context, with_metrics
from ckptd.model import Checkpoint

LARGE = ("metrics", "damage", "checkpoints", "facts", "tags")  # left out, in this order, until the rest fits


async def contexts(catalog: Catalog | None, events: Sequence[Event]) -> list[Context]:
    """Return what hooks are told of these events; those of a checkpoint with its metrics and tags of now.

    One read for all of them. Errors as Catalog.read; without a catalog nothing is looked up.
    """
    wanted = sorted({event.checkpoint for event in events if event.checkpoint}) if catalog is not None else []
    rows = await catalog.read(lambda conn: checkpoints.get_many(conn, wanted)) if catalog is not None and wanted else {}
    return [_context(event, rows.get(event.checkpoint)) for event in events]


def question(event: str, key: str, row: Checkpoint, more: Mapping[str, Any]) -> Context:
    """Return what hooks are asked before an act on one checkpoint."""
    return bounded(Context(event, key, row.created_at, row.experiment_id, row.id, {**about(row), **more}))


def about(row: Checkpoint) -> dict[str, Any]:
    """Return what a hook is told of every checkpoint: its metrics also under their own names."""
    facts = {
        "project": row.project,
        "name": row.experiment,
        "step": row.step,
        "epoch": row.epoch,
        "path": row.path,
        "size_bytes": row.size_bytes,
        "tags": list(row.tags),
    }
    return with_metrics(facts, row.metrics)


def bounded(context: Context) -> Context:
    """Return a context of CONTEXT_BYTES_MAX at most: what is large is left out, and "left_out" says what."""
    data, left_out = dict(context.data), []
    for key in LARGE:
        if len(msgspec.json.encode(data)) <= CONTEXT_BYTES_MAX:
            break
        gone = data.pop(key, None)
        if gone is not None:
            left_out.append(key)
        if key == "metrics" and isinstance(gone, Mapping):
            data = {name: value for name, value in data.items() if name not in gone}
    if left_out:
        data["left_out"] = left_out
    return Context(context.event, context.key, context.at, context.experiment_id, context.checkpoint_id, data)


def _context(event: Event, row: Checkpoint | None) -> Context:
    # The time is in the key because a catalog that was made anew counts its events anew.
    at_us = round((event.at - EPOCH).total_seconds() * 1e6)
    key = f"{event.name}-{at_us}" if event.seq is None else f"{event.seq}-{at_us}"
    known = {} if row is None else about(row)
    data = {**known, **{name: value for name, value in event.data.items() if name != "metrics"}}
    return bounded(Context(event.name, key, event.at, event.experiment, event.checkpoint, data))
