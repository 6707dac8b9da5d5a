"""The file hand-off: files that a caller wrote himself are offered to the daemon, or to the spool when it is away."""

import atexit
import functools
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Union

from ckptd_client import arguments
from ckptd_client.arguments import SaveFields
from ckptd_client.errors import Refused
from ckptd_client.finder import close_all, error_of
from ckptd_client.handle import Handle
from ckptd_client.wire import Message, number

if TYPE_CHECKING:
    from ckptd_client.session import Session

ANSWER_S = 5.0  # how long the end of a process, and a script's submit, wait for a daemon that answers
CONNECT_S = 4.0  # how long the background waits for the first attempt to connect, a start of the daemon included
EXIT_S = 10.0
WAITING_MAX = 1024  # spooled offers that are asked about again; the handles of more stay as they are
# The daemon's own trouble: the offer is as good as before, and its spool is read again.
_PASSING = frozenset({"unreachable", "busy", "internal", "worker_lost", "timeout", "catalog_fault"})


class _Offer(NamedTuple):
    handle: Handle
    request: Dict[str, Any]


class Offers:
    """The offers of one session that no daemon has acknowledged yet. Thread-safe."""

    def __init__(self, session: "Session", background: Callable[[Callable[[], None]], bool]) -> None:
        """Nothing is offered yet; `background(job)` runs a job that may block."""
        self._session = session
        self._background = background
        self._changed = threading.Condition()
        self._open: Dict[str, _Offer] = {}
        self._waiting: Dict[str, _Offer] = {}  # in the spool, by the ids they were offered under

    def add(self, path: str, fields: SaveFields, names: Dict[str, Optional[str]], checkpoint: str) -> Handle:
        """Offer `path`, absolute, to the daemon; to the spool when none takes it. Never blocks, never raises.

        names  "project" and "experiment" of the checkpoint, where the caller gave any
        """
        request: Dict[str, Any] = {
            "path": path,
            "checkpoint": checkpoint,
            **{key: value for key, value in names.items() if value is not None},
            "step": fields.step,
            "epoch": fields.epoch,
            "metrics": {name: number(value) for name, value in fields.metrics.items()},
            "note": fields.note,
            "meta": fields.meta,
            "update_best": fields.update_best,
        }
        offer = _Offer(self._session.handles.add(Handle(checkpoint, fields.step)), request)
        self._session.count("saves")
        with self._changed:
            self._open[checkpoint] = offer
        if not self._send(offer) and not self._background(lambda: self._send_or_spool(offer)):
            self._fail(offer, Refused("busy", "too much background work waits"))
        return offer.handle

    def settle(self, deadline_s: float) -> bool:
        """Wait for answers, then write the rest to the spool; False when `deadline_s` came first."""
        connection = self._session.connection
        with self._changed:
            if connection.is_up:
                limit_s = min(ANSWER_S, deadline_s - time.monotonic())
                self._changed.wait_for(lambda: not self._open or not connection.is_up, max(0.0, limit_s))
            waiting = list(self._open.values())
        for offer in waiting:
            self._spool(offer)
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, max(0.0, deadline_s - time.monotonic()))

    def _send(self, offer: _Offer) -> bool:
        return self._session.connection.request_nowait(
            "submit", lambda reply, fds: self._on_reply(offer, reply, fds), **offer.request
        )

    def _send_or_spool(self, offer: _Offer) -> None:
        """Runs in the background: the first attempt to connect may still be under way."""
        if not (self._session.connection.wait_up(CONNECT_S) and self._send(offer)):
            self._spool(offer)

    def _spool(self, offer: _Offer) -> None:
        self._session.overflow.offer(offer.handle.id, offer.request, lambda error: self._spooled(offer, error))

    def _spooled(self, offer: _Offer, error: Optional[OSError]) -> None:
        if error is not None:
            self._fail(offer, Refused("no_space", f"the spool: {error}"))
        elif self._pop(offer):
            self._session.count("spooled")
            offer.handle.set_spooled()
            with self._changed:
                if len(self._waiting) < WAITING_MAX:
                    self._waiting[offer.handle.id] = offer
            self._session.tell_watch([offer.handle.id])

    def up(self) -> None:
        """A daemon answers: ask again by what id it knows what lies in the spool. Runs in the connection's thread.

        What lies at a path may have an older id. Handing it over twice is handing it over once, so the
        same offer by message and by the spool is one checkpoint, whichever comes first.
        """
        with self._changed:
            waiting, self._waiting = self._waiting, {}
        for checkpoint, offer in waiting.items():
            asked = not offer.handle.done and self._session.connection.request_nowait(
                "submit", functools.partial(self._on_known, offer), **offer.request
            )
            if not asked and not offer.handle.done:
                with self._changed:
                    self._waiting[checkpoint] = offer

    def _on_known(self, offer: _Offer, reply: Message, fds: List[int]) -> None:
        close_all(fds)
        if reply.get("ok") is True:
            self._session.handles.rename(offer.handle, str(reply.get("checkpoint") or offer.handle.id))
            self._session.handles.apply({"state": "pending", **reply, "checkpoint": offer.handle.id})
        else:  # the spool has it still: another look when the next daemon answers
            with self._changed:
                self._waiting[str(offer.request["checkpoint"])] = offer

    def _on_reply(self, offer: _Offer, reply: Message, fds: List[int]) -> None:
        close_all(fds)
        if reply.get("ok") is True:
            if self._pop(offer):
                # What lies there may be known already, by the id that a scan or an earlier hand-over gave it.
                self._session.handles.rename(offer.handle, str(reply.get("checkpoint") or offer.handle.id))
                self._session.handles.apply({"state": "pending", **reply, "checkpoint": offer.handle.id})
            return
        error = error_of(reply)
        if getattr(error, "code", "timeout") in _PASSING:
            self._spool(offer)
        else:
            self._fail(offer, error)

    def _fail(self, offer: _Offer, error: Any) -> None:
        if self._pop(offer):
            self._session.count("failed")
            self._session.say("submit", "%s was not taken: %s", offer.request["path"], error)
            offer.handle.fail(error)
            self._session.handles.settle(offer.handle)

    def _pop(self, offer: _Offer) -> bool:
        with self._changed:
            found = self._open.pop(offer.handle.id, None)
            self._changed.notify_all()
        return found is not None


class _Shared:
    """The session of module-level submits: one per process, made when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._session: Optional[Session] = None

    def get(self) -> "Session":
        from ckptd_client.experiment import plain_spec
        from ckptd_client.session import Session

        if self._session is not None and self._session.pid != os.getpid():
            self._lock, self._session = threading.Lock(), None  # a forked child: the parent's session is not ours
        with self._lock:
            if self._session is None:
                self._session = Session(plain_spec())
                atexit.register(_flush, self._session)
            return self._session


def _flush(session: "Session") -> None:
    if session.pid == os.getpid():
        session.flush(EXIT_S)


_shared = _Shared()


def submit(
    path: Union[str, "os.PathLike[str]"],
    *,
    project: Optional[str] = None,
    experiment: Optional[str] = None,
    **fields: Any,
) -> Handle:
    """Hand a finished checkpoint file or directory to ckptd from any script; return its handle.

    fields  step, epoch, metrics, note, meta, update_best as for Experiment.save

    Waits at most ANSWER_S until a daemon knows of it or the offer lies in the spool. Never raises for
    that: `handle.acknowledged`, `handle.spooled` and `handle.error` tell.

    ValueError  names the bad argument
    """
    checked = arguments.save_fields(arguments.known_fields(fields))
    names = {
        "project": None if project is None else arguments.name("project", project),
        "experiment": None if experiment is None else arguments.name("experiment", experiment),
    }
    absolute = arguments.path("path", path)
    checkpoint = os.urandom(16).hex()
    if arguments.mode() == "disabled":
        return Handle(checkpoint, checked.step, state="disabled")
    handle = _shared.get().offers.add(absolute, checked, names, checkpoint)
    handle.wait_acknowledged(ANSWER_S)
    return handle
