"""The processes below one process, and how they are ended: all of them, whatever they are doing.

A host is a child subreaper (prctl), so what a hook forks twice comes back to it and is still found
below. What is not below it is not found: what another service starts on a hook's behalf (at, systemd-run,
a container engine), and what was below a host that died before its children.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable

ROUNDS_MAX = 200
PAUSE_S = 0.005
PROCESSES_SEEN_MAX = 10_000  # of one look; a bomb is ended in rounds
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_KERNEL_LISTS_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def adopt_orphans() -> None:
    """Become the parent of every orphan below this process. OSError where the kernel has no such thing."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def below(pid: int) -> list[int]:
    """Return the processes below `pid` as they are now, parents before their children, dead ones included."""
    children_of = _children if _KERNEL_LISTS_CHILDREN else _everybody()
    found: list[int] = []
    queue = [pid]
    while queue and len(found) < PROCESSES_SEEN_MAX:
        children = children_of(queue.pop(0))
        found += children
        queue += children
    return found


def _children(pid: int) -> list[int]:
    """Return the children of all threads of one process; none when it is gone."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        # OSError: the thread has ended since, and its children moved to another, seen next time.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
            found += [int(number) for number in file.read().split()]
    return found


def _everybody() -> Callable[[int], list[int]]:
    """Read the parent of every process of the machine, for a kernel that does not list children."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            words = _stat(int(name))
            if words:
                children.setdefault(int(words[1]), []).append(int(name))
    return lambda pid: children.get(pid, [])


def memory_bytes(pids: list[int]) -> int:
    """Return what these processes hold alone in memory: resident pages that are no file's and nobody shares by name."""
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has ended
            with open(f"/proc/{pid}/statm", encoding="ascii") as file:
                words = file.read().split()
            pages += int(words[1]) - int(words[2])
    return pages * _PAGE_BYTES


def kill(pids: list[int]) -> None:
    """SIGKILL each; those that are gone already are what is wanted."""
    for pid in pids:
        with contextlib.suppress(
            ProcessLookupError, PermissionError
        ):  # a set-uid program of a hook is not ours to kill
            os.kill(pid, signal.SIGKILL)


def end_all() -> dict[int, int]:
    """Kill and reap everything below this process, in at most ROUNDS_MAX looks; return the wait status of each child.

    In rounds: what forks while we look is there at the next look, and no killed process forks again.
    """
    statuses: dict[int, int] = {}
    for _ in range(ROUNDS_MAX):
        left = below(os.getpid())
        if not left:
            break
        kill(left)
        time.sleep(PAUSE_S)
        statuses |= reap()
    return statuses


def end_from_outside(pid: int) -> None:
    """Kill a process and everything below it, from above: for a host that no longer does it itself. Blocks up to a second.

    It is stopped first, so that it stays the parent of what is orphaned on the way.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    for _ in range(ROUNDS_MAX):
        left = [found for found in below(pid) if not _is_dead(found)]
        if not left:
            break
        kill(left)
        time.sleep(PAUSE_S)
    kill([pid])


def _is_dead(pid: int) -> bool:
    """Whether a process has ended and only waits to be reaped."""
    return _stat(pid)[:1] in ([], ["Z"], ["X"])


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name, which may hold anything; none when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def reap() -> dict[int, int]:
    """Collect the children of this process that have ended: their wait status by number. Never blocks."""
    found: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found[pid] = status


def obituary(status: int) -> str:
    """Say how a process ended, from its wait status."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit status {code}"
    known = -code in {int(number) for number in signal.Signals}
    return f"ended by {signal.Signals(-code).name}" if known else f"ended by signal {-code}"
