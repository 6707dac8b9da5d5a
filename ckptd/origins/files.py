"""Which configuration files there are, their text as TOML, and where the daemon lives. Standard library only.

The supervisor needs the state directory and the socket before any daemon runs, and must stay small:
it asks here, the daemon asks here, and so both always agree.
"""

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.errors import BadConfig
from ckptd_client import places as user_places

ETC = Path("/etc/ckptd")
VARIABLE = "CKPTD_CONFIG"  # names the only file to read, as the flag does
FILE_BYTES_MAX = 1 << 20
MODES = ("user", "system")
_HEADER = re.compile(r"\s*\[+\s*([^\]]+?)\s*\]+")
_KEY = re.compile(r"\s*([A-Za-z0-9_.\"' -]+?)\s*=")


@dataclass(frozen=True, slots=True)
class Places:
    """Where the daemon lives: absolute paths."""

    mode: str
    state_dir: Path
    socket: Path


@dataclass(frozen=True, slots=True)
class File:
    """One configuration file as written. `lines` says where each dotted key stands, counted from 1."""

    path: Path
    data: dict[str, Any]
    lines: dict[str, int]


def chain(config_file: Path | None, environ: Mapping[str, str], *, user: bool) -> list[Path]:
    """Return the files that may speak, the weakest first; those that don't exist are left out.

    A file that was named, by a flag or else by CKPTD_CONFIG, is the only one, and is in the list even when it does
    not exist. BadConfig for a relative CKPTD_CONFIG: who reads it may have been started in another directory.
    """
    if config_file is not None:
        return [config_file]
    if named := environ.get(VARIABLE):
        return [_absolute(named, VARIABLE)]
    found = [ETC / "config.toml", *sorted((ETC / "conf.d").glob("*.toml"))]
    if user:
        found.append(own(environ))
    return [path for path in found if path.exists()]


def own(environ: Mapping[str, str]) -> Path:
    """Return the user's own file, whether it exists or not."""
    home = environ.get("XDG_CONFIG_HOME", "")
    base = Path(home) if Path(home).is_absolute() else Path(environ.get("HOME", "/nonexistent"), ".config")
    return base / "ckptd" / "config.toml"


def read(path: Path) -> File:
    """Read one file. BadConfig when it can't be read, is no TOML, is too large, or anyone may write it."""
    try:
        with path.open("rb") as opened:
            status = os.fstat(opened.fileno())
            raw = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise BadConfig(f"{path}: {error.strerror}", file=str(path)) from error
    if stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IWOTH:
        raise BadConfig(f"{path}: everybody may write it", hint=f"chmod o-w {path}", file=str(path))
    if len(raw) > FILE_BYTES_MAX:
        raise BadConfig(f"{path}: over {FILE_BYTES_MAX} bytes", file=str(path))
    try:
        text = raw.decode()
        return File(path, tomllib.loads(text), _lines(text))
    except ValueError as error:  # tomllib's and the decoder's errors are ValueErrors
        raise BadConfig(f"{path}: {error}", file=str(path)) from error


def places(
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Places:
    """Say where the daemon lives: flag, environment, files, then ckptd_client.places' rules.

    BadConfig when a file can't be read or a place can't be used. Makes nothing.
    """
    env = os.environ if environ is None else environ
    said: dict[str, Any] = {}
    for path in chain(config_file, env, user=True):
        said.update(read(path).data)
    for key in ("mode", "state_dir", "socket"):
        said[key] = env.get(f"CKPTD_{key.upper()}") or said.get(key)
    said.update({key: value for key, value in (overrides or {}).items() if value is not None})
    return settle(str(said.get("mode") or MODES[0]), said.get("state_dir"), said.get("socket"), env)


def settle(mode: str, state_dir: object, socket: object, environ: Mapping[str, str]) -> Places:
    """Fill in what nobody said. Empty text and the empty path count as unsaid. BadConfig as `places`."""
    own = mode != "system"
    try:
        if not _said(state_dir):
            state_dir = user_places.state_dir(environ) if own else user_places.SYSTEM_STATE_DIR
        if not _said(socket):
            socket = user_places.socket_path(environ) if own else user_places.SYSTEM_SOCKET
        found = Places(mode, _absolute(state_dir, "state_dir"), _absolute(socket, "socket"))
        user_places.check_socket_path(str(found.socket), "socket")
    except user_places.PlaceError as error:
        raise BadConfig(str(error)) from error
    return found


def _said(value: object) -> bool:
    return bool(value) and value != Path()


def _absolute(value: object, key: str) -> Path:
    path = Path(str(value)).expanduser()
    if not path.is_absolute():
        raise BadConfig(f"{key} must be an absolute path, not {str(value)!r}", key=key)
    return path


def _lines(text: str) -> dict[str, int]:
    """Say on which line each key is first given; good enough to point a person there, never parsed for values."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line)
        if header and "=" not in line.split("]")[0]:
            table = _plain(header[1])
            if line.lstrip().startswith("[["):
                counts[table] = counts.get(table, -1) + 1
                table = f"{table}.{counts[table]}"
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            name = _plain(key[1])
            found.setdefault(f"{table}.{name}" if table else name, number)
    return found


def _plain(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))
