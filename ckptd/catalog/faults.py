"""What a database error means, and who must act: the driver's words become the error tree's."""

import errno
import sqlite3
from pathlib import Path

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ckptd.errors import Busy, CatalogFault, CkptdError, NoSpace

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR)
_PRIMARY = 0xFF  # the low byte of an extended SQLite code is the error's class
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_UNUSABLE = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_ENDS_TRANSACTION = (*_DAMAGED, *_UNUSABLE, *_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM)

# A quota or a file size limit that stops a write is told by SQLite as an I/O error, as is a shared-memory
# file that can't grow. A failed fsync is not among them: it is never tried again.
_MAY_BE_FULL = (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)

LOCKED_RETRY_S = 1.0
SHORT_RETRY_S = 1.0


def sqlite_code(error: BaseException) -> int | None:
    """Return the primary SQLite result code behind an error; None when there is none."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = _extended_code(error)
    if code is None:
        # "file is not a database" at connect may reach us as a plain DatabaseError without a code.
        is_foreign = isinstance(cause, sqlite3.DatabaseError) and "not a database" in str(cause)
        return sqlite3.SQLITE_NOTADB if is_foreign else None
    return code & _PRIMARY


def _extended_code(error: BaseException) -> int | None:
    code = getattr(error.orig if isinstance(error, DBAPIError) else error, "sqlite_errorcode", None)
    return None if code is None else int(code)


def is_disk_full(error: BaseException) -> bool:
    """Say whether SQLite could not get space, or may have failed for want of it."""
    return sqlite_code(error) == sqlite3.SQLITE_FULL or _extended_code(error) in _MAY_BE_FULL


def ends_transaction(error: BaseException) -> bool:
    """Say whether the whole transaction is lost, not the one statement.

    After these SQLite may have rolled everything back by itself, so that a savepoint no longer exists.
    """
    if isinstance(error, OSError) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return True
    return sqlite_code(error) in _ENDS_TRANSACTION


def rebuild_advice(path: Path | str) -> str:
    """Return what to do with a damaged catalog; the file itself is never touched."""
    return (
        f"the file was left as it is; stop ckptd, move {path} and its -wal and -shm files aside, start ckptd, "
        "and run `ckpt rebuild`: every checkpoint is found again from its manifest"
    )


def explain(error: Exception, where: Path | str) -> CkptdError | None:
    """Translate a database error; None when it is not one that somebody outside the code can mend."""
    if isinstance(error, PoolTimeout):
        return Busy("every reading connection of the catalog is in use", retry_after_s=LOCKED_RETRY_S)
    if isinstance(error, OSError):  # from a driver, on the way to its file or its server
        return _unreached(error, where)
    code = sqlite_code(error)
    if code in _LOCKED:
        return Busy(
            f"another process holds the lock of {where}",
            hint="end the program that has the catalog open for writing; ckptd goes on by itself then",
            retry_after_s=LOCKED_RETRY_S,
        )
    if code == sqlite3.SQLITE_NOMEM:
        return Busy(f"no memory for the catalog {where}", retry_after_s=SHORT_RETRY_S)
    if code == sqlite3.SQLITE_FULL:
        return NoSpace(f"no space for the catalog {where}", path=str(where))
    if code in _DAMAGED:
        return CatalogFault(
            f"the catalog {where} is damaged: {_said(error)}", hint=rebuild_advice(where), path=str(where)
        )
    if code in _UNUSABLE:
        return CatalogFault(
            f"the catalog {where} can't be read or written: {_said(error)}",
            hint="check the permissions of its directory, and the kernel's log for disk errors",
            path=str(where),
        )
    return None


def _said(error: Exception) -> str:
    """Return the database's own words: SQLAlchemy's hold the statement, its parameters and a link."""
    return str(error.orig if isinstance(error, DBAPIError) and error.orig is not None else error)


def _unreached(error: OSError, where: Path | str) -> CkptdError:
    if error.errno in _FULL:
        return NoSpace(f"no space for the catalog {where}", path=str(where))
    if error.errno in _SCARCE:
        return Busy(f"the catalog {where} has to wait: {error.strerror}", retry_after_s=SHORT_RETRY_S)
    hint = "look at the disk or the server under it; what waits for the catalog is tried again"
    return CatalogFault(f"the catalog {where} can't be read or written: {error}", hint=hint, path=str(where))
