"""Is everything as it should be? One line per check: what, how it is, and what to do about it.

The names are trouble.CHECKS; the guide for when something is wrong has a row for each.
"""

import contextlib
import os
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import structlog

from ckptd.catalog import eventlog, figures
from ckptd.clock import SystemClock
from ckptd.errors import CkptdError, RootDegraded
from ckptd.intake import requests as ask
from ckptd.intake import spoolhomes
from ckptd.intake.follow import visible_to
from ckptd.intake.leftovers import leftovers
from ckptd.intake.listener import Peer
from ckptd.intake.status import Plant, Status
from ckptd.intake.training import Answer
from ckptd.intake.trouble import Troubles, failing_jobs
from ckptd.model import JobState, RootKind, State

log = structlog.get_logger()

_WAL_RESET_FIXED = (3, 51, 3)  # https://sqlite.org/wal.html, "WAL-reset bug"; harmless with one writing connection
_FREE_SHARE_WARN, _FREE_SHARE_FAIL = 0.10, 0.02
_INOTIFY = Path("/proc/sys/fs/inotify/max_user_watches")
_WATCHES_LOW = 65536
ROOTS_CHECKED_MAX = 200
MEMORY_SHARE_WARN = 0.8
SPOOLED_S_MAX = 300.0  # a save that waits longer than this does not wait for its turn
ANSWER_S = 5.0
_ROOT_HINT = "look at its mount, its permissions and whether the service may write there (ReadWritePaths)"
_ROOM_HINT = "free space there, or set retention rules; nothing is deleted to make room without one"
# What is said of checks that only speak up when something is wrong.
_QUIET = {
    "fd store": "arenas outlive this process",
    "loop": "goes round",
    "clock": "did not jump",
    "events": "nobody lost any",
    "log": "no line was dropped",
    "fail points": "none armed",
}


class Doctor:
    """Runs the checks: every trouble that is known, and what must be asked for."""

    def __init__(self, plant: Plant, status: Status, troubles: Troubles) -> None:
        """Keep what the checks look at."""
        self._front = plant.front
        self._reconciler = plant.reconciler
        self._workers = plant.workers
        self._status = status
        self._troubles = troubles

    async def examine(self, peer: Peer, _request: ask.Doctor) -> Answer:
        """Check everything that can be checked from inside the daemon."""
        troubles = self._troubles.known_to(peer.uid)
        checks = [_check(t.what, "fail" if t.grave else "warn", t.why, t.do) for t in troubles if t.what != "jobs"]
        said = {check["name"] for check in checks}
        looked = [
            await self._asked("catalog", self._catalog),
            await self._asked("jobs", lambda: self._jobs(peer.uid)),
            await self._asked("checkpoints", lambda: self._checkpoints(peer.uid)),
            await anyio.to_thread.run_sync(_spool, os.path.join(self._front.state_dir, "spool")),
            await anyio.to_thread.run_sync(_inotify),
            _sqlite(),
            self._reserve(),
            self._arenas(),
            *(_check(name, "ok", detail) for name, detail in _QUIET.items()),
        ]
        checks += [check for check in looked if check["name"] not in said]
        checks += [check for check in await self._roots(peer.uid) if check["name"] not in said]
        return {"checks": checks}

    async def _asked(self, name: str, look: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Let a check fail that can't be made, within ANSWER_S: doctor is asked when nothing works."""
        try:
            with anyio.fail_after(ANSWER_S):
                return await look()
        except CkptdError as error:
            return _check(name, "fail", error.message, error.hint or "`ckpt log` and the daemon's log say more")
        except TimeoutError:
            return _check(name, "fail", f"no answer within {ANSWER_S:g} s", "is the state directory's disk hung?")

    async def _catalog(self) -> dict[str, Any]:
        await self._front.catalog.read(lambda conn: eventlog.newest(conn, 1))
        return _check("catalog", "ok", f"answers; the last write took {self._troubles.pulse.took_s * 1000:.0f} ms")

    def _reserve(self) -> dict[str, Any]:
        size_bytes, _ = self._front.catalog.reserve
        if not size_bytes:
            return _check("reserve", "ok", "none is kept (catalog.ballast_bytes is 0)")
        size = f"{size_bytes / 2**20:.0f} MiB beside the catalog"
        return _check("reserve", "ok", f"{size}, for writing down what goes when the disk is full")

    async def _jobs(self, uid: int) -> dict[str, Any]:
        for trouble in failing_jobs(await self._front.jobs.failing(visible_to(uid))):
            return _check(trouble.what, "warn", trouble.why, trouble.do)
        counts = await self._front.jobs.counts()
        return _check(
            "jobs", "ok", f"{counts.get(JobState.QUEUED, 0)} queued, {counts.get(JobState.RUNNING, 0)} running"
        )

    async def _checkpoints(self, uid: int) -> dict[str, Any]:
        counts = await self._front.catalog.read(lambda conn: figures.states(conn, visible_to(uid)))
        lost = {state: counts.get(state, 0) for state in (State.CORRUPT, State.MISSING)}
        if not any(lost.values()):
            return _check("checkpoints", "ok", f"none is damaged or missing, {counts.get(State.FAILED, 0)} failed")
        hint = "`ckpt cleanup` says what is wrong with each, and what would become of it; `ckpt path` names the newest good one"
        return _check("checkpoints", "warn", f"{lost[State.CORRUPT]} corrupt, {lost[State.MISSING]} missing", hint)

    def _arenas(self) -> dict[str, Any]:
        limit = self._front.settings().arenas.bytes_max
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if limit > total * MEMORY_SHARE_WARN:
            hint = "lower it: training needs the rest"
            return _check("arenas", "warn", f"arenas.bytes_max is {limit / total:.0%} of memory", hint)
        return _check("arenas", "ok", f"{self._front.pool.bytes_used / 2**30:.1f} of {limit / 2**30:.1f} GiB in use")

    async def _roots(self, uid: int) -> list[dict[str, Any]]:
        """Check every root, side by side: one hung disk must not hold up what is said of the others."""
        checks: dict[str, dict[str, Any]] = {}

        async def check(root: dict[str, Any]) -> None:
            name = f"root {root['path']}"
            try:
                used = await self._status.usage(root["path"])
            except CkptdError as error:
                waits = isinstance(error, RootDegraded) and error.hint  # other hints are for whoever writes a file
                checks[name] = _check(name, "fail", error.message, waits or _ROOT_HINT)
                return
            if used.unwritable and root["kind"] == RootKind.MANAGED:
                checks[name] = _check(name, "fail", used.unwritable, _ROOT_HINT)
                return
            share = used.free_bytes / max(used.total_bytes, 1)
            detail = (
                f"{used.filesystem}, {share:.0%} free, direct I/O {'yes' if used.direct_io else 'no'}, "
                f"leases {'yes' if used.leases else 'no'}"
            )
            copies = self._reconciler.copies(root["path"])
            detail += _named("copies of checkpoints, left alone", copies.count, copies.first)
            left = await self._leftovers(root["path"])
            detail += _named("in .ckptd-trash, known to nobody", len(left), left)
            status = "fail" if share < _FREE_SHARE_FAIL else "warn" if share < _FREE_SHARE_WARN else "ok"
            checks[name] = _check(name, status, detail, "" if status == "ok" else _ROOM_HINT)

        async with anyio.create_task_group() as group:
            for root in (await self._status.root_states(uid))[:ROOTS_CHECKED_MAX]:
                group.start_soon(check, root)
        return [checks[name] for name in sorted(checks)]

    async def _leftovers(self, root: str) -> list[str]:
        try:
            return await leftovers(self._front.catalog, self._workers, root)
        except CkptdError as error:
            # What is wrong with the disk or the catalog has a line of its own.
            log.warning("doctor.trash_not_listed", root=root, **error.to_wire())
            return []


def _named(what: str, count: int, first: list[str]) -> str:
    """Tell of what nothing is wrong with, but which nothing will ever remove."""
    others = " and others" if count > 1 else ""
    return f"; {what}: {count}, {first[0]}{others}" if count else ""


def _sqlite() -> dict[str, Any]:
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < _WAL_RESET_FIXED:
        return _check("sqlite", "ok", f"{version}; has the WAL-reset bug, which one writing connection can't meet")
    return _check("sqlite", "ok", version)


def _spool(directory: str) -> dict[str, Any]:
    """Look for saves that wait too long; the daemon takes in what it can as soon as it comes."""
    now_s = SystemClock().now().timestamp()
    ages_s = []
    for entry, _ in spoolhomes.entries(directory):
        with contextlib.suppress(FileNotFoundError):  # taken in meanwhile
            ages_s.append(now_s - os.stat(entry.path).st_mtime)
    old = [age_s for age_s in ages_s if age_s > SPOOLED_S_MAX]
    if not old:
        return _check("spool", "ok", f"{len(ages_s)} files wait")
    hint = "they are safe; `ckpt log` and the checks of jobs, roots and catalog say what holds them up"
    return _check("spool", "warn", f"{len(old)} files have waited for up to {max(old) / 60:.0f} min", hint)


def _inotify() -> dict[str, Any]:
    try:
        watches = int(_INOTIFY.read_text())
    except (OSError, ValueError):
        hint = "nothing need be done; lower watching.reconcile_s to find new files sooner"
        return _check("inotify", "warn", "no inotify here: watched roots are scanned on a timer only", hint)
    if watches < _WATCHES_LOW:
        hint = "raise it with sysctl for large watched trees"
        return _check("inotify", "warn", f"fs.inotify.max_user_watches is {watches}", hint)
    return _check("inotify", "ok", f"{watches} watches possible")


def _check(name: str, status: str, detail: str, hint: str = "") -> dict[str, Any]:
    return {"name": name, "status": status, "detail": detail, "hint": hint}
