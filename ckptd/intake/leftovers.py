"""What lies in a root's trash and is known to nobody, so that nothing will ever unlink it.

It was moved there by a catalog that is lost since, or is what a repair moved aside that came to nothing, or
somebody put it there. It is named and left alone: nothing is unlinked of which no row says that it may go.
"""

import re

import anyio

from ckptd.catalog import Catalog, tombstones
from ckptd.errors import TimedOut
from ckptd.worker import Workers
from ckptd.worker.trashlist import TrashList, TrashListed

LAIN_S = 3600.0  # what is being moved or unlinked right now is nobody's only for a moment
ANSWER_S = 5.0
KEYS_MAX = 500  # of one statement
# Every name that ckptd gives in a trash bears the id: <id>, <id>.stripped, repair-<id>-1, repair-<id>-1-undone.
_OURS = re.compile(r"(?:repair-)?([0-9a-f]{32})(?:\.stripped|-[0-9]+(?:-undone)?)?")


async def leftovers(catalog: Catalog, workers: Workers, root: str) -> list[str]:
    """Return the names in the trash of `root` that no row answers for, sorted. CkptdError of the worker, TimedOut."""
    with anyio.move_on_after(ANSWER_S):
        listed: TrashListed = await workers.call(TrashList(root=root, older_s=LAIN_S))
        return await _unknown(catalog, listed.names)
    raise TimedOut(f"the trash under {root} was not listed within {ANSWER_S:g} s")


async def _unknown(catalog: Catalog, names: list[str]) -> list[str]:
    by_name = {name: match[1] if (match := _OURS.fullmatch(name)) else "" for name in names}
    ids = sorted({one for one in by_name.values() if one})
    known: set[str] = set()
    for first in range(0, len(ids), KEYS_MAX):
        part = ids[first : first + KEYS_MAX]
        known |= await catalog.read(lambda conn, part=part: tombstones.answered_for(conn, part))  # type: ignore[misc]
    return [name for name, one in by_name.items() if one not in known]
