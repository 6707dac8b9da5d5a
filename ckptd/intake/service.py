"""From a frame to its answer: decode, find the handler, answer with a result or a coded error.

Requests of one connection are handled in order. Those that may wait for something (memory, a level,
a read-back) run beside the others, at most REQUESTS_RUNNING_MAX of them per connection.
"""

import os
from typing import Any

import structlog

from ckptd.catalog import holds
from ckptd.errors import BadRequest, Bug, Busy, CkptdError, NotAuthorized
from ckptd.intake import requests as ask
from ckptd.intake.listener import REQUESTS_RUNNING_MAX, Peer
from ckptd.intake.training import Front, Handler, Training
from ckptd_client import wire

log = structlog.get_logger()

_WAITING = (ask.Lease, ask.Attach, ask.Verify, ask.Wait, ask.Retention, ask.Rebuild, ask.Remove, ask.RootAdd)


class Service:
    """Answers requests."""

    def __init__(self, front: Front, handlers: dict[type[ask.Request], Handler]) -> None:
        """Put the handlers together."""
        self._front = front
        self._training = Training(front)
        self._handlers = {**self._training.handlers, **handlers}

    async def handle(self, peer: Peer, frame: bytes) -> None:
        """Answer one frame. Errors are answers; only the framing itself can end a connection."""
        try:
            request = ask.decode(frame)
            self._check_peer(peer, request)
        except CkptdError as error:
            peer.send(_failure(ask.request_id(frame), error))
            return
        if not isinstance(request, _WAITING):
            await self._answer(peer, request)
        elif peer.running >= REQUESTS_RUNNING_MAX or peer.group is None:
            peer.send(
                _failure(
                    request.id, Busy(f"{peer.running} requests of this connection wait already", retry_after_s=1.0)
                )
            )
        else:
            peer.running += 1
            peer.group.start_soon(self._answer_beside, peer, request)

    def _check_peer(self, peer: Peer, request: ask.Request) -> None:
        settings = self._front.settings()
        if settings.mode == "user" and peer.uid not in {os.getuid(), 0}:
            raise NotAuthorized(f"this daemon serves uid {os.getuid()}, not {peer.uid}")
        if not peer.greeted and not isinstance(request, ask.Hello):
            raise BadRequest("the first request must be hello")

    async def _answer_beside(self, peer: Peer, request: ask.Request) -> None:
        try:
            await self._answer(peer, request)
        finally:
            peer.running -= 1

    async def _answer(self, peer: Peer, request: ask.Request) -> None:
        try:
            if isinstance(request, ask.Lease):
                answer, arena = await self._training.lease(peer, request)
                peer.send(_success(request.id, answer, fds=1), arena.fd)
            elif isinstance(request, ask.Attach):
                answer, fd = await self._training.attach(peer, request)
                peer.send(_success(request.id, answer, fds=0 if fd is None else 1), fd)
                if fd is not None:
                    os.close(fd)
            else:
                peer.send(_success(request.id, await self._handlers[type(request)](peer, request)))
        except CkptdError as error:
            peer.send(_failure(request.id, error))
        except Exception as error:
            # A bug in one handler must not take the daemon and every other trainer's hand-off with it.
            log.exception("request.bug", op=type(request).__struct_config__.tag)
            peer.send(_failure(request.id, Bug(f"{type(error).__name__} while answering {type(request).__name__}")))

    async def gone(self, peer: Peer) -> None:
        """A connection closed: look at what it left behind."""
        self._front.followers.remove(peer)
        self._front.presence.left(peer)
        self._front.pool.orphaned(peer)
        if peer.attached:
            # Mappings outlive the connection: the control pages say which readers still live.
            await self._front.catalog.write(lambda tx: holds.release_all(tx, f"pid {peer.pid}"))
        await self.reap()

    async def reap(self) -> None:
        """Admit saves whose trainer died after its commit; free leases of the dead."""
        for arena in self._front.pool.reap():
            try:
                await self._front.admission.arena(arena, os.getuid() if arena.holder_uid < 0 else arena.holder_uid)
            except CkptdError as error:
                log.warning("arena.not_admitted", arena=arena.id.hex(), **error.to_wire())


def _success(request_id: int, answer: dict[str, Any], fds: int = 0) -> dict[str, Any]:
    head = {"v": wire.VERSION, "id": request_id, "ok": True}
    return {**head, "fds": fds, **answer} if fds else {**head, **answer}


def _failure(request_id: int | None, error: CkptdError) -> dict[str, Any]:
    return {"v": wire.VERSION, "id": request_id, "ok": False, "error": error.to_wire()}
