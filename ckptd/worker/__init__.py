"""The I/O workers: one child process for each mounted file system that holds a root.

The daemon imports `Workers` from here; the child (`python -m ckptd.worker`) shares this package, so
the names are loaded on first use and the child stays free of the daemon's event loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptd.worker.handle import Workers, WorkerState

__all__ = ["WorkerState", "Workers"]


def __getattr__(name: str) -> object:
    """Load the handle when somebody asks for it."""
    if name in __all__:
        return getattr(import_module("ckptd.worker.handle"), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
