"""From a frame to its answer: decode, find the handler, answer with a result or a coded error.

Requests of one connection are handled in order. Those that may wait for something (memory, a level,
a read-back) run beside the others, at most REQUESTS_RUNNING_MAX of them per connection.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio.to_thread
import structlog

from ckptd import failpoint
from ckptd.errors import BadRequest, Bug, Busy, CkptdError, NotAuthorized, OverQuota
from ckptd.intake import requests as ask
from ckptd.intake import retentionrequests as keeping
from ckptd.intake.bestrequests import Recompute
from ckptd.intake.follow import sees_all
from ckptd.intake.hookrequests import Extension, HookTest
from ckptd.intake.listener import OUT_OF, REQUESTS_RUNNING_MAX, Peer
from ckptd.intake.reading import Reading
from ckptd.intake.training import Front, Handler, Training
from ckptd_client import wire

log = structlog.get_logger()

_WAITING = (
    ask.Lease, ask.Submit, ask.Attach, ask.Verify, ask.Wait, keeping.Retention, keeping.Restore, ask.Rebuild, ask.Remove, ask.RootAdd,
    ask.Status, ask.Stats, ask.CacheTrim, ask.Doctor, ask.Reload,
    HookTest, Extension, Recompute,
)  # fmt: skip
INLINE_BYTES_MAX = 64 << 10  # a larger frame is parsed in a thread: 1 MiB of empty objects takes over 100 ms
MESSAGE_CHARS_MAX = 4096  # of an error: what a peer sent may stand in it, six times as long as JSON
ADMIT_AGAIN_S, ADMIT_AGAIN_S_MAX = 0.5, 30.0  # pauses between tries to admit what a dead trainer committed


class Service:
    """Answers requests."""

    def __init__(self, front: Front, handlers: dict[type[ask.Request], Handler]) -> None:
        """Put the handlers together."""
        self._front = front
        self._training = Training(front)
        self._reading = Reading(front)
        self._handlers = {**self._training.handlers, **self._reading.handlers, **handlers}
        self._not_before_s: dict[bytes, tuple[float, float]] = {}  # arena -> when to try again, and the pause then
        self.noticed: Callable[[ask.Request, dict[str, Any]], None] = lambda _request, _answer: None

    async def handle(self, peer: Peer, frame: bytes) -> None:
        """Answer one frame. Errors are answers; only the framing itself can end a connection."""
        try:
            inline = len(frame) <= INLINE_BYTES_MAX
            request = ask.decode(frame) if inline else await anyio.to_thread.run_sync(ask.decode, frame)
            self._check_peer(peer, request)
            if isinstance(request, _WAITING) and (peer.running >= REQUESTS_RUNNING_MAX or peer.group is None):
                raise Busy(f"{peer.running} requests of this connection wait already", retry_after_s=1.0)
            if isinstance(request, ask.Attach):
                request = self._reading.begin(peer, request)
        except CkptdError as error:
            peer.send(failure(ask.request_id(frame), error))
            return
        if isinstance(request, _WAITING) and peer.group is not None:
            peer.running += 1
            peer.group.start_soon(self._answer_beside, peer, request)
        else:
            await self._answer(peer, request)

    def _check_peer(self, peer: Peer, request: ask.Request) -> None:
        settings = self._front.settings()
        if settings.mode == "user" and not sees_all(peer.uid):
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
                await self._lend(peer, request)
            elif isinstance(request, ask.Attach):
                await self._hand_out(peer, request)
            else:
                answer = await self._handlers[type(request)](peer, request)
                peer.send(_success(request.id, answer))
                self.noticed(request, answer)
                if isinstance(request, ask.Commit):
                    failpoint.hit("ack.accepted")
        except CkptdError as error:
            peer.send(failure(request.id, error))
        except (OverflowError, UnicodeEncodeError) as error:
            peer.send(failure(request.id, BadRequest(f"a value is out of range: {error}")))
        except wire.FrameError as error:
            peer.send(failure(request.id, OverQuota(f"the answer does not fit into a frame: {error}")))
        except Exception as error:  # noqa: BLE001 - told below
            # A bug in one handler must not take the daemon and every other trainer's hand-off with it.
            peer.send(failure(request.id, _unforeseen(request, error)))

    async def _lend(self, peer: Peer, request: ask.Lease) -> None:
        """Answer a lease with its descriptor; a lease that does not reach its trainer is none."""
        answer, arena = await self._training.lease(peer, request)
        back = partial(self._front.pool.undelivered, arena, arena.generation)
        failpoint.hit("arena.lent")
        try:
            peer.send(_success(request.id, answer, fds=1), arena.fd, back)
        except OSError as error:
            back()
            raise Busy(f"the daemon has no descriptor left: {error.strerror}", retry_after_s=1.0) from error

    async def _hand_out(self, peer: Peer, request: ask.Attach) -> None:
        """Answer a reader, with the descriptor of a hot copy if there is one; nothing is held for an answer that can't be sent."""
        answer, fd = await self._reading.attach(peer, request)
        back = partial(self._reading.undelivered, peer, str(request.read))
        try:
            peer.send(_success(request.id, answer, fds=0 if fd is None else 1), fd, back)
        except BaseException:
            back()
            raise
        finally:
            if fd is not None:
                os.close(fd)
        self.noticed(request, answer)

    async def gone(self, peer: Peer) -> None:
        """A connection closed: look at what it left behind."""
        self._front.followers.remove(peer)
        self._front.presence.left(peer)
        self._front.pool.orphaned(peer, peer.ended)
        self._reading.left(peer)
        await self._reap_memory()

    async def reap(self) -> None:
        """Admit saves whose trainer died after its commit; free leases and read holds of the dead."""
        await self._reap_memory()
        # Not as soon as a connection ends, which can't be cancelled: a catalog that hangs must not hold up a stop.
        await self._reading.look()

    async def _reap_memory(self) -> None:
        now_s = self._front.clock.monotonic_s()
        committed = self._front.pool.reap()
        waiting = {arena.id for arena in committed}
        self._not_before_s = {of: at for of, at in self._not_before_s.items() if of in waiting}
        for arena in committed:
            at_s, pause_s = self._not_before_s.get(arena.id, (now_s, ADMIT_AGAIN_S))
            if at_s <= now_s:
                self._not_before_s[arena.id] = (now_s + pause_s, min(pause_s * 2, ADMIT_AGAIN_S_MAX))
                await self._front.admission.rescue(arena)


def _unforeseen(request: ask.Request, error: Exception) -> CkptdError:
    """Say what an error means that no handler knows: we ran out of something that comes back, or it is ours."""
    if isinstance(error, OSError) and error.errno in OUT_OF:
        return Busy(f"the daemon has run out: {error.strerror}", retry_after_s=1.0)
    log.error("request.bug", op=type(request).__struct_config__.tag, exc_info=error)
    return Bug(f"{type(error).__name__} while answering {type(request).__name__}")


def _success(request_id: int, answer: dict[str, Any], fds: int = 0) -> dict[str, Any]:
    head = {"v": wire.VERSION, "id": request_id, "ok": True}
    return {**head, "fds": fds, **answer} if fds else {**head, **answer}


def failure(request_id: int | None, error: CkptdError) -> dict[str, Any]:
    """Make the reply that tells an error. It fits into a frame whatever of the request its message repeats."""
    told = error.to_wire()
    if len(error.message) > MESSAGE_CHARS_MAX:
        told["message"] = f"{error.message[:MESSAGE_CHARS_MAX]}... ({len(error.message)} characters)"
    return {"v": wire.VERSION, "id": request_id, "ok": False, "error": told}
