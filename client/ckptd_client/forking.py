"""Before a process forks, what it has mapped copy-on-write becomes its own.

A child inherits the pages of a hot copy that nobody has written yet, which are the daemon's: the daemon knows of
the parent as a reader and not of the child, and lends the memory again when the parent has let go of it. A state
that a loader's workers read would turn into a later save under them. Pages that the parent has made its own are
the child's as any memory is.
"""

import os
import weakref
from typing import Protocol


class Holder(Protocol):
    """Whoever holds mappings that must not outlive a fork as they are."""

    def own_all(self) -> None:
        """Make every page of them private. Blocks: as long as copying them takes."""


_holders: "weakref.WeakSet[Holder]" = weakref.WeakSet()


def watch(holder: Holder) -> None:
    """Have `holder.own_all()` called in the thread that forks, before each fork of this process."""
    _holders.add(holder)


def _before() -> None:
    for holder in list(_holders):
        holder.own_all()


os.register_at_fork(before=_before)
