"""The file hand-off: files that a caller wrote himself are offered to the daemon, or to the spool when it is away."""

import os
import threading
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Union

from ckptd_client.arguments import SaveFields
from ckptd_client.errors import Refused
from ckptd_client.finder import close_all, error_of
from ckptd_client.handle import Handle
from ckptd_client.wire import Message, number

if TYPE_CHECKING:
    from ckptd_client.session import Session

ACKNOWLEDGE_S = 5.0
_DIE_WITH_PROCESS_S = 10.0


def offer(
    session: "Session", path: str, fields: SaveFields, names: Dict[str, Optional[str]], checkpoint: str
) -> Handle:
    """Offer `path`, absolute, to the daemon; to the spool when no daemon takes it. Never blocks, never raises.

    names  "project" and "experiment" of the checkpoint, where the caller gave any
    """
    handle = session.handles.add(Handle(checkpoint, fields.step))
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
    session.count("saves")

    def spool() -> None:
        session.overflow.offer(checkpoint, request, spooled)

    def spooled(error: Optional[OSError]) -> None:
        if error is None:
            session.count("spooled")
            handle.set_spooled()
            session.tell_watch([checkpoint])
            return
        session.count("failed")
        session.say("offer", "%s could not be offered: %s", path, error)
        handle.fail(Refused("no_space", f"the spool: {error}"))
        session.handles.settle(handle)

    def answered(reply: Message, fds: List[int]) -> None:
        close_all(fds)
        if reply.get("ok") is True:
            session.handles.apply({"state": "pending", **reply, "checkpoint": checkpoint})
            return
        error = error_of(reply)
        if getattr(error, "code", "") in ("unreachable", "busy", "internal"):
            spool()
            return
        session.count("failed")
        session.say("submit", "%s was refused: %s", path, error)
        handle.fail(error)
        session.handles.settle(handle)

    if not session.connection.request_nowait("submit", answered, **request):
        spool()
    return handle


class _Shared:
    """The session of module-level submits: one per process, made when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._session: Optional[Session] = None

    def get(self) -> "Session":
        import atexit

        from ckptd_client.experiment import plain_spec
        from ckptd_client.session import Session

        if self._session is not None and self._session.pid != os.getpid():
            self._lock, self._session = threading.Lock(), None  # a forked child: the parent's session is not ours
        with self._lock:
            if self._session is None:
                self._session = Session(plain_spec())
                atexit.register(self._flush, self._session)
            return self._session

    @staticmethod
    def _flush(session: "Session") -> None:
        if session.pid == os.getpid():
            session.flush(_DIE_WITH_PROCESS_S)


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

    Waits at most ACKNOWLEDGE_S for the daemon to know of it; when none is there the offer lies in the
    spool before this returns. Never raises for that.

    ValueError  names the bad argument
    """
    from ckptd_client import arguments

    checked = arguments.save_fields(arguments.known_fields(fields))
    names = {
        "project": None if project is None else arguments.name("project", project),
        "experiment": None if experiment is None else arguments.name("experiment", experiment),
    }
    absolute = arguments.path("path", path)
    handle = Handle(os.urandom(16).hex(), checked.step, state="disabled")
    if arguments.mode() == "disabled":
        return handle
    session = _shared.get()
    session.connection.wait_up(ACKNOWLEDGE_S)
    handle = offer(session, absolute, checked, names, handle.id)
    handle.wait_acknowledged(ACKNOWLEDGE_S)
    return handle
