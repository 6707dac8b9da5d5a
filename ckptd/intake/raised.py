"""A raised alert about one disk or one experiment as a fact of its own: `disk.low`, `experiment.stalled`.

Told in the transaction that tells of the alert, so that there is one look, one limit and one moment for both.
"""

from ckptd.catalog import experiments
from ckptd.catalog.tx import Tx
from ckptd.worker.station import WorkerState


def tell_disk(tx: Tx, worker: WorkerState | None, mount: str, free_bytes: float, floor_bytes: float) -> None:
    """Tell that less is free on a mount than [alerts] asks for; the floor of [disk] has disk.relief. Emits disk.low."""
    data = {
        "mount": mount,
        "filesystem": "" if worker is None else worker.filesystem,
        "roots": [] if worker is None else sorted(worker.roots),
        "free_bytes": int(free_bytes),
        "floor_bytes": int(floor_bytes),
    }
    tx.tell("disk.low", data)


async def tell_stalled(tx: Tx, experiment_id: str, quiet_s: float) -> None:
    """Tell that a running experiment has made no step for so long. NotFound. Emits experiment.stalled."""
    row = await experiments.get(tx.conn, experiment_id)
    data = {"project": row.project, "name": row.name, "step": row.last_step, "pid": row.facts.get("pid")}
    tx.tell("experiment.stalled", {**data, "quiet_s": round(quiet_s, 1)}, experiment=row.id)
