"""Why the last daemon ended, left beside the socket for whoever finds that nobody answers there.

A daemon that can't start has nobody to tell: the service manager holds the door open, so connecting succeeds, and
behind it nobody speaks. Its log has the reason, but who types `ckpt status` knows the socket and not the log.
So the reason lies beside the socket, from the daemon's end until the next one serves:

    <socket>.error            {"v": 1, "at": …, "socket": …, "keeper": pid, "error": {"code", "message", "hint"}}, 0600
    <state>/daemon.error      the same, where the socket's directory is not the daemon's to write (ckptd@.service);
                              <state> is the user's own by the rules of places.py, which both sides know

A hint and no promise: written without an fsync, in one write to a new file, and what can't be read whole is as if it
were not there. Only the owner reads it, as only he reads the log: a message may quote a configuration.
Nothing here needs more than the standard library: the command line and the supervisor start with it.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ckptd.clock import SystemClock
from ckptd.errors import Bug, CkptdError, Denied, from_wire
from ckptd_client import places, wire

FILE_BYTES_MAX = 64 << 10
TEXT_CHARS_MAX = 2000  # of message and of hint; each may take 12 bytes a character in JSON, and must fit

_PROGRAM_WORDS = 4  # python -P -m ckptd, or python /…/bin/ckptd
_SUFFIX, _HOME_NAME = ".error", "daemon.error"
_HINT_UNREAD = "run `ckpt doctor` as that user, or ask whoever looks after the daemon"


@dataclass(frozen=True, slots=True)
class LastWords:
    """What ended the last daemon.

    at      when, ISO 8601 in UTC
    keeper  the pid of ckptd's own supervisor, which tries again; None where it has ended too, or systemd is it
    """

    error: CkptdError
    at: str
    keeper: int | None = None


@contextlib.contextmanager
def left(socket: str | None) -> Iterator[None]:
    """Leave word of whatever error ends the daemon; it goes on its way.

    socket  the path of the socket that the service manager holds; None: nobody holds one, nobody could be left waiting
    """
    try:
        yield
    except (Exception, BaseExceptionGroup) as error:
        if socket is not None:
            leave(socket, cause(error))
        raise


def leave(socket: str, error: CkptdError, *, keeper: int | None = None) -> None:
    """Write the words of the daemon at `socket`. Where no place takes them the log alone has them. Blocks for two small files.

    keeper  the process that tries again; None: the caller's parent, 0: nobody does
    """
    told = {"code": error.code, "message": error.message[:TEXT_CHARS_MAX], "hint": error.hint[:TEXT_CHARS_MAX]}
    at = SystemClock().now().isoformat()
    raw = wire.encode(
        {"v": 1, "at": at, "socket": socket, "keeper": os.getppid() if keeper is None else keeper, "error": told}
    )
    for path in _candidates(socket):
        with contextlib.suppress(OSError):  # read-only, full, or another user's: the next place
            _write(path, raw)
            return


def clear(socket: str) -> None:
    """Take back what earlier daemons at `socket` said: one serves, or is about to be started."""
    beside, at_home = _candidates(socket)
    if _about(at_home, socket):
        _remove(at_home)
    _remove(beside)


def find(place: places.SocketPlace) -> LastWords | None:
    """Return what ended the last daemon at `place`, None when nothing is known. Believes only whom `place` trusts."""
    for path in _candidates(place.path):
        found = _read(path, place)
        if found is not None:
            return found
    return None


def cause(error: BaseException) -> CkptdError:
    """Return the error a person is told when `error` ends the daemon: the first of ours in it, else a Bug."""
    first = next((each for each in _flat(error) if isinstance(each, CkptdError)), None)
    return first or Bug(f"{type(error).__name__}: {error}")


def _flat(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _flat(each)
    else:
        yield error


def _candidates(socket: str) -> tuple[str, str]:
    return socket + _SUFFIX, os.path.join(places.state_dir(), _HOME_NAME)


def _write(path: str, raw: bytes) -> None:
    # Never through what lies there: in a directory like /tmp it may be another user's link. Removed, or refused by EXCL.
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        written = os.write(fd, raw)
    finally:
        os.close(fd)
    if written < len(raw):
        Path(path).unlink()
        raise OSError(f"{path}: {written} of {len(raw)} bytes were taken")


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):  # another user's, whom no reader believes; or not there
        Path(path).unlink()


def _read(path: str, place: places.SocketPlace) -> LastWords | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        return _unread(path, place)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in place.servers:
            return None
        found = wire.decode(os.read(fd, FILE_BYTES_MAX))
    except (OSError, wire.FrameError):
        return None
    finally:
        os.close(fd)
    error, at = found.get("error"), found.get("at")
    if not isinstance(error, dict) or not isinstance(at, str) or not _is_for(found, path, place.path):
        return None
    return LastWords(from_wire(error), at, _keeper(found.get("keeper")))


def _keeper(pid: object) -> int | None:
    """Return `pid` when it is a ckptd's: a person may be told to end it, and the number may be another's by now."""
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as words:
            program = words.read(FILE_BYTES_MAX).split(b"\0")[:_PROGRAM_WORDS]
    except OSError:
        return None
    return pid if any(os.path.basename(word) == b"ckptd" for word in program) else None


def _unread(path: str, place: places.SocketPlace) -> LastWords | None:
    """There is a reason, and it is another's to read: of a daemon for all users."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in place.servers:
        return None
    at = datetime.fromtimestamp(status.st_mtime, UTC).isoformat()
    return LastWords(Denied(f"why is in {path}, for uid {status.st_uid} to read", hint=_HINT_UNREAD), at)


def _about(path: str, socket: str) -> bool:
    """Whether what lies at `path` is about `socket`: a user may have several daemons, and has one home."""
    own = places.SocketPlace(socket, (os.getuid(),), own=True)
    return _read(path, own) is not None


def _is_for(found: wire.Message, path: str, socket: str) -> bool:
    if path == socket + _SUFFIX:
        return True  # whatever path leads there: a container may see the directory under another one
    said = found.get("socket")
    return isinstance(said, str) and "\0" not in said and os.path.realpath(said) == os.path.realpath(socket)
