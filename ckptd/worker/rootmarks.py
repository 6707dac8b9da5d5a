"""What the daemon knows each managed root by, and which root is not what it was; worker/rootmark.py has the rule."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from ckptd.errors import CkptdError, RootDegraded, Weather
from ckptd.worker import protocol
from ckptd.worker.protocol import RootMark

# What changes a root, or says that something of it is gone. Not a read-back: what it misses, the next scan finds again,
# and it is how a person gives up what was on a disk that is lost (`ckpt verify`).
GUARDED = (
    protocol.Publish,
    protocol.Trash,
    protocol.Restore,
    protocol.Purge,
    protocol.Strip,
    protocol.Unstrip,
    protocol.Link,
    protocol.Amend,
    protocol.Sweep,
    protocol.Scan,
    protocol.Settle,
    protocol.Digest,
)

_Request = TypeVar("_Request", bound=protocol.Request)


async def _forget(_root: str, _mark: RootMark) -> None:
    """Write nothing down."""


class RootMarks:
    """The marks of all managed roots. A root that was never named here is not checked: watched ones, the cache."""

    def __init__(self) -> None:
        """Know no root; `remember` writes a mark down, and is set by whoever has a catalog."""
        self.remember: Callable[[str, RootMark], Awaitable[None]] = _forget
        self._known: dict[str, RootMark] = {}
        self._refused: dict[str, RootDegraded] = {}

    def know(self, root: str, mark: RootMark | None) -> None:
        """Check a root from now on, by this mark unless a newer is known here already; None: no longer."""
        if mark is None:
            self._known.pop(root, None)
            self._refused.pop(root, None)
        else:
            self._known.setdefault(root, mark)

    def refused(self) -> dict[str, RootDegraded]:
        """Name the roots that are not what they were, as far as the last question about each could tell."""
        return dict(self._refused)

    def on(self, request: _Request) -> _Request:
        """Return the request with what its root is known by, where its verb asks for that."""
        mark = self._known.get(request.root)
        if mark is None or not isinstance(request, GUARDED) or (isinstance(request, protocol.Scan) and request.adopt):
            return request
        return msgspec.structs.replace(request, mark=mark)

    async def adopt(self, root: str, mark: RootMark) -> None:
        """Take a root for what it is now, whatever it was. Errors of the catalog: it stays what it was."""
        if root in self._known:
            await self.remember(root, mark)
            self._known[root] = mark
            self._refused.pop(root, None)

    async def heard(
        self, request: protocol.Request, outcome: msgspec.Raw | CkptdError | None, seen: RootMark | None
    ) -> bool:
        """Take in how a request ended; say whether its root is refused since, or not any more.

        A new mark is written down before its publish counts as done: no row ever tells of a checkpoint under a
        mark that a next daemon would not know. Errors of the catalog: the request is to be made again.
        """
        if request.mark is None:
            return False
        if isinstance(outcome, RootDegraded):
            new = request.root not in self._refused
            self._refused[request.root] = outcome
            return new
        if seen is not None and self._known.get(request.root, seen) != seen:
            await self.remember(request.root, seen)
            if request.root in self._known:
                self._known[request.root] = seen
        if isinstance(outcome, Weather):
            return False  # it may not have come as far as to look
        return self._refused.pop(request.root, None) is not None
