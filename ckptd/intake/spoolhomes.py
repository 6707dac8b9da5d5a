"""Where spools lie: the daemon's own, and below it one for each other user of a shared daemon.

    <state_dir>/spool/            the daemon's user's, and what the daemon itself spills
    <state_dir>/spool/<uid>/      a user's own: 0700, made by the daemon at that user's first hello

Only a daemon of root's makes the latter, for only root can give a directory away; then the two above them can be
passed through (0711), and still only the daemon lists them or makes names there.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import anyio.to_thread
import structlog

from ckptd_client import spool

log = structlog.get_logger()

PASSED_THROUGH, OWN = 0o711, 0o700


class Home(NamedTuple):
    """One spool, and whose files alone are taken from it; uid None: whoever could make a name there."""

    directory: str
    uid: int | None


def of(directory: str, uid: int) -> str:
    """Return the spool of a user, below the daemon's."""
    return directory if uid == os.getuid() else os.path.join(directory, str(uid))


def make(directory: str, uid: int) -> str:
    """Return the spool of a user, made if need be. Blocks. "": that user can't have one here; OSError."""
    mine = of(directory, uid)
    if mine == directory:
        return mine
    if os.getuid() != 0:
        return ""
    for above in (os.path.dirname(directory), directory):
        os.chmod(above, PASSED_THROUGH)
    # Nobody but the daemon makes names in `directory`, so what lies there is what the daemon made.
    with contextlib.suppress(FileExistsError):
        os.mkdir(mine, OWN)
    os.chown(mine, uid, -1, follow_symlinks=False)
    return mine


async def at_hello(state_dir: str, uid: int, mode: str) -> str:
    """Tell a client where it may leave what this daemon can't take; "": nowhere that this daemon would look."""
    directory = os.path.join(state_dir, "spool")
    if uid == os.getuid():
        return directory
    if mode != "system":
        return ""
    try:
        return await anyio.to_thread.run_sync(make, directory, uid)
    except OSError as error:
        log.warning("spool.no_home", uid=uid, error=str(error))
        return ""


def used_bytes(directory: str) -> int:
    """Return the bytes that all spools hold. Blocks."""
    return sum(spool.used_bytes(home.directory) for home in every(directory))


def every(directory: str) -> Iterator[Home]:
    """Yield each spool. Blocks for one listing. OSError when the daemon's own can't be read; a missing one is empty."""
    yield Home(directory, None)
    try:
        with os.scandir(directory) as listing:
            found = [entry.name for entry in listing if entry.name.isdecimal() and entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for name in sorted(found):
        yield Home(os.path.join(directory, name), int(name))


def entries(directory: str) -> Iterator[tuple[spool.Spooled, int | None]]:
    """Yield what lies in every spool, and whose it has to be. Blocks; OSError."""
    for home in every(directory):
        for entry in spool.entries(home.directory):
            yield entry, home.uid
