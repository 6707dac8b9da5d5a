"""The one thread that starts workers, for as long as this process lives.

A worker asks the kernel to end it with its parent (kernel.end_with_parent), and for the kernel the
parent is the thread that started it, not the process. A thread of a pool is retired when it has been
idle for some seconds, and takes the workers along that it once started. This one never ends.
"""

import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

_Start = Callable[[], "subprocess.Popen[bytes]"]

_orders: "SimpleQueue[tuple[Future[subprocess.Popen[bytes]], _Start]]" = SimpleQueue()
_lock = threading.Lock()
_threads: list[threading.Thread] = []
os.register_at_fork(after_in_child=_threads.clear)  # a fork has no thread but its own


def start(begin: _Start) -> "subprocess.Popen[bytes]":
    """Have `begin` called by the thread that stays; return what it returns, or raise what it raises.

    Blocks for a fork and an exec, and behind those before it: call it in a thread. At most one start is under
    way, so that a program on a disk that hangs holds up no more than one descriptor table.
    """
    with _lock:
        if not _threads:
            _threads.append(threading.Thread(target=_serve, name="starter", daemon=True))
            _threads[0].start()
    outcome: Future[subprocess.Popen[bytes]] = Future()
    _orders.put((outcome, begin))
    return outcome.result()


def _serve() -> None:
    while True:
        outcome, begin = _orders.get()
        try:
            outcome.set_result(begin())
        except Exception as error:  # noqa: BLE001 - it is the caller's, who raises it
            outcome.set_exception(error)
