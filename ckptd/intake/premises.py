"""What one daemon holds alone: its state directory, and the name of its socket."""

import fcntl
import os
import socket
import stat
from pathlib import Path

import structlog

from ckptd.config import Settings
from ckptd.errors import AlreadyRunning, BadConfig
from ckptd.web import Door
from ckptd_client import places

log = structlog.get_logger()

SOCKET_NAME = "ckptd.socket"
_PROBE_S = 1.0
_WEB_UMASK, _WEB_BACKLOG = 0o117, 64
_UMASK = {"user": 0o177, "system": 0o111}  # in system mode everybody may connect; the kernel says who it is


def lock(state_dir: Path) -> int:
    """Hold the state directory for this process. AlreadyRunning names the holder; BadConfig when it can't be made."""
    try:
        places.ensure_private_dir(str(state_dir))
        os.chmod(state_dir, 0o700)  # catalog and spooled models are nobody else's to read either
        (state_dir / "spool").mkdir(mode=0o700, exist_ok=True)
        fd = os.open(state_dir / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except places.PlaceError as error:
        raise BadConfig(str(error)) from error
    except OSError as error:
        raise BadConfig(f"the state directory {state_dir} can't be used: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise AlreadyRunning(f"process {holder} holds {state_dir}", holder=holder) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def listening(passed: list[tuple[str, int]], path: Path, mode: str) -> tuple[socket.socket, list[tuple[str, int]]]:
    """Take the listening socket out of the passed descriptors, or make one where nobody passed any.

    Returns it and the other descriptors. AlreadyRunning when somebody serves the name; BadConfig when
    something else has it, or it can't be made.
    """
    fd = _door(passed)
    if fd is not None:
        return socket.socket(fileno=fd), [other for other in passed if other[1] != fd]
    try:
        places.check_socket_dir(str(path))
    except places.PlaceError as error:
        raise BadConfig(str(error)) from error
    return _bound(path, _UMASK[mode]), passed


def address(passed: list[tuple[str, int]]) -> str | None:
    """Return the path of the listening socket among the passed descriptors, None when nobody passed one that has a path."""
    fd = _door(passed)
    if fd is None:
        return None
    with socket.socket(fileno=os.dup(fd)) as door:
        name = door.getsockname()
    return name if isinstance(name, str) and name.startswith("/") else None


def _door(passed: list[tuple[str, int]]) -> int | None:
    for name, fd in passed:
        if stat.S_ISSOCK(os.fstat(fd).st_mode) and (name == SOCKET_NAME or len(passed) == 1):
            return fd
    return None


def web_doors(settings: Settings) -> list[Door]:
    """Bind what [web] names and listen there. What can't be had is left out and logged: no save needs it."""
    doors = []
    if settings.web.enabled:
        try:
            doors.append(Door(_bound(settings.web_socket, _WEB_UMASK)))
        except (BadConfig, AlreadyRunning) as error:
            log.error("web.no_socket", **error.to_wire())  # noqa: TRY400 - a person must act, and needs no traceback
    if settings.web.enabled and settings.web.port:
        place = (settings.web.host, settings.web.port)
        try:
            family = socket.AF_INET6 if ":" in settings.web.host else socket.AF_INET
            doors.append(Door(socket.create_server(place, family=family), settings.web.token))
        except OSError as error:
            log.error("web.no_port", host=place[0], port=place[1], error=str(error))  # noqa: TRY400 - likewise
    for door in doors:
        door.sock.listen(_WEB_BACKLOG)
        door.sock.setblocking(False)
    return doors


def _bound(path: Path, umask: int) -> socket.socket:
    _clear(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # The mode is set before the name exists: nobody can connect in between.
    before = os.umask(umask)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        hint = "a socket's path has at most 107 bytes, and its directory must exist"
        raise BadConfig(f"no socket can be made at {path}: {error.strerror or error}", hint=hint) from error
    finally:
        os.umask(before)
    return sock


def _clear(path: Path) -> None:
    """Remove the name that a daemon left when it died; nothing else is ever removed."""
    try:
        kind = os.lstat(path).st_mode
    except OSError:
        return  # not there, or binding will say what is wrong
    if not stat.S_ISSOCK(kind):
        raise BadConfig(f"{path} exists and is no socket", hint="choose another `socket`, or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()  # left by a daemon that died
        except OSError as error:
            raise BadConfig(f"{path} can't be asked whether somebody serves it: {error.strerror or error}") from error
        else:
            raise AlreadyRunning(f"somebody serves {path} already")
