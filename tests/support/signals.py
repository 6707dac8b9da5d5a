"""Signals to processes that may end meanwhile by themselves, or with the one that was signalled before them."""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator


def kill(pids: Iterable[int]) -> None:
    """SIGKILL each; one that is gone already is what is wanted. Whoever wants to see them gone must look."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def standing_still(pids: Iterable[int]) -> Iterator[None]:
    """Stop these processes meanwhile: what is done in the block is one step for them."""
    stopped = list(pids)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
