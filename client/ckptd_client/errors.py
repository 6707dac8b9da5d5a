"""What can go wrong for a caller of the client, typed by what the caller can do about it.

CkptdClientError      everything below
  UnsupportedValue    the state holds an object that this format can't keep: change the state, or format="torch"
  StateMismatch       `into=` and the checkpoint disagree (a name, a shape, a dtype): nothing was changed
  MissingPart         a part that was asked for is not in the checkpoint
  CorruptCheckpoint   the bytes on the disk are not those that were written: load `newest_good` instead
  NotFound            no checkpoint answers to the selector
  Unavailable         no daemon can be reached, or what is asked needs one
  Refused             the daemon (or an arena) said no; `code` is stable, `hint` says what to do
  TimedOut            the bound passed; the save goes on
"""

from typing import Optional


class CkptdClientError(Exception):
    """Base of all errors that the client raises on purpose."""


class UnsupportedValue(CkptdClientError):
    """The state holds something that can't be kept exactly; `where` is its path in the state."""

    def __init__(self, reason: str, where: str = "state", *, hint: str = 'pass format="torch"') -> None:
        """Say what is wrong, at which path, and the way out."""
        super().__init__(reason)
        self.reason = reason
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        """Lead with the path, since that is what has to be looked at."""
        return f"{self.where}: {self.reason} ({self.hint})" if self.hint else f"{self.where}: {self.reason}"


class StateMismatch(CkptdClientError):
    """What is to be filled and what was stored differ; nothing was changed. `where` is the path."""

    def __init__(self, reason: str, where: str) -> None:
        """Say how the two differ, and at which path."""
        super().__init__(f"{where}: {reason}")
        self.reason = reason
        self.where = where


class MissingPart(CkptdClientError):
    """A file or key that was asked for is not in the checkpoint; `part` names it."""

    def __init__(self, reason: str, part: str, path: str = "") -> None:
        """Say which part of the checkpoint at `path` is missing."""
        super().__init__(reason)
        self.part = part
        self.path = path


class CorruptCheckpoint(CkptdClientError):
    """Stored bytes are not what was written.

    `path` is the checkpoint, `file` the damaged file in it, `detail` what is known about the place
    (which MiB, which tensors), `newest_good` the path of another checkpoint of the experiment that
    was just read back whole, or None.
    """

    def __init__(self, path: str, file: str, detail: str, newest_good: Optional[str] = None) -> None:
        """Name the checkpoint, the file, the damage and the way on."""
        super().__init__(path, file, detail)
        self.path = path
        self.file = file
        self.detail = detail
        self.newest_good = newest_good

    def __str__(self) -> str:
        """Name file and damage, then the checkpoint to load instead."""
        way_on = f"; newest intact checkpoint: {self.newest_good}" if self.newest_good else ""
        return f"{self.path}: {self.file} is damaged: {self.detail}{way_on}"


class NotFound(CkptdClientError):
    """No checkpoint answers to the selector."""


class Unavailable(CkptdClientError):
    """No daemon can be reached, or what was asked for needs one."""


class Refused(CkptdClientError):
    """The daemon or an arena refused; `code` is stable, `hint` tells what to do."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        """Carry the three parts of an error reply."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Put the code first, so that it can be searched for."""
        return f"[{self.code}] {self.message}" + (f" ({self.hint})" if self.hint else "")


class TimedOut(CkptdClientError):
    """The bound of a wait passed; what was waited for may still happen."""
