"""doctor: everything that usually goes wrong, each with what to do about it."""

import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click

from ckptd import __version__
from ckptd.cli import render
from ckptd.cli.daemon_socket import connect, places
from ckptd.cli.options import Output, output, verb
from ckptd.clock import SystemClock
from ckptd.errors import BadConfig, CkptdError
from ckptd_client import places as rules

SLOW_MS = 100.0

Check = dict[str, Any]


@verb(
    ("ckpt doctor", "everything, with hints"),
    ("ckpt doctor -q", "only what is wrong; its exit code makes a liveness probe"),
    ("ckpt doctor --json | jq '.checks[] | select(.status != \"ok\")'", "for a program"),
)
@click.option("-q", "--quiet", is_flag=True, help="Print only what is not ok.")
@output()
def doctor(out: Output, *, quiet: bool) -> int:
    """Check everything that usually goes wrong; exit 1 when something has.

    Warnings leave the exit code at 0.
    """
    checks = list(_checks())
    failed = any(check["status"] == "fail" for check in checks)
    if not out.json({"ok": not failed, "checks": checks}):
        for check in checks:
            if not quiet or check["status"] != "ok":
                render.print_lines(out.screen, check_lines(check, out.screen))
    return CkptdError.exit_code if failed else 0


def check_lines(check: Check, screen: render.Screen) -> list[str]:
    """Set one check as a line, and its hint as another when it is not ok."""
    word = screen.paint(f"{check.get('status', ''):<4}", check.get("status"))
    lines = [f"{word}  {render.escape(check.get('name'))}: {render.escape(check.get('detail') or '')}"]
    if check.get("status") != "ok" and check.get("hint"):
        lines.append(f"      hint: {render.escape(check['hint'])}")
    return lines


def _checks() -> Iterator[Check]:
    """Yield our own checks, then the daemon's. It is asked first: where its state lies only it can say for sure."""
    theirs, state = _asked()
    yield _looked("configuration", _configuration)
    yield _looked("state directory", partial(_state, state=state))
    yield _looked("socket", _socket)
    yield from theirs


def _asked() -> tuple[list[Check], str]:
    """Return what is to be said of the daemon, its own checks among it, and its state directory or what would be it."""
    clock = SystemClock()
    started = clock.monotonic_s()
    try:
        with connect() as daemon:
            found = daemon.request("doctor")
            hello = daemon.hello or {}
            version = str(hello.get("server", "")).rpartition("/")[2]
            took_ms = (clock.monotonic_s() - started) * 1000
            answers = _check("daemon", f"answers at {daemon.place} in {took_ms:.0f} ms, version {version}")
            checks = [answers, _versions(version), *found["checks"]]
            # Another user's, as all users' daemon has, is not ours to look into.
            is_ours = hello.get("uid") == os.getuid() and isinstance(hello.get("state_dir"), str)
            return checks, hello["state_dir"] if is_ours else rules.state_dir()
    except CkptdError as error:
        return [_check("daemon", error.message, status="fail", hint=error.hint)], rules.state_dir()


def _versions(version: str) -> Check:
    if version == __version__:
        return _check("versions", f"ckpt and daemon are both {version}")
    hint = "restart the daemon after an upgrade"
    return _check("versions", f"ckpt is {__version__}, the daemon {version}", status="warn", hint=hint)


def _check(name: str, detail: str, *, status: str = "ok", hint: str = "") -> Check:
    return {"name": name, "status": status, "detail": detail, "hint": hint}


def _looked(name: str, look: Callable[[str], Check]) -> Check:
    try:
        return look(name)
    except CkptdError as error:
        return _check(name, error.message, status="fail", hint=error.hint)
    except rules.PlaceError as error:
        return _check(name, str(error), status="fail")
    except OSError as error:
        return _check(name, f"{error.filename}: {error.strerror}", status="fail")


def _socket(name: str) -> Check:
    """Look at the sockets that clients try: is one there, and is it closed to others?"""
    for place in places():
        if not os.path.lexists(place.path):
            continue
        found = os.stat(place.path)
        if not stat.S_ISSOCK(found.st_mode):
            return _check(name, f"{place.path} is no socket", status="fail", hint="remove it, or name another")
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o006 and place.own:
            hint = f"chmod 600 {place.path}; the daemon makes it so when it starts"
            return _check(name, f"{place.path} is open to everybody (mode {mode:04o})", status="warn", hint=hint)
        parent = os.path.dirname(place.path)
        above = os.stat(parent)
        if above.st_uid not in {0, os.getuid()} or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
            detail = f"{parent} belongs to uid {above.st_uid}, mode {stat.S_IMODE(above.st_mode):04o}"
            hint = (
                f"chown it to you or root and chmod go-w {parent}: who may write there can serve in the daemon's place"
            )
            return _check(name, detail, status="fail", hint=hint)
        return _check(name, f"{place.path}, mode {mode:04o}, owner uid {found.st_uid}")
    tried = ", ".join(place.path for place in places())
    return _check(name, f"no socket at {tried}", status="fail", hint="start a daemon with `ckptd`")


def _state(name: str, *, state: str) -> Check:
    """Look at the state directory: ours alone, and on a local file system."""
    if not os.path.isdir(state):
        return _check(name, f"{state} does not exist yet; the daemon makes it")
    rules.check_private_dir(state)
    network = rules.network_type(state)
    if network:
        hint = "set CKPTD_DIR to a directory on a local disk of this node"
        return _check(name, f"{state} is on {network}, where SQLite can't work", status="fail", hint=hint)
    waiting = rules.spool_dir(state)
    return _check(name, f"{state} ({rules.filesystem_type(state) or 'unknown type'}), {_waiting(waiting)}")


def _waiting(spool_dir: str) -> str:
    from ckptd_client import spool

    count = sum(1 for _ in spool.entries(spool_dir))
    return f"{count} waiting in the spool" if count else "the spool is empty"


def _configuration(name: str) -> Check:
    """Read the configuration as the daemon would."""
    from ckptd.cli.configuring import load

    try:
        loaded = load()
    except BadConfig as error:
        return _check(name, error.message.replace("\n", " "), status="fail", hint=error.hint)
    if loaded.problems:
        return _check(name, "; ".join(loaded.problems), status="warn", hint="`ckpt config show --origin`")
    return _check(name, f"valid: {', '.join(map(str, loaded.files)) or 'defaults only'}")
