"""Holds of readers as the catalog has them: one row for each read, whose holder says which process it is.

    pid 4711 since 812345 at 1f2e3d4c, read 6f1c0e...   a process that is seen to end: while it lives, the row is renewed
    unseen process, read 6f1c0e...                      any other: renewed while the connection stands that it came by

The rows are all that a daemon needs to know of reads that began before it was started. A pid means something in its own
place only, which is a boot of a machine and a pid namespace: rows of another place are its own daemon's, or run out.
"""

import hashlib
import os
import re
from collections.abc import Collection
from datetime import timedelta
from functools import cache
from pathlib import Path

from sqlalchemy import delete, select, update

from ckptd.catalog import schema
from ckptd.catalog.keys import one_of
from ckptd.catalog.tx import Tx
from ckptd_client import control

READ_LEASE_S = 3600.0
RENEW_AFTER_S = READ_LEASE_S / 4  # several looks may fail before a hold is lost
_PART = 500  # rows that one statement names

_SEEN = re.compile(r"pid (\d+) since (\d+) at ([0-9a-f]{8}), read [0-9a-f]{32}")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_lease = schema.lease.c


@cache
def place() -> str:
    """Return where pids mean what they mean here: this boot of this machine, this pid namespace. Blocks, once."""
    try:
        where = f"{_BOOT.read_text()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        where = os.uname().nodename  # of a daemon without /proc no process is seen
    return hashlib.sha256(where.encode()).hexdigest()[:8]


def of_process(pid: int, ticks: int) -> str:
    """Return how the holders of all reads of a process begin that can be seen."""
    return f"pid {pid} since {ticks} at {place()}, read "


def holder(pid: int, ticks: int, name: str) -> str:
    """Return the holder of the read `name`; `ticks` is 0 for a process that can't be seen."""
    return f"{of_process(pid, ticks)}{name}" if ticks else f"unseen process, read {name}"


async def look_after(tx: Tx, standing: Collection[str] = ()) -> dict[int, int]:
    """Renew the holds of processes that live and those in `standing`, end those of dead ones.

    Returns the living: start times by pid. Also what ran out while no daemon was there is renewed: its reader reads on.
    """
    going: list[str] = []
    gone: list[str] = []
    living: dict[int, int] = {}
    for row in await tx.conn.execute(select(_lease.holder)):
        found = _SEEN.fullmatch(row.holder)
        if found is None or found[3] != place():
            going += [row.holder] if row.holder in standing else []
            continue
        pid, ticks = int(found[1]), int(found[2])
        if living.get(pid) == ticks or control.is_alive(pid, ticks):
            living[pid] = ticks
            going.append(row.holder)
        else:
            gone.append(row.holder)
    until = tx.clock.now() + timedelta(seconds=READ_LEASE_S)
    for part in _parts(going):
        await tx.conn.execute(update(schema.lease).where(one_of(_lease.holder, part)).values(until=until))
    await release(tx, gone)
    return living


async def release(tx: Tx, holders: Collection[str]) -> None:
    """End these holds; those that are not there are ended."""
    for part in _parts(holders):
        await tx.conn.execute(delete(schema.lease).where(one_of(_lease.holder, part)))


def _parts(holders: Collection[str]) -> list[list[str]]:
    listed = list(holders)
    return [listed[at : at + _PART] for at in range(0, len(listed), _PART)]
