"""Before a process forks, what it has mapped copy-on-write becomes its own.

A child inherits the pages of a hot copy that nobody has written yet, which are the daemon's: the daemon knows of
the parent as a reader and not of the child, and lends the memory again when the parent has let go of it. A state
that a loader's workers read would turn into a later save under them. Pages that the parent has made its own are
the child's as any memory is.
"""

import os
import weakref
from typing import ClassVar, Protocol


class Holder(Protocol):
    """Whoever holds mappings that must not outlive a fork as they are."""

    def own_all(self) -> None:
        """Make every page of them private. Blocks: as long as copying them takes."""


class _Held:
    """The holders of this process; nobody keeps one alive for being asked."""

    holders: ClassVar[weakref.WeakSet[Holder]] = weakref.WeakSet()


def watch(holder: Holder) -> None:
    """Have `holder.own_all()` called in the thread that forks, before each fork of this process."""
    _Held.holders.add(holder)


def _before() -> None:
    for holder in list(_Held.holders):
        holder.own_all()


def _in_child() -> None:
    """Forget them: what is mapped is the child's own by now, and a lock that another thread held stays taken here for ever."""
    _Held.holders = weakref.WeakSet()


os.register_at_fork(before=_before, after_in_child=_in_child)
