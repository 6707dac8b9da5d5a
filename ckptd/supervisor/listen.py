"""The listening socket, made once and kept over every restart of the daemon: clients wait, they don't fail."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from ckptd.errors import AlreadyRunning, BadPath
from ckptd_client import places

BACKLOG = 512
PROBE_S = 1.0


def bind(path: Path, *, mode: int = 0o600) -> socket.socket:
    """Return a socket listening at `path`, non-blocking, with exactly `mode` from its first moment on.

    A path left over by a dead daemon is removed, if it is a socket on which nobody answers.
    BadPath when the path is too long, a symlink or something else; AlreadyRunning when somebody
    answers. Blocks for at most PROBE_S.
    """
    try:
        places.check_socket_path(str(path), "CKPTD_SOCKET")
        places.ensure_socket_dir(str(path))
    except places.PlaceError as error:
        raise BadPath(str(error), path=str(path)) from error
    _clear(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    # Not chmod after bind: between the two anybody could connect. This process has one thread.
    before = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AlreadyRunning(f"another process has just bound {path}", path=str(path)) from error
        raise BadPath(f"can't listen at {path}: {error.strerror}", path=str(path)) from error
    finally:
        os.umask(before)
    return listener


def remove(path: Path, listener: socket.socket) -> None:
    """Close the socket and remove its path, unless another process has put its own there."""
    listener.close()
    if path.is_socket() and not answers(path):
        path.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(found.st_mode):
        raise BadPath(f"{path} is a symlink; refusing to listen behind it", path=str(path))
    if not stat.S_ISSOCK(found.st_mode):
        raise BadPath(f"{path} exists and is no socket; move it away", path=str(path))
    if answers(path):
        raise AlreadyRunning(f"a daemon already answers at {path}", path=str(path))
    path.unlink(missing_ok=True)


def answers(path: Path) -> bool:
    """Say whether somebody listens; one whose queue is full does, and so does one who keeps us waiting."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                raise BadPath(f"{path} is another kind of socket; move it away", path=str(path)) from error
    return True
