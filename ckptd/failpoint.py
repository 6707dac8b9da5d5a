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
