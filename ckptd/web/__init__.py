"""The daemon's HTTP door: its own socket, closed to others, and a TCP port only with a token.

What serves (starlette, uvicorn, prometheus_client) is imported when the first connection waits, in a
thread: a daemon that nobody scrapes neither loads nor keeps it. What can't be loaded now (no descriptor is
left) is tried again. Nothing here is needed by a save: an error of this door is logged and ends the door,
never the daemon.
"""

import contextlib
import importlib
import logging
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import structlog

from ckptd.query.statistics import Statistics

if TYPE_CHECKING:
    import uvicorn

log = structlog.get_logger()

CLOSE_S = 2  # an answer on its way when the daemon ends may take so long
KEEP_ALIVE_S = 30
AGAIN_S = 5.0  # after what serves could not be loaded
_SERVES = ("uvicorn", "uvicorn.protocols.http.h11_impl", "ckptd.web.site", "ckptd.web.exposition")


@dataclass(frozen=True)
class Sources:
    """What the pages show. All of it comes from memory: a scrape costs no disk and waits for nothing."""

    figures: Callable[[], dict[str, Any]]
    health: Callable[[], dict[str, Any]]
    statistics: Statistics
    version: str


@dataclass(frozen=True)
class Door:
    """One listening socket, already bound, and the token that it asks for ("": its file mode is its guard)."""

    sock: socket.socket
    token: str = ""


class _Said(logging.Handler):
    """What the server logs, as a line of the daemon's own log: a client can cause it, so one cause is said seldom."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one line on."""
        log.warning("web.said", cause=str(record.msg), said=record.getMessage(), exc_info=record.exc_info or None)


async def _ask_to_end(server: "uvicorn.Server") -> None:
    try:
        await anyio.sleep_forever()
    finally:
        server.should_exit = True


class Web:
    """Serves at every door until cancelled."""

    def __init__(self, sources: Sources, doors: list[Door], connections_max: int) -> None:
        """Keep what is served and where. Sockets are bound, listening and closed by whoever made them."""
        self._sources = sources
        self._doors = doors
        self._connections_max = connections_max
        self._loading = anyio.Lock()

    async def run(self) -> None:
        """Wait for the first connection at each door, then serve there."""
        async with anyio.create_task_group() as group:
            for door in self._doors:
                group.start_soon(self._serve, door)

    async def _loaded(self, door: Door) -> "uvicorn.Server":
        """Return what serves at a door once somebody waits there and it could be loaded."""
        while True:
            await anyio.wait_readable(door.sock)
            try:
                async with self._loading:
                    for module in _SERVES:
                        await anyio.to_thread.run_sync(importlib.import_module, module)
                return self._server(door)
            except Exception as error:
                log.exception("web.not_served", cause=type(error).__name__, again_s=AGAIN_S)
            await anyio.sleep(AGAIN_S)

    async def _serve(self, door: Door) -> None:
        server = await self._loaded(door)
        async with anyio.create_task_group() as group:
            group.start_soon(_ask_to_end, server)
            # Shielded: it has to come to its own end; cancelled in the middle it leaves tasks behind.
            with anyio.CancelScope(shield=True):
                try:
                    await server.serve([door.sock])
                except Exception:
                    log.exception("web.ended")
            group.cancel_scope.cancel()

    def _server(self, door: Door) -> "uvicorn.Server":
        said = logging.getLogger("uvicorn")
        said.handlers, said.propagate = [_Said(logging.WARNING)], False
        import uvicorn  # noqa: PLC0415 - with the first connection

        from ckptd.web.exposition import Exposition  # noqa: PLC0415 - likewise
        from ckptd.web.site import site  # noqa: PLC0415 - likewise

        sources = self._sources
        page = Exposition(sources.figures, sources.statistics, sources.version)

        class Server(uvicorn.Server):
            """Leaves signals to the daemon."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        config = uvicorn.Config(
            site(page.text, sources.health, door.token),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=self._connections_max,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_S,
        )
        return Server(config)
