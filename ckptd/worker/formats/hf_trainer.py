"""A transformers Trainer's checkpoint-N: trainer_state.json comes late and holds step and metrics.

Other ranks may still write their rng_state files when it is there, so it is no end mark: who asks
waits for quiet as well.
"""

import math
from typing import Any

from ckptd.worker.formats import contents
from ckptd.worker.formats.ask import TEXT_BYTES_MAX, Ask
from ckptd.worker.formats.safetensors_sharded import check_indexes, parse_object
from ckptd.worker.formats.source import Folder, broken
from ckptd.worker.protocol import Inspected

STATE = "trainer_state.json"
_METRICS_MAX = 1000
_TEXT_MAX = 4096
_INTEGER_BITS_MAX = 1000  # a float takes 1023
_NO_METRICS = frozenset({"step", "epoch"})
_KEPT = ("best_metric", "best_global_step", "best_model_checkpoint", "max_steps", "num_train_epochs")


def read(folder: Folder, ask: Ask) -> Inspected:
    """Check state, shards and every file; read step, epoch and the last value of each metric.

    InvalidFormat  "missing" without a state or a shard, "truncated" for a state that does not parse
    """
    if STATE not in folder.sizes:
        raise broken("missing", f"{STATE} is not there yet")
    state = parse_object(STATE, folder.read_whole(STATE, TEXT_BYTES_MAX))
    check_indexes(folder)
    found = contents.check(folder, ask)
    return Inspected(
        format="hf-trainer",
        complete=not found.problem,
        problem=found.problem,
        tensors=found.tensors,
        tensors_total=found.tensors_total,
        step=_count(state.get("global_step")),
        epoch=_finite(state.get("epoch")),
        metrics=_metrics(state.get("log_history")),
        extra={key: state[key] for key in _KEPT if _is_plain(state.get(key))},
    )


def _metrics(history: Any) -> dict[str, float]:
    """Return the last finite value of each name in the log: NaN has no place in an answer."""
    found: dict[str, float] = {}
    for entry in history if isinstance(history, list) else ():
        for name, value in entry.items() if isinstance(entry, dict) else ():
            number = None if name in _NO_METRICS else _finite(value)
            if number is not None and (name in found or len(found) < _METRICS_MAX):
                found[name] = number
    return found


def _finite(value: object) -> float | None:
    if type(value) not in (int, float) or (type(value) is int and value.bit_length() > _INTEGER_BITS_MAX):
        return None
    number = float(value)  # type: ignore[arg-type]  # int or float: tested above
    return number if math.isfinite(number) else None


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _is_plain(value: object) -> bool:
    return _finite(value) is not None or (isinstance(value, str) and len(value) <= _TEXT_MAX)
