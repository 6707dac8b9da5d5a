"""The `ckptd` command: the daemon under a service manager, whichever there is.

Under systemd it becomes the daemon at once: systemd is the supervisor. Elsewhere (a container, a
batch job, a laptop) it stays, small, and does what systemd would: one instance per state directory,
the listening socket, stored descriptors, restarts, watchdog. The daemon can't tell the difference.

It keeps saves in memory for as long as it lives: before it ends, those that no daemon took over go into
the spool (rescue.py). Should the supervisor itself be killed, the kernel sends the daemon SIGTERM: it
drains and exits, for nobody would keep its arenas any more. What it can't finish, trainers submit again
to the next one.
"""

import argparse
import contextlib
import fcntl
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ckptd import __version__
from ckptd.clock import SystemClock
from ckptd.errors import AlreadyRunning, BadConfig, CkptdError, Operator
from ckptd.intake import lastwords
from ckptd.origins.files import places
from ckptd.supervisor import detach, listen
from ckptd.supervisor.mailbox import Mailbox
from ckptd.supervisor.rescue import Rescue
from ckptd.supervisor.say import Voice
from ckptd.supervisor.unit import ENVIRON, Plan, Timing, Unit
from ckptd_client import places as user_places

DAEMON = (sys.executable, "-P", "-m", "ckptd.daemon")
LOCK = "supervisor.lock"
SIGNALLED = 128  # an exit status above it is that, plus the signal's number
SYSTEM_SOCKET_MODE = 0o666  # a system daemon's door is open to all; it looks at each peer's uid


@dataclass(frozen=True, slots=True)
class Flags:
    """The command line. Paths are absolute."""

    config: Path | None
    state_dir: Path | None
    socket: Path | None
    log_format: str | None
    detach: bool
    once: bool

    def to_daemon(self) -> tuple[str, ...]:
        """Return the flags that the daemon gets, as it reads them."""
        given = {
            "--config": self.config,
            "--state-dir": self.state_dir,
            "--socket": self.socket,
            "--log-format": self.log_format,
        }
        return tuple(part for name, value in given.items() if value is not None for part in (name, str(value)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `ckptd` command; return its exit status. Blocks until the daemon is gone, or ready with --detach."""
    flags = _parse(arguments)
    command = (*DAEMON, *flags.to_daemon())
    if is_managed(os.environ, os.getpid()):
        os.execve(command[0], command, {**ENVIRON, **os.environ})  # noqa: S606 - our own interpreter, no shell
    voice = Voice(flags.log_format or "auto")
    try:
        return supervise(flags, command, voice)
    except CkptdError as error:
        voice.refuse(error)
        _leave_word(flags, error)
        return error.exit_code


def _leave_word(flags: Flags, error: CkptdError) -> None:
    """Say it beside the socket too, unless somebody serves there: who was started by a trainer's client has no reader."""
    with contextlib.suppress(CkptdError, user_places.PlaceError):
        socket = flags.socket or Path(user_places.socket_path())
        if not listen.answers(socket):
            lastwords.leave(str(socket), error, keeper=0)


def _speak_for(socket: str, code: int) -> None:
    """Say beside the socket that daemons end before they serve, where they die too early to say why themselves."""
    words = lastwords.find(user_places.named_place(socket))
    if words is None or words.error.code == Operator.code:  # nothing was said, or by us of the one before
        how = f"signal {code - 128}" if code > SIGNALLED else f"status {code}"
        hint = "its log says more; an upgrade that was cut short, or a lack of memory, ends it like this"
        lastwords.leave(
            socket, Operator(f"the daemon ended with {how} before it served", hint=hint), keeper=os.getpid()
        )


def supervise(flags: Flags, command: tuple[str, ...], voice: Voice, timing: Timing | None = None) -> int:
    """Be the service manager of `command` until it is gone for good; return its exit status.

    With `flags.detach` the caller's process returns as soon as the daemon is ready, and another goes on.
    AlreadyRunning when another supervisor holds the state directory or somebody answers at the
    socket; BadConfig or BadPath when a place can't be used. Blocks.
    """
    _make_places_absolute()
    where = places(flags.config, os.environ, {"state_dir": flags.state_dir, "socket": flags.socket})
    try:
        user_places.ensure_state_dir(str(where.state_dir))
    except user_places.PlaceError as error:
        raise BadConfig(str(error), hint="name another directory with --state-dir or CKPTD_DIR") from error
    # Everything that may be refused happens before the fork, where somebody still reads our stderr. The
    # lock and the socket belong to the open descriptions, so the child keeps both when we exit.
    lock = _lock(where.state_dir)
    listener = listen.bind(where.socket, mode=SYSTEM_SOCKET_MODE if where.mode == "system" else 0o600)
    lastwords.clear(str(where.socket))  # of a time before us; what is said from here on is about this start
    background = detach.Foreground()
    if flags.detach:
        forked = detach.fork(Path(user_places.log_path(str(where.state_dir))), str(where.socket))
        if isinstance(forked, int):
            return forked
        background = forked
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    mailbox = Mailbox(where.state_dir)
    plan = Plan(
        command,
        voice.say,
        once=flags.once,
        timing=timing or Timing(),
        on_ready=background.ready,
        on_beat=background.trim,
        on_stillborn=partial(_speak_for, str(where.socket)),
        rescue=Rescue(where.state_dir, voice.say).run,
    )
    try:
        return Unit(plan, listener, mailbox, SystemClock()).run()
    finally:
        mailbox.close()
        listen.remove(where.socket, listener)
        os.close(lock)


def is_managed(environ: Mapping[str, str], pid: int) -> bool:
    """Say whether process `pid` was started by systemd itself, and not by something that systemd started.

    The variables alone prove nothing: every shell of a desktop session inherits INVOCATION_ID.
    """
    if str(pid) in {environ.get("SYSTEMD_EXEC_PID"), environ.get("LISTEN_PID") if "LISTEN_FDS" in environ else None}:
        return True
    if not any(environ.get(key) for key in ("NOTIFY_SOCKET", "LISTEN_FDS", "INVOCATION_ID")):
        return False
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        parent = status.rpartition(")")[2].split()[1]  # the name before it may hold anything
        return Path(f"/proc/{parent}/comm").read_text(encoding="utf-8", errors="replace").strip() == "systemd"
    except OSError:
        return False


def _parse(arguments: Sequence[str] | None) -> Flags:
    parser = argparse.ArgumentParser(prog="ckptd", description="Takes checkpoints off the training process.")
    parser.add_argument("--version", action="version", version=f"ckptd {__version__}")
    parser.add_argument(
        "--config", type=_path, metavar="FILE", help="read this file instead of $CKPTD_CONFIG and the usual ones"
    )
    parser.add_argument("--state-dir", type=_path, metavar="DIR", help="catalog, spool and token; node-local")
    parser.add_argument("--socket", type=_path, metavar="PATH", help="where clients connect")
    parser.add_argument("--log-format", choices=("auto", "json", "console"), help="default: auto")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--foreground", action="store_true", help="stay in the foreground (the default)")
    place.add_argument("--detach", action="store_true", help="go to the background; return once ready")
    parser.add_argument("--once", action="store_true", help="don't restart the daemon, whatever it dies of")
    given = parser.parse_args(arguments)
    return Flags(given.config, given.state_dir, given.socket, given.log_format, detach=given.detach, once=given.once)


def _path(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))


def _make_places_absolute() -> None:
    """The daemon's working directory is "/": what our caller gave relative to ours must be absolute by then."""
    for name in ("CKPTD_DIR", "CKPTD_SOCKET", "CKPTD_STATE_DIR"):
        if os.environ.get(name):
            os.environ[name] = str(_path(os.environ[name]))


def _lock(state_dir: Path) -> int:
    """Take the state directory for this supervisor; the kernel lets go of it when the process dies, however it does.

    AlreadyRunning with the holder's pid, from the lock file, where flock says that there is one.
    """
    path = state_dir / LOCK
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        pid = int(holder) if holder.isdigit() else None
        message = f"ckptd already runs on {state_dir}" + (f" (pid {pid})" if pid else "")
        raise AlreadyRunning(message, hint="`ckpt status` asks it how it is", pid=pid) from error
    return lock
