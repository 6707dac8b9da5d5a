"""Saves out of a spool that no daemon reads, into the one that is read.

A trainer that never reached the daemon everybody shares leaves its saves in its user's own spool, which that
daemon does not look into. Whoever reaches it later, as the same user, brings them along.
"""

import contextlib
import mmap
import os
from typing import List, Optional

from ckptd_client import spool
from ckptd_client.control import PAGE


def gather(own: str, into: str, spool_bytes_max: int) -> int:
    """Move every whole entry of the spool `own` into the spool `into`, durably; return how many there were.

    Proof of the order: a name in `own` goes once the one in `into` is durable, so that a power cut leaves one or
    both, and the daemon takes a save once however often it is offered. Others may do the same at the same time:
    what is linked or copied is whole, and nobody removes a name in `into`.

    Blocks for as long as the disks take. OSError when one of them could not be brought: it stays, the others came.
    """
    brought: List[spool.Spooled] = []
    failed: Optional[OSError] = None
    has_links = False
    for entry in spool.entries(own):
        try:
            is_linked = _link(entry, into)
            if is_linked or _copy(entry, into, spool_bytes_max):
                brought.append(entry)
                has_links |= is_linked
        except OSError as error:
            failed = failed or error
    if has_links:
        spool.sync_directory(into)
    for entry in brought:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(entry.path)
    if failed is not None:
        raise failed
    return len(brought)


def _link(entry: spool.Spooled, into: str) -> bool:
    """Give one entry its name in `into` as well. False where it has to be copied.

    To another file system, to one without hard links, or over a name that is there already: of that nobody knows
    whether it is durable, for its fsync may have failed; what is renamed over it will be.
    """
    try:
        os.link(entry.path, os.path.join(into, os.path.basename(entry.path)), follow_symlinks=False)
    except OSError:
        return False
    return True


def _copy(entry: spool.Spooled, into: str, spool_bytes_max: int) -> bool:
    """Write one entry anew, durably. False: it is gone, or nothing that a daemon would take."""
    try:
        if entry.kind == "offer":
            request = spool.read_offer(entry.path)
            if request is not None:
                spool.write_offer(into, entry.checkpoint, request)
            return request is not None
        with open(entry.path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if not size_bytes or size_bytes % PAGE:
                return False
            spool.check_room(into, size_bytes, spool_bytes_max)
            # Never closed by hand: an error holds the view of it, and would be hidden by one about that.
            image = mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ)
            spool.write_arena(into, entry.checkpoint, memoryview(image))
    except FileNotFoundError:
        return False
    return True
