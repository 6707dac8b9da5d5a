"""Named points on the way of every byte where a test may make the process fail.

CKPTD_FAIL="publish.renamed:2=kill" kills this process the second time that point is reached.
Actions: kill (SIGKILL to itself), eio, enospc (OSError), delay:SECONDS (blocks the thread). Several
are separated by commas. Points cost one dictionary look-up when the variable is unset; the daemon
says at start when it is set.
"""

import errno
import os
import signal
import threading
import time

VARIABLE = "CKPTD_FAIL"


def _parse(text: str) -> dict[str, tuple[int, str]]:
    plan: dict[str, tuple[int, str]] = {}
    for part in filter(None, text.split(",")):
        point, _, action = part.partition("=")
        name, _, nth = point.partition(":")
        plan[name] = (int(nth or "1"), action)
    return plan


_plan = _parse(os.environ.get(VARIABLE, ""))
_hits: dict[str, int] = {}
_lock = threading.Lock()


def hit(point: str) -> None:
    """Fail here if the plan says so. OSError for eio and enospc; blocks for delay."""
    if point not in _plan:
        return
    nth, action = _plan[point]
    with _lock:
        _hits[point] = count = _hits.get(point, 0) + 1
    if count != nth:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action in {"eio", "enospc"}:
        number = errno.EIO if action == "eio" else errno.ENOSPC
        raise OSError(number, f"{os.strerror(number)} (fail point {point})")
    elif action.startswith("delay:"):
        time.sleep(float(action.removeprefix("delay:")))


def armed() -> tuple[str, ...]:
    """Names of the points that may fail in this process."""
    return tuple(_plan)
