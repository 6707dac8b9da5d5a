"""Where ckptd's files are: state directory, spool, socket. The daemon, the CLI and the client share these rules.

    state directory   $CKPTD_DIR
                      $XDG_STATE_HOME/ckptd, else ~/.local/state/ckptd
                      /tmp/ckptd-<uid>   when the one above is on a network file system or can't be written
    socket            $CKPTD_SOCKET
                      $XDG_RUNTIME_DIR/ckptd.sock
                      /tmp/ckptd-<uid>/ckptd.sock
    system daemon     /var/lib/ckptd and /run/ckptd/ckptd.sock

State is node-local: SQLite's WAL does not work on network file systems, and two nodes that share a
home must not share a catalog. /tmp and not $TMPDIR: a trainer under a batch system and a person's
shell have different $TMPDIRs and must still meet.

The environment is a parameter everywhere, so that a test or a daemon may ask for another one.
"""

import os
import stat
from typing import List, Mapping, NamedTuple, Optional, Tuple

SOCKET_PATH_BYTES_MAX = 107  # sun_path is 108 bytes and ends with a zero byte
SYSTEM_STATE_DIR = "/var/lib/ckptd"
SYSTEM_SOCKET = "/run/ckptd/ckptd.sock"
TEMP = "/tmp"  # noqa: S108 - the directory below it is made 0700 and its owner is checked

_MOUNTINFO = "/proc/self/mountinfo"
_NETWORK = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "beegfs_nodev",
        "ceph",
        "cifs",
        "coda",
        "daosfs",
        "gfs2",
        "gpfs",
        "lustre",
        "mmfs",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "panfs",
        "pvfs2",
        "smb2",
        "smb3",
        "smbfs",
        "wekafs",
    ]
)
# FUSE file systems are taken for remote ones unless they are known to lie on a local disk.
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.bindfs", "fuse.encfs", "fuse.gocryptfs"})


class PlaceError(ValueError):
    """A directory or socket path can't be used; the message says why and which variable to set."""


class SocketPlace(NamedTuple):
    """One address to try, and the uids that may serve it.

    `own` is true where a missing daemon may be started: everywhere but at the system's socket.
    """

    path: str
    servers: Tuple[int, ...]
    own: bool


def state_dir(environ: Optional[Mapping[str, str]] = None) -> str:
    """Return the state directory of this user's daemon; it need not exist yet.

    Reads mountinfo and looks at the home directory; makes nothing.
    """
    env = os.environ if environ is None else environ
    if env.get("CKPTD_DIR"):
        return os.path.abspath(os.path.expanduser(env["CKPTD_DIR"]))
    base = env.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative value is ignored
        base = os.path.join(_home(env), ".local", "state")
    place = os.path.join(base, "ckptd")
    if network_type(place) or not _can_make(place):
        return fallback_dir()
    return place


def socket_path(environ: Optional[Mapping[str, str]] = None) -> str:
    """Return the socket of this user's daemon: where it listens and where clients look first.

    PlaceError  the path is longer than the kernel allows
    """
    env = os.environ if environ is None else environ
    if env.get("CKPTD_SOCKET"):
        return check_socket_path(os.path.abspath(env["CKPTD_SOCKET"]), "CKPTD_SOCKET")
    if os.path.isabs(env.get("XDG_RUNTIME_DIR", "")):
        return check_socket_path(os.path.join(env["XDG_RUNTIME_DIR"], "ckptd.sock"), "XDG_RUNTIME_DIR")
    return check_socket_path(os.path.join(fallback_dir(), "ckptd.sock"), "CKPTD_SOCKET")


def socket_places(environ: Optional[Mapping[str, str]] = None) -> List[SocketPlace]:
    """Return the addresses a client tries, in this order: named, else the user's and the system's.

    A socket named by $CKPTD_SOCKET is the only one: who names a daemon does not want another.
    """
    env = os.environ if environ is None else environ
    if env.get("CKPTD_SOCKET"):
        return [named_place(env["CKPTD_SOCKET"])]
    uid = os.getuid()
    return [SocketPlace(socket_path(env), (uid,), own=True), SocketPlace(SYSTEM_SOCKET, (uid, 0), own=False)]


def named_place(path: str) -> SocketPlace:
    """Return the address that a person named; root may serve it too, for it may be a system daemon's.

    PlaceError  the path is longer than the kernel allows
    """
    path = check_socket_path(os.path.abspath(path), "CKPTD_SOCKET")
    return SocketPlace(path, (os.getuid(), 0), own=path != SYSTEM_SOCKET)


def spool_dir(state: str) -> str:
    """Return where clients leave what no daemon took, under the state directory `state`."""
    return os.path.join(state, "spool")


def log_path(state: str) -> str:
    """Return where a daemon started by a client writes its log."""
    return os.path.join(state, "ckptd.log")


def fallback_dir() -> str:
    """Return this user's directory under /tmp; `ensure_private_dir` makes and checks it."""
    return os.path.join(TEMP, f"ckptd-{os.getuid()}")


def ensure_state_dir(state: str) -> str:
    """Make the state directory and its spool (0700) where missing; return `state`.

    PlaceError  it belongs to someone else, others may write it, or it can't be made
    """
    ensure_private_dir(state)
    ensure_private_dir(spool_dir(state))
    return state


def ensure_socket_dir(path: str) -> None:
    """Make the directory of a user's own socket (0700) where it is ours to make, and check it.

    PlaceError  as `ensure_private_dir`, and as `check_socket_dir`
    """
    parent = os.path.dirname(path)
    if parent == fallback_dir() or not os.path.isdir(parent):
        ensure_private_dir(parent)
    check_socket_dir(path)


def check_socket_dir(path: str) -> None:
    """Refuse a socket's directory in which everybody may rename: anyone could put his own socket in its place.

    A sticky one (/tmp) is no such directory. PlaceError says which it is; one that is not there is not looked at.
    """
    parent = os.path.dirname(path)
    try:
        mode = os.stat(parent).st_mode
    except OSError:
        return  # binding says what is wrong
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise PlaceError(f"{parent} may be written by others (mode {stat.S_IMODE(mode):04o}); chmod o-w {parent}")


def ensure_private_dir(path: str) -> None:
    """Make `path` (mode 0700, parents too) and refuse it unless only this user can write to it.

    Someone else may have made a directory of this name in /tmp before us: it is looked at after
    it was made, and a symlink in its place is refused, not followed.

    PlaceError  not a directory, owned by another user, or writable by others
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        raise PlaceError(f"can't make {path}: {error.strerror}; set CKPTD_DIR and CKPTD_SOCKET elsewhere") from error
    check_private_dir(path)


def check_private_dir(path: str) -> None:
    """Refuse a directory that another user owns or may write to.

    PlaceError  with the reason; also when it is a symlink that someone else made
    """
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode) and found.st_uid == os.getuid():
            found = os.stat(path)
    except OSError as error:
        raise PlaceError(f"can't look at {path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise PlaceError(f"{path} is not a directory; remove it, or set CKPTD_DIR and CKPTD_SOCKET elsewhere")
    if found.st_uid != os.getuid():
        raise PlaceError(f"{path} belongs to uid {found.st_uid}, not to you; set CKPTD_DIR and CKPTD_SOCKET elsewhere")
    if found.st_mode & 0o022:
        raise PlaceError(f"{path} may be written by others (mode {stat.S_IMODE(found.st_mode):04o}); chmod 700 {path}")


def check_socket_path(path: str, variable: str) -> str:
    """Return `path` when it fits into a Unix socket address.

    PlaceError  longer than SOCKET_PATH_BYTES_MAX; names the variable to change
    """
    size_bytes = len(os.fsencode(path))
    if size_bytes > SOCKET_PATH_BYTES_MAX:
        raise PlaceError(
            f"socket path of {size_bytes} bytes, {SOCKET_PATH_BYTES_MAX} at most: {path}; set {variable} to a shorter one"
        )
    return path


def network_type(path: str) -> Optional[str]:
    """Return the type of the network file system that holds `path`, None when it is a local one.

    `path` need not exist. Where mountinfo can't be read the answer is None.
    """
    kind = filesystem_type(path)
    if kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE):
        return kind
    return None


def filesystem_type(path: str) -> str:
    """Return the type that mountinfo gives for the mount that holds `path`, "" when unknown."""
    target = os.path.realpath(path)
    best, kind = "", ""
    try:
        with open(_MOUNTINFO, encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                left, _, right = line.partition(" - ")
                point = _unescape(left.split()[4])
                # ">=": of two mounts on one point the later one is on top.
                if len(point) >= len(best) and is_within(target, point):
                    best, kind = point, right.split()[0]
    except (OSError, IndexError):
        return ""
    return kind


def is_within(path: str, directory: str) -> bool:
    """Say whether `path` is `directory` or lies under it, by text alone."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _home(env: Mapping[str, str]) -> str:
    return env["HOME"] if os.path.isabs(env.get("HOME", "")) else os.path.expanduser("~")


def _can_make(path: str) -> bool:
    """Say whether `path` exists writable, or could be made: containers often have HOME=/ and no right to it."""
    while not os.path.exists(path):
        parent = os.path.dirname(path)
        if parent == path:
            return False
        path = parent
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def _unescape(text: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
