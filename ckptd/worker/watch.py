"""The verb `watch`: hints that something may have changed under a root. Never the truth: scans are.

One native watcher for each root. What it can't know it says with `lost`: at its start, after every
restart, when a burst came near the kernel's queue, when the root was replaced. Where events are not
to be had at all (network file systems, watch limit reached) `lost` comes at a coarse interval.
"""

import errno
import os
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from msgspec import structs
from watchfiles import Change
from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

from ckptd.worker import mounts
from ckptd.worker.context import Context
from ckptd.worker.formats.names import is_ours
from ckptd.worker.members import is_utf8
from ckptd.worker.protocol import Done, Hints, Watch

STEP_MS = 500  # how often the native queue is looked at: 2 wake-ups a second
ROOT_CHECK_MS = 2000  # how often a quiet root is looked at: is it still the same directory?
DIRECTORIES_MAX = 256  # hints of one batch; more than that costs as much as scanning everything
BURST_SHARE = 8  # a batch over 1/8 of the kernel's queue: several events make one path, so it may have overflowed
POLL_REMOTE_S = 20.0  # the same on network file systems
RESTART_S = (0.5, 30.0)  # first and longest pause before a failed watcher is tried again; `lost` comes each time
_CROWDED = "so many events came that some may be lost, and new directories not be watched"
_GONE, _REPLACED = "the root does not exist", "the root was replaced"
_QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")
_QUEUE_DEFAULT = 16384


@dataclass(frozen=True, slots=True)
class Pace:
    """Intervals of a watch, in seconds where not said otherwise."""

    step_ms: int = STEP_MS
    root_check_ms: int = ROOT_CHECK_MS
    poll_remote_s: float = POLL_REMOTE_S
    restart_s: tuple[float, float] = RESTART_S


def run(request: Watch, context: Context, pace: Pace | None = None) -> Done:
    """Send Hints until cancelled. Blocks; a root that is gone is waited for, no error ends the watch."""
    pace = pace or Pace()
    if mounts.find(request.root, mounts.read()).remote:
        _poll(context, pace.poll_remote_s)
    else:
        _Watcher(request, context, pace).run()
    return Done()


def _poll(context: Context, every_s: float) -> None:
    while True:
        context.send_part(Hints([], lost=True))
        if context.cancelled.wait(every_s):
            return


class _Watcher:
    """One root on a local file system."""

    def __init__(self, request: Watch, context: Context, pace: Pace) -> None:
        self._root = request.root
        self._debounce_ms = max(request.debounce_ms, pace.step_ms)
        self._context = context
        self._cancelled: threading.Event = context.cancelled
        self._pace = pace
        self._burst = max(1, _queue_length() // BURST_SHARE)

    def run(self) -> None:
        """Watch, and start again after every failure, with growing pauses in which `lost` still comes."""
        pause_s, longest_s = self._pace.restart_s
        while not self._cancelled.is_set():
            started_s = time.monotonic()
            problem = self._watch_once()
            if self._cancelled.is_set():
                return
            if time.monotonic() - started_s > longest_s:
                pause_s = self._pace.restart_s[0]
            blind = problem not in {"", _GONE, _REPLACED, _CROWDED}
            self._context.send_part(Hints([], lost=True, problem=problem, blind=blind))
            self._cancelled.wait(pause_s)
            pause_s = min(pause_s * 2, longest_s)

    def _watch_once(self) -> str:
        """Watch until the root is another directory, or the watcher fails; say why."""
        before = _identity(self._root)
        if before is None:
            return _GONE
        problem = ""
        try:
            try:
                watcher = _native(self._root, ignore_denied=False)
            except PermissionError as error:
                # Told to ignore such directories, the watcher ignores a reached watch limit as well.
                problem = f"some directories can't be watched: {error}"
                watcher = _native(self._root, ignore_denied=True)
        except (OSError, WatchfilesRustInternalError) as error:
            return _explained(error)
        try:
            # After the watch is in place: what was made before it is found by this scan.
            self._context.send_part(Hints([], lost=True, problem=problem, blind=bool(problem)))
            return self._follow(watcher, before, problem)
        except (WatchfilesRustInternalError, UnicodeError, RuntimeError) as error:
            return _explained(error)
        finally:
            watcher.close()

    def _follow(self, watcher: RustNotify, before: tuple[int, int], problem: str) -> str:
        """Send hints until the watcher must be another one; say why. `problem` is why it does not see everything."""
        scanned_s = time.monotonic()
        partial = bool(problem)
        while True:
            changes = watcher.watch(self._debounce_ms, self._pace.step_ms, self._pace.root_check_ms, self._cancelled)
            if changes == "stop":
                return ""
            if isinstance(changes, set) and changes:
                paths = {path for _, path in changes}
                if len(paths) >= self._burst:
                    problem = problem or _CROWDED
                found = hints(self._root, paths, burst=self._burst)
                if (Change.deleted, self._root.rstrip("/")) in changes:
                    return _REPLACED  # what is there now may have the very inode of what was
                if found is not None:
                    self._context.send_part(structs.replace(found, problem=problem, blind=partial))
            elif problem == _CROWDED:
                return _CROWDED  # it is quiet again: a new watcher watches what this one may have missed
            if _identity(self._root) != before:
                return _REPLACED
            if partial and time.monotonic() - scanned_s >= self._pace.restart_s[1]:
                scanned_s = time.monotonic()
                self._context.send_part(Hints([], lost=True, problem=problem, blind=True))


def _native(root: str, *, ignore_denied: bool) -> RustNotify:
    """Make the native watcher: no debug output, no polling, recursive. Its environment variables are not read."""
    debug, polling, poll_ms, recursive = False, False, 0, True
    return RustNotify([root], debug, polling, poll_ms, recursive, ignore_denied)


def hints(root: str, paths: set[str], *, burst: int) -> Hints | None:
    """Turn changed paths into directories to rescan; None when only our own files changed.

    A changed directory is scanned itself: what was made in it before it was watched has no event of
    its own. So is the parent of everything that is gone.
    """
    if len(paths) >= burst:
        return Hints([], lost=True)
    directories = {_directory(root, path) for path in paths}
    directories.discard("")
    if not directories:
        return None
    if len(directories) > DIRECTORIES_MAX or not all(map(is_utf8, directories)):
        return Hints([], lost=True)
    return Hints(sorted(_topmost(directories)))


def _directory(root: str, path: str) -> str:
    """Return the directory to rescan for one changed path, "" for what no scan would look at."""
    inside = path[len(root.rstrip("/")) :].strip("/")
    if not inside:
        return root
    *above, name = inside.split("/")
    if is_ours(name) or any(part.startswith(".") for part in above):
        return ""
    try:
        is_directory = stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        is_directory = False
    return path if is_directory else path.rpartition("/")[0]


def _topmost(directories: set[str]) -> set[str]:
    """Drop every directory that a scan of another one covers."""
    return {
        directory
        for directory in directories
        if not any(str(above) in directories for above in PurePosixPath(directory).parents)
    }


def _identity(root: str) -> tuple[int, int] | None:
    try:
        facts = os.stat(root)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _queue_length() -> int:
    try:
        return int(_QUEUE.read_text())
    except (OSError, ValueError):
        return _QUEUE_DEFAULT


def _explained(error: Exception) -> str:
    text = str(error)
    if "limit" in text or getattr(error, "errno", None) in {errno.ENOSPC, errno.EMFILE}:
        return f"the kernel's watch limit is reached ({text}): raise fs.inotify.max_user_watches"
    return f"the watcher failed: {text}"
