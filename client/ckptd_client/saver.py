"""The save path: state ► plan ► arena (or memory of our own) ► committed image ► message.

What it waits for, and for how long:

    an arena is ready                         nothing: one memcpy
    none is ready, a daemon answers           an arena, at most overlap_wait_s
    none is ready, no daemon answers          nothing: memory of our own, written to the spool in the background
    that memory is still being written        it, at most what is left of overlap_wait_s
"""

import logging
import threading
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple

from ckptd_client.arena import TAKEN_BACK, CopiedImage, commit_image, copy_state
from ckptd_client.arguments import SaveFields
from ckptd_client.errors import CkptdClientError, Refused, TimedOut
from ckptd_client.flatten import flatten
from ckptd_client.handle import Handle
from ckptd_client.leases import Lease
from ckptd_client.plan import Plan, PlanCache
from ckptd_client.session import OPEN_S
from ckptd_client.wire import number

if TYPE_CHECKING:
    from ckptd_client.session import Session

READY_MAX = 2
GRACE_S = 0.05  # a lease that is on its way is waited for this long before a save counts as overlapping

_log = logging.getLogger("ckptd")


class Saver:
    """Saves of one session, one at a time. Thread-safe."""

    def __init__(self, session: "Session") -> None:
        """Remember no structure yet."""
        self._session = session
        self._plans = PlanCache()
        self._lock = threading.Lock()
        self._sequence = 0
        self._begun_s = 0.0

    def save(self, state: Any, fields: SaveFields, checkpoint: str) -> Handle:
        """Save `state` as `checkpoint`; see Experiment.save. Never raises unless the experiment's raise_errors is set."""
        session = self._session
        begun_s = time.monotonic()
        deadline_s = begun_s + session.spec.overlap_wait_s
        session.count("saves")
        if fields.step is None:
            fields = fields._replace(step=session.next_step())
        session.note_step(fields.step)
        handle = Handle(checkpoint, fields.step)
        if not self._lock.acquire(timeout=max(0.0, session.spec.overlap_wait_s)):
            return self._failed(handle, TimedOut("another thread's save took longer than overlap_wait_s"))
        self._begun_s = begun_s
        try:
            self._save(state, fields, handle, deadline_s)
        except Exception as error:
            if session.spec.raise_errors:
                session.count("failed")
                handle.fail(_client_error(error))
                raise
            return self._failed(handle, error)
        finally:
            self._lock.release()
        return handle

    def prepare(self, state: Any, format: str, wait_s: float) -> bool:  # noqa: A002 - the word everybody uses
        """Have arenas for `state` leased, mapped and filled with pages; return whether one is ready after `wait_s`."""
        session = self._session
        with self._lock:
            plan = self._plans.get(flatten(state) if format == "safetensors" else state, format)
        deadline_s = time.monotonic() + wait_s

        def ask() -> None:
            if session.wait_open(OPEN_S):
                session.leases.want(plan.arena_bytes, READY_MAX)

        if wait_s > 0:
            ask()
            return session.leases.wait_ready(max(0.0, deadline_s - time.monotonic()))
        try:
            threading.Thread(target=ask, name="ckptd-prepare", daemon=True).start()
        except (RuntimeError, MemoryError) as error:
            session.say("prepare", "no thread to prepare memory with (%s); the first save asks for it", error)
        return False

    def _save(self, state: Any, fields: SaveFields, handle: Handle, deadline_s: float) -> None:
        # Walked once: the plan, and the plain values of this moment.
        flat = flatten(state) if fields.format == "safetensors" else state
        plan = self._plans.get(flat, fields.format)
        lease, why = self._lease(plan.arena_bytes, fields.on_overlap, deadline_s)
        if lease is not None:
            try:
                self._into_arena(plan, flat, lease, fields, handle)
            except Refused as error:
                if error.code != TAKEN_BACK:
                    raise
                session = self._session
                session.say("taken back", "an arena was taken back while it was written; the save goes to the spool")
            else:
                return
        if why == "skip":
            self._skipped(handle)
        else:
            self._into_spool(plan, flat, fields, handle, deadline_s)

    def _lease(self, size_bytes: int, on_overlap: str, deadline_s: float) -> Tuple[Optional[Lease], str]:
        session = self._session
        lease, why = session.leases.take(size_bytes, 0.0)
        if lease is not None:
            return lease, ""
        if not session.wait_open(min(OPEN_S, max(0.0, deadline_s - time.monotonic()))):
            return None, "unreachable"
        if session.handles.in_flight():
            if on_overlap in ("skip", "spool"):
                if session.leases.is_coming():
                    lease, why = session.leases.take(size_bytes, GRACE_S)
                if lease is None:
                    session.leases.want(size_bytes, 1)
                return lease, on_overlap if lease is None else ""
            if on_overlap == "replace":
                session.tell("replace")
        lease, why = session.leases.take(size_bytes, max(0.0, deadline_s - time.monotonic()))
        if lease is None and why not in ("unreachable", "timeout", "closed"):
            said = session.leases.explain(why)
            session.say(f"lease {why}", "the daemon lends no arena (%s); the save goes to the spool", said)
        return lease, why

    def _into_arena(self, plan: Plan, flat: Any, lease: Lease, fields: SaveFields, handle: Handle) -> None:
        session = self._session
        try:
            image = copy_state(plan, flat, lease.arena, lease.generation)
            self._commit(lease, image, fields, handle)
        except BaseException:
            session.leases.give_back(lease)
            raise
        session.handles.add(handle)
        session.commits.add(lease, handle, time.monotonic() - self._begun_s)
        # Asked for in the same breath: by the next save an arena has been found, mapped and filled.
        session.leases.want(plan.arena_bytes, 1)

    def _into_spool(self, plan: Plan, flat: Any, fields: SaveFields, handle: Handle, deadline_s: float) -> None:
        session = self._session
        reason = session.refused or session.connection.problem
        session.say("spooling", "no daemon takes saves now (%s); they go to the spool", reason)
        wait_s = 0.0 if fields.on_overlap == "skip" else max(0.0, deadline_s - time.monotonic())
        lease = session.overflow.take(plan.arena_bytes, wait_s)
        if lease is None:
            if fields.on_overlap == "skip":
                self._skipped(handle)
                return
            raise TimedOut("the save before is still being written to the spool")
        try:
            image = copy_state(plan, flat, lease.arena, lease.generation)
            self._commit(lease, image, fields, handle)
        except BaseException:
            session.overflow.drop(lease.arena)
            raise
        session.handles.add(handle)
        session.overflow.write(lease, handle.id, lambda error: self._spooled(handle, error))

    def _spooled(self, handle: Handle, error: Optional[OSError]) -> None:
        """Runs in the background, once the image lies in the spool or could not be written."""
        session = self._session
        if error is not None:
            self._failed(handle, Refused("no_space", f"the spool: {error}", "free space, or raise spool_bytes_max"))
            session.handles.settle(handle)
            return
        session.count("spooled")
        handle.set_spooled()
        session.tell_watch([handle.id])

    def _skipped(self, handle: Handle) -> None:
        self._session.count("skipped")
        handle.fail(Refused("skipped", "an earlier save was still on its way", "save less often"), "skipped")

    def _failed(self, handle: Handle, error: Exception) -> Handle:
        self._session.count("failed")
        self._session.say(f"save {type(error).__name__}", "step %s was not saved: %s", handle.step, error)
        _log.debug("ckptd: the failed save", exc_info=error)
        handle.fail(_client_error(error))
        return handle

    def _commit(self, lease: Lease, image: CopiedImage, fields: SaveFields, handle: Handle) -> None:
        """Commit; what describes the run is left out, piece by piece, where it does not fit."""
        descriptor = self._descriptor(fields, handle)
        for left_out in ("facts", "config"):
            try:
                commit_image(lease.arena, descriptor, image, lease.generation)
            except Refused as error:
                if error.code != "descriptor_too_large":
                    raise
                descriptor["experiment"][left_out] = {"_cut": "too large"}
            else:
                return
        commit_image(lease.arena, descriptor, image, lease.generation)

    def _descriptor(self, fields: SaveFields, handle: Handle) -> Dict[str, Any]:
        session, spec = self._session, self._session.spec
        self._sequence += 1
        return {
            "v": 1,
            "checkpoint": handle.id,
            "created_at": datetime.now(timezone.utc).isoformat(),
            "experiment": {
                "id": session.experiment,
                "project": spec.project,
                "name": spec.name,
                "dir": spec.directory,
                "config": spec.config,
                "tags": spec.tags,
                "parent": spec.parent,
                "facts": session.facts,
            },
            "step": fields.step,
            "epoch": fields.epoch,
            "metrics": {name: number(value) for name, value in fields.metrics.items()},
            "note": fields.note,
            "meta": fields.meta,
            "parent": session.resumed_from,
            "update_best": fields.update_best,
            "segment": session.segment,
            "on_overlap": fields.on_overlap,
            "sequence": self._sequence,
        }


def _client_error(error: Exception) -> CkptdClientError:
    if isinstance(error, CkptdClientError):
        return error
    refused = Refused("internal", f"{type(error).__name__}: {error}")
    refused.__cause__ = error
    return refused
