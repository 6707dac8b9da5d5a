"""What happens to the daemon itself, into the event log: so that hooks get it at least once and `ckpt log` shows it.

Who tells does not wait. Facts are committed together; a catalog that refuses does not keep them from
whoever listens now: then they are published without a number, and only the log lacks them.
"""

from collections import deque
from collections.abc import Callable

import anyio
import structlog

from ckptd.catalog import Catalog
from ckptd.catalog.tx import Tx
from ckptd.errors import CkptdError
from ckptd.events import Event, check

log = structlog.get_logger()

WAITING_MAX = 1024  # facts on their way; then the oldest are published without being logged


class Facts:
    """Takes facts in from any task of the event loop."""

    def __init__(self, catalog: Catalog, publish: Callable[[Event], None]) -> None:
        """Commit nothing before `run`."""
        self._catalog = catalog
        self._publish = publish
        self._waiting: deque[Event] = deque()
        self._some = anyio.Event()

    def tell(self, event: Event) -> None:
        """Have a fact committed and published soon. Never blocks; Bug when it is not declared."""
        check(event)
        if len(self._waiting) >= WAITING_MAX:
            self._publish(self._waiting.popleft())
        self._waiting.append(event)
        self._some.set()

    async def run(self) -> None:
        """Commit until cancelled; what waits then is committed last."""
        try:
            while True:
                await self._some.wait()
                self._some = anyio.Event()
                await self._commit()
        finally:
            with anyio.CancelScope(shield=True):
                await self._commit()

    async def _commit(self) -> None:
        # Shielded: what was taken out is committed or published, never between.
        with anyio.CancelScope(shield=True):
            await self._commit_waiting()

    async def _commit_waiting(self) -> None:
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(len(self._waiting))]

            async def enter(tx: Tx, taken: list[Event] = taken) -> None:
                for event in taken:
                    tx.emit(event)

            try:
                await self._catalog.write(enter)
            except CkptdError as error:
                log.warning("facts.not_logged", cause=error.code, facts=len(taken), **error.to_wire())
                for event in taken:
                    self._publish(event)
