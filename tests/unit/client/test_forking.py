"""Around a fork: holders are asked before it, in the process that holds, and never by its children."""

import os
import signal
import threading
from typing import NoReturn

from ckptd_client import forking

CHILD_S = 10


class Guarded:
    """Owns under a lock, as the holders of mappings do."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = 0

    def own_all(self) -> None:
        with self.lock:
            self.asked += 1


def exit_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _fork_again() -> NoReturn:
    """What the child does, whatever happens: it never goes on as a second run of the tests."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the limit of a test would raise here, in the wrong process
        signal.alarm(CHILD_S)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0)
        code = exit_of(grandchild)
    finally:
        os._exit(code)


def test_a_child_that_forks_does_not_wait_for_a_lock_that_nobody_there_will_let_go(monkeypatch):
    """A thread of the parent had it at the fork, and there are no threads of the parent in the child."""
    guarded = Guarded()
    taken = threading.Event()
    over = threading.Event()

    def hold() -> None:
        with guarded.lock:
            taken.set()
            over.wait(60)

    class Late(Guarded):
        """Asked last: from now until the fork another thread has the lock of the first."""

        def own_all(self) -> None:
            thread.start()
            taken.wait(CHILD_S)

    thread = threading.Thread(target=hold)
    late = Late()
    monkeypatch.setattr(forking._Held, "holders", [guarded, late])  # in this order
    try:
        child = os.fork()
        if child == 0:
            _fork_again()
        assert exit_of(child) == 0, "-14: it waited until the alarm ended it"
        assert guarded.asked == 1
    finally:
        over.set()
        thread.join()
