"""Starting a missing daemon, as sccache and watchman do. Only ever at a user's own socket.

The daemon outlives the trainer: it gets its own session and is no child of the trainer's, so that
a trainer which waits for any child, or is killed with its process group, has nothing to do with it.
"""

import fcntl
import importlib.util
import os
import subprocess
import sys
from typing import Callable, Dict, List, Optional

from ckptd_client import places

START_S = 3.0  # how long a client waits for the socket of a daemon it started
_DAEMON_PYTHON = (3, 11)
# Belongs to whoever started the trainer; a daemon that took it would speak to the wrong supervisor.
_NOT_PASSED_ON = ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
# The shell starts the daemon in the background and leaves: the daemon then belongs to init.
_DETACH = '"$@" &'


def is_allowed() -> bool:
    """Say whether the user lets clients start a daemon: CKPTD_AUTOSTART=0 forbids it."""
    return os.environ.get("CKPTD_AUTOSTART", "1").lower() not in ("0", "no", "false", "off")


def command() -> Optional[List[str]]:
    """Return how to start the daemon that belongs to this installation, None when there is none.

    The package when this interpreter can import it, else `ckptd` beside the interpreter, else on PATH.
    """
    spec = importlib.util.find_spec("ckptd")
    if spec is not None and spec.origin and sys.version_info >= _DAEMON_PYTHON:
        return [sys.executable, "-m", "ckptd"]
    directories = [os.path.dirname(sys.executable), *os.environ.get("PATH", "").split(os.pathsep)]
    for directory in filter(os.path.isabs, directories):
        program = os.path.join(directory, "ckptd")
        if os.path.isfile(program) and os.access(program, os.X_OK):
            return [program]
    return None


def start(place: places.SocketPlace, state: str, *, wait_for: Callable[[float], bool]) -> str:
    """Start a daemon that listens at `place`; return "" or why it could not be done.

    state     the state directory, for the log and the lock
    wait_for  is called with a limit in seconds and returns whether a daemon answers by then; 0 asks once

    Several processes may call this at once (the ranks of one node): one starts it, all wait.
    Blocks for at most START_S and the moment the start takes. Never raises.
    """
    program = command()
    if program is None:
        return "no daemon is installed here (neither the ckptd package nor a `ckptd` on PATH)"
    try:
        places.ensure_state_dir(state)
        places.ensure_socket_dir(place.path)
        lock = os.open(os.path.join(state, "autostart.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (OSError, places.PlaceError) as error:
        return f"can't start a daemon: {error}"
    try:
        # Asked again under the lock: whoever held it before may have started one.
        if _is_first(lock) and not wait_for(0.0):
            _launch(program, state, place.path)
        return (
            ""
            if wait_for(START_S)
            else f"a started daemon did not answer within {START_S} s; see {places.log_path(state)}"
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"can't start {program[0]}: {error}"
    finally:
        os.close(lock)


def _is_first(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _launch(program: List[str], state: str, socket_path: str) -> None:
    log = os.open(places.log_path(state), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        subprocess.run(
            ["/bin/sh", "-c", _DETACH, "ckptd", *program],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_environment(socket_path),
            start_new_session=True,
            timeout=START_S,
        )
    finally:
        os.close(log)


def _environment(socket_path: str) -> Dict[str, str]:
    """Return what the daemon inherits. A socket is named only where the rules would lead it elsewhere:
    a variable would outrank the user's configuration file.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    if socket_path != places.socket_path():
        kept["CKPTD_SOCKET"] = socket_path
    # `python -m ckptd` must find the package from "/" when it was found through a relative sys.path entry.
    if any(path and not os.path.isabs(path) for path in kept.get("PYTHONPATH", "").split(os.pathsep)):
        kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in kept["PYTHONPATH"].split(os.pathsep) if p)
    return kept
