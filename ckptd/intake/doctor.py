"""Is everything as it should be? One line per check: what, how it is, and what to do about it."""

import os
import sqlite3
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from ckptd import failpoint
from ckptd.catalog import eventlog
from ckptd.errors import CkptdError
from ckptd.intake import requests as ask
from ckptd.intake.listener import Peer
from ckptd.intake.spooled import Spool
from ckptd.intake.status import Plant, Status
from ckptd.intake.training import Answer
from ckptd.model import JobState
from ckptd.notify import Notifier

_WAL_RESET_FIXED = (3, 51, 3)  # https://sqlite.org/wal.html, "WAL-reset bug"; harmless with one writing connection
_FREE_SHARE_WARN, _FREE_SHARE_FAIL = 0.10, 0.02
_INOTIFY = Path("/proc/sys/fs/inotify/max_user_watches")
_WATCHES_LOW = 65536
PARKED_NAMED = 3
ROOTS_CHECKED_MAX = 200


class Doctor:
    """Runs the checks."""

    def __init__(self, plant: Plant, status: Status, notifier: Notifier, spool: Spool) -> None:
        """Keep what the checks look at."""
        self._front = plant.front
        self._status = status
        self._notifier = notifier
        self._spool = spool

    async def examine(self, peer: Peer, _request: ask.Doctor) -> Answer:
        """Check everything that can be checked from inside the daemon."""
        checks = [
            await self._catalog(),
            self._sqlite(),
            self._fd_store(),
            await self._jobs(),
            self._spooled(),
            self._memory(),
            await anyio.to_thread.run_sync(_inotify),
            self._fail_points(),
        ]
        checks += await self._roots(peer.uid)
        checks += [_check("degraded", "fail", f"{d['what']}: {d['why']}") for d in self._status.degraded()]
        return {"checks": checks}

    async def _catalog(self) -> dict[str, Any]:
        try:
            await self._front.catalog.read(lambda conn: eventlog.newest(conn, 1))
        except CkptdError as error:
            return _check("catalog", "fail", error.message, error.hint)
        return _check("catalog", "ok", "answers")

    def _sqlite(self) -> dict[str, Any]:
        if sqlite3.sqlite_version_info < _WAL_RESET_FIXED:
            return _check(
                "sqlite",
                "ok",
                f"{sqlite3.sqlite_version}; has the WAL-reset bug, which one writing connection can't meet",
            )
        return _check("sqlite", "ok", sqlite3.sqlite_version)

    def _fd_store(self) -> dict[str, Any]:
        if not self._notifier.enabled:
            hint = "start the daemon with `ckptd`, or from its systemd unit"
            return _check("fd store", "warn", "no service manager keeps the arenas over a crash", hint)
        if self._notifier.trouble is not None:
            return _check("fd store", "fail", str(self._notifier.trouble), "see FileDescriptorStoreMax in the unit")
        return _check("fd store", "ok", "arenas outlive this process")

    async def _jobs(self) -> dict[str, Any]:
        counts = await self._front.jobs.counts()
        parked = counts.get(JobState.PARKED, 0)
        if parked:
            held = [job for job in await self._front.jobs.unfinished() if job.state is JobState.PARKED]
            first = "; ".join(
                f"{job.checkpoint_id[:12]} in {job.stage}: {_why(job.error)}" for job in held[:PARKED_NAMED]
            )
            hint = "tried again now and then while its bytes are held; `ckpt ls --state failed` and `ckpt log` say more"
            return _check("jobs", "warn", f"{parked} parked ({first})", hint)
        return _check(
            "jobs", "ok", f"{counts.get(JobState.QUEUED, 0)} queued, {counts.get(JobState.RUNNING, 0)} running"
        )

    def _spooled(self) -> dict[str, Any]:
        refused = self._spool.refused
        if refused:
            path, why = next(iter(refused.items()))
            return _check(
                "spool", "warn", f"{len(refused)} files make no sense; {path}: {why}", "look at them, then remove them"
            )
        return _check("spool", "ok", "nothing was refused")

    def _memory(self) -> dict[str, Any]:
        limit = self._front.settings().arenas.bytes_max
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if limit > total * 0.8:
            return _check(
                "arenas", "warn", f"arenas.bytes_max is {limit / total:.0%} of memory", "leave room for training"
            )
        return _check("arenas", "ok", f"{self._front.pool.bytes_used / 2**30:.1f} of {limit / 2**30:.1f} GiB in use")

    def _fail_points(self) -> dict[str, Any]:
        armed = failpoint.armed()
        if armed:
            return _check(
                "fail points", "fail", f"armed: {', '.join(armed)}", f"unset {failpoint.VARIABLE}; it is for tests"
            )
        return _check("fail points", "ok", "none armed")

    async def _roots(self, uid: int) -> list[dict[str, Any]]:
        """Check every root, side by side: one hung disk must not hold up what is said of the others."""
        checks: dict[str, dict[str, Any]] = {}

        async def check(root: dict[str, Any]) -> None:
            name = f"root {root['path']}"
            if root["problem"]:
                checks[name] = _check(name, "fail", root["problem"])
                return
            try:
                used = await self._status.usage(root["path"])
            except CkptdError as error:
                checks[name] = _check(name, "fail", error.message, error.hint)
                return
            share = used.free_bytes / max(used.total_bytes, 1)
            detail = (
                f"{used.filesystem}, {share:.0%} free, direct I/O {'yes' if used.direct_io else 'no'}, "
                f"leases {'yes' if used.leases else 'no'}"
            )
            status = "fail" if share < _FREE_SHARE_FAIL else "warn" if share < _FREE_SHARE_WARN else "ok"
            hint = "" if status == "ok" else "free space, or set retention rules"
            checks[name] = _check(name, status, detail, hint)

        async with anyio.create_task_group() as group:
            for root in (await self._status.root_states(uid))[:ROOTS_CHECKED_MAX]:
                group.start_soon(check, root)
        return [checks[name] for name in sorted(checks)]


def _why(error: dict[str, Any] | None) -> str:
    return str((error or {}).get("message", "no reason is recorded"))


def _inotify() -> dict[str, Any]:
    try:
        watches = int(_INOTIFY.read_text())
    except (OSError, ValueError):
        return _check("inotify", "warn", "no inotify here: watched roots are scanned on a timer only")
    if watches < _WATCHES_LOW:
        return _check(
            "inotify",
            "warn",
            f"fs.inotify.max_user_watches is {watches}",
            "raise it with sysctl for large watched trees",
        )
    return _check("inotify", "ok", f"{watches} watches possible")


def _check(name: str, status: str, detail: str, hint: str = "") -> dict[str, Any]:
    return {"name": name, "status": status, "detail": detail, "hint": hint}
