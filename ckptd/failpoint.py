"""Named points on the way of every byte where a test may make the process fail.

CKPTD_FAIL="publish.renamed:2=kill" kills this process the second time that point is reached.
Actions: kill (SIGKILL to itself), kill-parent (SIGKILL to the process that started it; it goes on
until it notices), eio, enospc (OSError), delay:SECONDS (blocks the thread). Several are separated by
commas. Points cost one dictionary look-up when the variable is unset; the daemon says at start when
it is set.

CKPTD_FAIL="@/path/of/a/plan" reads the same text from a file, at every point: so a running process
can be armed. The file counts for all processes together, and an entry is taken out of it before it
acts: the process that is started in the place of a killed one goes on, and whoever armed the point
sees that it was reached.
"""

import errno
import fcntl
import os
import signal
import threading
import time

VARIABLE = "CKPTD_FAIL"

# Every point there is: the process that reaches it, and what is true there. In the order of a checkpoint's way.
POINTS: dict[str, tuple[str, str]] = {
    "start.adopted": ("daemon", "the arenas of the daemon before are back; nothing is admitted yet"),
    "start.recovered": ("daemon", "what was found in arenas and spool is admitted; nobody is served yet"),
    "recv.header": ("daemon", "a whole frame of a client has arrived, and nothing was done about it"),
    "arena.sealed": ("daemon", "an arena is made and sealed, and only this process has it"),
    "fdstore.pushed": ("daemon", "the service manager was sent its copy of a new arena"),
    "arena.lent": ("daemon", "an arena belongs to a trainer that does not know it yet"),
    "job.committed": ("daemon", "row and job of a save are committed; its trainer was told nothing"),
    "ack.accepted": ("daemon", "the trainer was told that its save is staged"),
    "mark.written": ("worker", "a root's mark is in a temporary file"),
    "mark.fsynced": ("worker", "that file is durable"),
    "mark.renamed": ("worker", "it has its name, not durably"),
    "mark.dir_fsynced": ("worker", "its name is durable; nothing is published under it"),
    "copy.tmp_created": ("worker", "the temporary directory is there, empty"),
    "copy.allocated": ("worker", "one file is there, its space reserved"),
    "copy.chunk": ("worker", "one more chunk was written"),
    "copy.fsynced": ("worker", "one file is durable, its name not yet"),
    "manifest.written": ("worker", "the manifest is written, not durable"),
    "manifest.fsynced": ("worker", "the manifest is durable, its name not yet"),
    "dir.fsynced": ("worker", "everything below the temporary name is durable"),
    "publish.renamed": ("worker", "the final name is there, not durable"),
    "parent.fsynced": ("worker", "the final name is durable"),
    "digest.fsynced": ("worker", "one file that somebody else wrote is durable"),
    "catalog.durable": ("daemon", "the worker has answered; the catalog does not know yet"),
    "ack.durable": ("daemon", "the catalog says durable; the arena still holds the save"),
    "arena.released": ("daemon", "the arena is the hot copy"),
    "giveup.recorded": (
        "daemon",
        "a save is FAILED because a person gave it up; its bytes are still in memory or spool",
    ),
    "verify.read": ("worker", "one more chunk was read back"),
    "verify.recorded": ("daemon", "the catalog says verified"),
    "repair.aside": ("daemon", "what is damaged is in the trash; memory holds the bytes, and their name is free"),
    "repair.written": ("daemon", "they are whole under their name again; the catalog does not know"),
    "repair.cleared": ("daemon", "what was damaged has gone from the trash; its job does not say so"),
    "link.made": ("worker", "a link leads to the new target, not durably"),
    "link.recorded": ("daemon", "the links are in their places, and the job is at its last stage"),
    "amend.written": ("worker", "late metrics are in a temporary file"),
    "amend.fsynced": ("worker", "that file is durable"),
    "amend.renamed": ("worker", "it has its name, not durably"),
    "amend.dir_fsynced": ("worker", "its name is durable"),
    "retain.planned": ("daemon", "what is to be retired is decided, and nothing of it is written"),
    "retain.tombstone": ("daemon", "the rows say trashed; the files stand under their names"),
    "retain.trashed": ("worker", "the files are in the trash (or back from it), not durably"),
    "retain.trash_fsynced": ("worker", "the move is durable"),
    "retain.moved": ("daemon", "the worker has answered; a hot copy may still be there"),
    "retain.purging": ("daemon", "the rows have given up their inodes; the trash is full"),
    "retain.unlink": ("worker", "one more entry of the trash is about to go"),
    "retain.purged": ("daemon", "the trash is empty; the rows do not say so"),
    "retain.recorded": ("daemon", "the rows say dropped"),
    "strip.planned": (
        "daemon",
        "the rows of the optimizer's files say that they are being taken out; all are in their place",
    ),
    "strip.noted": ("worker", "stripped.json names them, durably; none has moved"),
    "strip.file_moved": ("worker", "one more is in the trash (or back from it), durably"),
    "strip.moved": ("daemon", "the worker has answered; the rows still say that it goes on"),
    "strip.recorded": ("daemon", "the rows say that it is done"),
    "strip.purging": ("daemon", "the rows say that they are being unlinked; the trash holds them"),
    "space.alarmed": ("daemon", "the event log says that a disk is below its floor; nothing has gone"),
    "restore.moved": ("daemon", "a retired checkpoint is back under its name; its row says trashed"),
    "spool.admitted": ("daemon", "an image of the spool has row and job; it stays until it is durable elsewhere"),
    "spool.removed": ("daemon", "it is durable elsewhere, and the image is gone"),
    "catalog.commit": ("daemon", "a transaction is complete but for its COMMIT"),
    "catalog.committed": ("daemon", "it is committed; whoever waits for it was not told"),
    "catalog.snapshot": ("daemon", "an older catalog was copied; no step of its migration has begun"),
    "catalog.migrate": ("daemon", "one more statement of the migration is about to run"),
    "catalog.migrated": ("daemon", "the migration is committed"),
    "catalog.truncate": ("daemon", "the write-ahead log is about to be moved into the file"),
    "catalog.truncated": ("daemon", "it was, as far as readers allowed"),
    "fetch.compared": ("worker", "what was fetched from an archive is as promised; its name is temporary"),
    "fetch.kept": ("daemon", "it has its final name, durably; no row says so"),
    "fetch.dropped": ("worker", "what was given up has a temporary name, not durably"),
    "hook.delivered": ("daemon", "a hook has had a fact; its place in the log is not committed"),
    "hook.recorded": ("daemon", "its place is committed, with what came of the run"),
    "reload.applied": ("daemon", "a new configuration holds; its roots are not entered yet"),
    "stop.draining": ("daemon", "it was told to stop, and has said so to everybody"),
    "stop.spilled": ("daemon", "one save that was not published in time lies in the spool"),
    "rescue.written": ("supervisor", "an image of what no daemon took over is durable; its name is temporary"),
    "rescue.spooled": ("supervisor", "it has its final name, durably; others may still be in memory alone"),
}


def _parse(text: str) -> dict[str, tuple[int, str]]:
    plan: dict[str, tuple[int, str]] = {}
    for part in filter(None, text.strip().split(",")):
        point, _, action = part.partition("=")
        name, _, nth = point.partition(":")
        plan[name] = (int(nth or "1"), action)
    return plan


_given = os.environ.get(VARIABLE, "")
_file = _given[1:] if _given.startswith("@") else ""
_plan = {} if _file else _parse(_given)
_hits: dict[str, int] = {}
_lock = threading.Lock()


def hit(point: str) -> None:
    """Fail here if the plan says so. OSError for eio and enospc; blocks for delay."""
    if _file and point:
        action = _take(point)
        if action:
            _act(point, action)
        return
    if point not in _plan:
        return
    nth, action = _plan[point]
    with _lock:
        _hits[point] = count = _hits.get(point, 0) + 1
    if count == nth:
        _act(point, action)


def _act(point: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "kill-parent":
        os.kill(os.getppid(), signal.SIGKILL)
    elif action in {"eio", "enospc"}:
        number = errno.EIO if action == "eio" else errno.ENOSPC
        raise OSError(number, f"{os.strerror(number)} (fail point {point})")
    elif action.startswith("delay:"):
        time.sleep(float(action.removeprefix("delay:")))


def _take(point: str) -> str:
    """Count one hit in the plan's file; return the action, taken out of it, when it was the one that counts."""
    try:
        fd = os.open(_file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    with os.fdopen(fd, "r+", encoding="utf-8") as file:
        fcntl.flock(fd, fcntl.LOCK_EX)  # the daemon and its workers share the plan
        plan = _parse(file.read())
        if point not in plan:
            return ""
        nth, action = plan.pop(point)
        if nth > 1:
            plan[point] = (nth - 1, action)
        file.seek(0)
        file.truncate()
        file.write(",".join(f"{name}:{count}={what}" for name, (count, what) in plan.items()))
    return action if nth == 1 else ""


def armed() -> tuple[str, ...]:
    """Names of the points that may fail in this process, or the file that says so."""
    return (_given,) if _file else tuple(_plan)
