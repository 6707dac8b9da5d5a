"""The file hand-off: files that a caller wrote himself are offered to the daemon, or to the spool when it is away.

add() ──a few at a time──► sent ──► acknowledged, or refused
  │                         │ no answer: the daemon is gone, or in trouble
  ▼ no daemon answers       ▼
written to the spool in the background ──► asked about when the next daemon answers
"""

import atexit
import os
import threading
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, NamedTuple, Optional, Set, Union

from ckptd_client import arguments
from ckptd_client.arguments import SaveFields
from ckptd_client.errors import Refused
from ckptd_client.finder import error_of
from ckptd_client.handle import Handle
from ckptd_client.paced import Paced, Request
from ckptd_client.wire import Message, number

if TYPE_CHECKING:
    from ckptd_client.session import Session

ANSWER_S = 5.0  # how long the end of a process, and a script's submit, wait for a daemon that answers
CONNECT_S = 4.0  # how long the background waits for the first attempt to connect, a start of the daemon included
EXIT_S = 10.0
OPEN_MAX = 4096  # offers on their way; one more waits for room, for ROOM_S at most, and is refused then
ROOM_S = 5.0
PIECE = 32  # offers written to the spool in one go: the image of a save must not wait for thousands of them
WAITING_MAX = 1024  # spooled offers that are asked about again; the handles of more stay as they are
# The daemon's own trouble: the offer is as good as before, and its spool is read again. Busy is no trouble.
_PASSING = frozenset({"unreachable", "internal", "worker_lost", "timeout", "catalog_fault"})


class _Offer(NamedTuple):
    handle: Handle
    request: Dict[str, Any]


class Offers:
    """The offers of one session that no daemon has acknowledged yet. Thread-safe."""

    def __init__(self, session: "Session", background: Callable[[Callable[[], None]], bool]) -> None:
        """Nothing is offered yet; `background(job)` runs a job that may block."""
        self._session = session
        self._background = background
        self._paced = Paced(session.connection, "submit")
        self._changed = threading.Condition()
        self._open: Dict[str, _Offer] = {}  # by the ids they are offered under
        self._for_spool: Deque[_Offer] = deque()  # those of the open ones that no daemon is asked about any more
        self._writing = False
        self._answers = 0
        self._refused = False  # since the last settle()
        self._waiting: Dict[str, _Offer] = {}  # in the spool

    def add(self, path: str, fields: SaveFields, names: Dict[str, Optional[str]], checkpoint: str) -> Handle:
        """Offer `path`, absolute, to the daemon; to the spool when none takes it. Never raises.

        Blocks only while OPEN_MAX are on their way, for at most ROOM_S: then the handle says "busy".

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
        if not self._enter(offer):
            self._refuse(offer, Refused("busy", f"{OPEN_MAX} files are on their way already", "submit it again later"))
            return offer.handle
        self._paced.put(Request(request, lambda reply: self._on_reply(offer, reply), lambda: self._is_open(offer)))
        if not self._session.connection.is_up:
            self._write_soon()
        return offer.handle

    def tend(self) -> None:
        """Called now and then: send and write on."""
        self._paced.tend()
        with self._changed:
            is_stuck = bool(self._open) and not self._session.connection.is_up
        if is_stuck or self._for_spool:
            self._write_soon()

    def settle(self, deadline_s: float) -> bool:
        """Wait for answers as long as they come, then write the rest to the spool.

        False when `deadline_s` came first, and when an offer was refused, or not taken by the spool, since
        the last time.
        """
        with self._changed:
            asked = set(self._open)  # not what other threads offer meanwhile
        self._wait_for_answers(asked, deadline_s)
        with self._changed:
            self._for_spool.extend(self._open[checkpoint] for checkpoint in asked & self._open.keys())
        if self._for_spool:
            self._write_soon()
        self._session.overflow.drain(deadline_s - time.monotonic())  # done here, where no thread is to be had
        with self._changed:
            self._changed.wait_for(lambda: not asked & self._open.keys(), max(0.0, deadline_s - time.monotonic()))
            refused, self._refused = self._refused, False
            return not (refused or asked & self._open.keys())

    def up(self) -> None:
        """A daemon answers: ask again by what id it knows what lies in the spool. From the connection's thread, or the background.

        What lies at a path may have an older id. Handing it over twice is handing it over once, so the
        same offer by message and by the spool is one checkpoint, whichever comes first.
        """
        with self._changed:
            waiting, self._waiting = self._waiting, {}
        for offer in waiting.values():
            self._ask_about(offer)
        self._paced.tend()

    def _wait_for_answers(self, asked: Set[str], deadline_s: float) -> None:
        """Wait while the daemon goes on answering; what is left of the time is for the spool."""
        connection = self._session.connection
        until_s = deadline_s - min(ANSWER_S, max(0.0, deadline_s - time.monotonic()) / 2)
        seen = -1
        with self._changed:
            while seen != self._answers:
                seen = self._answers
                limit_s = min(ANSWER_S, until_s - time.monotonic())
                self._changed.wait_for(
                    lambda: not asked & self._open.keys() or not connection.is_up or self._answers != seen,  # noqa: B023 - waited for in this very turn
                    max(0.0, limit_s),
                )
                if not asked & self._open.keys() or not connection.is_up:
                    return

    def _enter(self, offer: _Offer) -> bool:
        """Wait for room, except in the thread that makes it."""
        wait_s = 0.0 if self._session.connection.is_own_thread() else ROOM_S
        with self._changed:
            if self._changed.wait_for(lambda: len(self._open) < OPEN_MAX, wait_s):
                self._open[str(offer.request["checkpoint"])] = offer
                return True
            self._refused = True
        return False

    def _write_soon(self) -> None:
        """Have the background write what no daemon takes; one job at a time."""
        with self._changed:
            if self._writing:
                return
            self._writing = True
        if not self._background(self._write_some):
            with self._changed:
                self._writing = False  # the next look tries again

    def _write_some(self) -> None:
        """Runs in the background: the first attempt to connect may still be under way.

        Whatever is written, or can't be, is open no more: an interrupt leaves the rest as it was.
        """
        is_up = self._session.connection.wait_up(CONNECT_S)
        with self._changed:
            piece = list(islice(self._for_spool if is_up else self._open.values(), PIECE))
        for offer in piece:
            if self._is_open(offer):
                self._spooled(offer, self._session.overflow.offer(offer.handle.id, offer.request))
        if not is_up and self._session.connection.is_up:
            self.up()  # a daemon that came meanwhile may have been greeted before the last of them was remembered
        self._paced.tend()
        with self._changed:
            while self._for_spool and not self._is_open(self._for_spool[0]):
                self._for_spool.popleft()
            self._writing = False
            more = bool(self._for_spool or (self._open and not is_up))
        if more:
            self._write_soon()

    def _spooled(self, offer: _Offer, error: Optional[OSError]) -> None:
        if error is not None:
            self._fail(offer, Refused("no_space", f"the spool: {error}"))
        elif self._pop(offer):
            self._session.count("spooled")
            self._remember(offer)
            offer.handle.set_spooled()
            self._session.tell_watch([offer.handle.id])

    def _remember(self, offer: _Offer) -> None:
        """It lies in the spool: to be asked about when the next daemon answers."""
        with self._changed:
            if len(self._waiting) + len(self._paced) < WAITING_MAX:
                self._waiting[str(offer.request["checkpoint"])] = offer

    def _ask_about(self, offer: _Offer) -> None:
        handle = offer.handle
        self._paced.put(Request(offer.request, lambda reply: self._on_known(offer, reply), lambda: not handle.done))

    def _on_known(self, offer: _Offer, reply: Message) -> None:
        if reply.get("ok") is True:
            self._follow(offer, reply)
        else:  # the spool has it still: another look when the next daemon answers
            self._remember(offer)

    def _on_reply(self, offer: _Offer, reply: Message) -> None:
        if reply.get("ok") is True:
            if self._pop(offer):
                self._follow(offer, reply)
            return
        error = error_of(reply)
        if getattr(error, "code", "timeout") in _PASSING:
            with self._changed:
                self._for_spool.append(offer)
            self._write_soon()
        else:
            self._fail(offer, error)

    def _follow(self, offer: _Offer, reply: Message) -> None:
        # What lies there may be known already, by the id that a scan or an earlier hand-over gave it.
        self._session.handles.rename(offer.handle, str(reply.get("checkpoint") or offer.handle.id))
        self._session.handles.apply({"state": "pending", **reply, "checkpoint": offer.handle.id})

    def _fail(self, offer: _Offer, error: Any) -> None:
        if self._pop(offer, refused=True):
            self._refuse(offer, error)

    def _refuse(self, offer: _Offer, error: Any) -> None:
        self._session.count("failed")
        self._session.say("submit", "%s was not taken: %s", offer.request["path"], error)
        offer.handle.fail(error)
        self._session.handles.settle(offer.handle)

    def _is_open(self, offer: _Offer) -> bool:
        return str(offer.request["checkpoint"]) in self._open

    def _pop(self, offer: _Offer, *, refused: bool = False) -> bool:
        with self._changed:
            found = self._open.pop(str(offer.request["checkpoint"]), None)
            self._answers += 1
            self._refused = self._refused or (refused and found is not None)
            self._changed.notify_all()
        return found is not None


class _Shared:
    """The session of module-level submits: one per process, made when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._session: Optional[Session] = None

    def get(self) -> "Session":
        from ckptd_client.session import Session
        from ckptd_client.spec import plain_spec

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
