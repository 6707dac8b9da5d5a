"""What one process keeps for one experiment: the connection, the arenas, what is on its way, the heartbeat.

    connection thread   up() ► open or beat, commits again, levels asked for      push() ► handles, reclaim
                        tick() ► metrics, beat, what was left undone
    background threads  arenas: mapping        spool: facts at the start, images and offers
    training threads    save, log, load; they never wait for the connection's thread without a limit

A session belongs to the process that made it; after a fork the child makes its own (Experiment does).
"""

import logging
import os
import threading
import time
from collections import Counter
from typing import Any, Dict, List, Optional

from ckptd_client import facts
from ckptd_client.background import Background
from ckptd_client.commits import Commits
from ckptd_client.connection import AGAIN_S, Callbacks, Connection, Offline, OnReply
from ckptd_client.errors import CkptdClientError, TimedOut, Unavailable
from ckptd_client.finder import error_of
from ckptd_client.handle import ENDED, Following
from ckptd_client.hot import HotCopies
from ckptd_client.leases import LeasePool
from ckptd_client.metrics import FLUSH_S, MetricBuffer
from ckptd_client.metricstream import MetricStream
from ckptd_client.offers import Offers
from ckptd_client.once import Once
from ckptd_client.overflow import Overflow
from ckptd_client.reads import Reads
from ckptd_client.spec import Spec
from ckptd_client.wire import Message

BEAT_S = 15.0
OPEN_S = 4.0  # longest wait of a first save for the experiment to be opened; a start of the daemon included
FACTS_S = 1.5  # the experiment is opened without those facts that take longer
CLOSE_S = 5.0  # longest wait for the daemon to note how the experiment ended
FOLLOW_S = 30.0  # how long handles of an ended experiment wait for a daemon that went away
WATCH_MAX = 1024
THREAD_AGAIN_S = 1.0  # until a thread that could not be started is tried again

_log = logging.getLogger("ckptd")


class Session:
    """See the module. Attributes are for the client's own modules."""

    def __init__(self, spec: Spec) -> None:
        """Begin to connect and to collect facts, in the background. Returns at once.

        PlaceError  the path of the socket is too long
        """
        self.spec = spec
        self.pid = os.getpid()
        self.experiment = spec.experiment
        self.segment: Optional[int] = None
        self.latest_step: Optional[int] = None
        self.resumed_from: Optional[str] = None
        self.facts: Dict[str, Any] = facts.quick_facts()
        self.counters: Counter[str] = Counter()
        self.handles = Following()
        self.metrics = MetricBuffer()
        self._changed = threading.Condition()
        self.once = Once()
        self._opened = False  # on the connection that stands
        self._known = False  # a daemon has confirmed the id in this process
        self._opening = False
        self._facts_done = False
        self._begun_s = time.monotonic()
        self._ended = False
        self._lost_count = self._dropped_count = 0  # as of the last flush: images, metric points
        self._beat_at_s = self._down_s = 0.0
        self.refused: Optional[CkptdClientError] = None
        self._mapper = Background("ckptd-arenas")
        self._spooler = Background("ckptd-spool")
        callbacks = Callbacks(push=self._on_push, up=self._on_up, down=self._on_down, tick=self._on_tick)
        connect = Offline if spec.offline else Connection
        self.connection = connect(spec.socket, autostart=spec.autostart, callbacks=callbacks)
        self.reads = Reads(self)
        self.hot = HotCopies(self)
        self.overflow = Overflow(self._spooler, spec.spool_bytes_max)
        self.leases = LeasePool(self.ask, self._mapper, self._gave_back)
        self.commits = Commits(self)
        self.offers = Offers(self, self._spooler.submit)
        self._stream = MetricStream(self, self.metrics)
        try:
            # A thread of its own: git on a busy or hung disk must hold up neither the spool nor the opening.
            threading.Thread(target=self._collect_facts, name="ckptd-facts", daemon=True).start()
        except (RuntimeError, MemoryError) as error:
            self._facts_done = True
            self.say("facts", "no thread to look at the code and the machine with (%s)", error)
        self.connection.start()

    # for the client's other modules --------------------------------------------------------------

    def ask(self, op: str, on_reply: OnReply, **fields: Any) -> bool:
        """Send a request about this experiment without waiting; False when no daemon can take it.

        What is kept for later then has its next turn at a tick: soon, when a daemon is there.
        """
        sent = self.connection.request_nowait(op, on_reply, experiment=self.experiment, **fields)
        if not sent and self.connection.is_up:
            self.connection.tick_within(AGAIN_S)
        return sent

    def is_open(self) -> bool:
        """Whether the daemon of the connection that stands has opened the experiment."""
        return self._opened

    def tell(self, op: str, **fields: Any) -> bool:
        """Send a request whose answer does not matter."""
        return self.ask(op, _ignore, **fields)

    def wait_open(self, timeout_s: float) -> bool:
        """Wait until a daemon has opened the experiment; False at once when none is there, or it refused."""
        deadline_s = time.monotonic() + timeout_s
        if not self.connection.wait_up(timeout_s):
            return False
        with self._changed:
            self._changed.wait_for(
                lambda: self._opened or self.refused is not None or not self.connection.is_up,
                max(0.0, deadline_s - time.monotonic()),
            )
            return self._opened

    def count(self, what: str) -> None:
        """Count one of something, for `stats()`."""
        with self._changed:
            self.counters[what] += 1

    def say(self, topic: str, message: str, *arguments: Any) -> None:
        """Log a warning once, until `unsay(topic)`."""
        self.once.say(topic, message, *arguments)

    def unsay(self, topic: str) -> bool:
        """The trouble is over; return whether it had been logged."""
        return self.once.unsay(topic)

    def next_step(self) -> int:
        """Return a step for a save that names none."""
        with self._changed:
            self.latest_step = 0 if self.latest_step is None else self.latest_step + 1
            return self.latest_step

    def note_step(self, step: Optional[int]) -> None:
        """Remember how far training is."""
        if step is not None:
            self.latest_step = step

    def poke(self) -> None:
        """Metrics wait: have them sent within FLUSH_S."""
        self.connection.tick_within(FLUSH_S)

    def flush(self, timeout_s: float) -> bool:
        """Bring what is on its way to safety: commits acknowledged or in the spool, metrics confirmed.

        Blocks for at most `timeout_s`, or for a write that nobody else can do; False when that was too short, when
        metrics wait for a daemon that is away, and when something was refused or lost since the last time.
        """
        deadline_s = time.monotonic() + timeout_s
        safe = self.commits.settle(deadline_s)
        safe = self.offers.settle(deadline_s) and safe
        told = not len(self.metrics) or (
            self.wait_open(min(OPEN_S, deadline_s - time.monotonic())) and self._stream.settle(deadline_s)
        )
        drained = self._spooler.drain(deadline_s - time.monotonic())
        lost, self._lost_count = self.overflow.lost_count - self._lost_count, self.overflow.lost_count
        dropped = self.metrics.dropped_count - self._dropped_count
        self._dropped_count += dropped
        return drained and safe and told and not lost and not dropped

    def end(self, status: str, error: Optional[str], timeout_s: float) -> None:
        """Flush, say how training ended, give arenas back. The connection stays for handles that still climb."""
        deadline_s = time.monotonic() + timeout_s
        try:
            try:
                if not self.flush(timeout_s):
                    message = "not everything was brought to safety within %g s; %d metric points wait, %d were dropped"
                    self.say("flush", message, timeout_s, len(self.metrics), self.metrics.dropped_count)
            except Exception:  # noqa: BLE001 - what follows is owed to the daemon and to the other runs all the same
                _log.exception("ckptd: not everything was brought to safety")
            self._say_ended(status, error, deadline_s - time.monotonic())
        finally:
            self.leases.close()
            self._ended = True
            self._down_s = time.monotonic()
            self._close_when_settled()

    def _say_ended(self, status: str, error: Optional[str], left_s: float) -> None:
        if not self.wait_open(min(OPEN_S, left_s)):
            return
        limit_s = max(0.0, min(left_s, CLOSE_S))
        try:
            self.connection.exchange(
                "experiment.close", limit_s, experiment=self.experiment, status=status, error=error
            )
        except (Unavailable, TimedOut) as problem:
            self.say("close", "the daemon was not told how the experiment ended: %s", problem)

    def _gave_back(self) -> None:
        if self._ended:
            self.connection.tick_within(0.0)  # to hang up, if that was the last thing

    def _close_when_settled(self) -> None:
        """After the end: hang up once nothing is read, followed or lent any more, the last two for FOLLOW_S without a daemon."""
        # What is lent to a run that ended is the daemon's again once this closes: not under a thread that may write there.
        if (self._ended and not self.reads.are_open()) and (
            not (self.handles.unsettled() or self.leases.are_held() or self.leases.is_unheard())
            or (not self.connection.is_up and time.monotonic() - self._down_s > (FOLLOW_S if self._known else 0.0))
        ):
            self.connection.close()

    def stats(self) -> Dict[str, Any]:
        """Return the counters of this process."""
        with self._changed:
            counted = {name: self.counters[name] for name in ("saves", "staged", "spooled", "skipped", "failed")}
        return {
            **counted,
            "in_flight": self.handles.in_flight(),
            "metrics_logged": self.metrics.logged_count,
            "metrics_waiting": len(self.metrics),
            "metrics_dropped": self.metrics.dropped_count,
            "connected": self.connection.is_up,
        }

    # in the background ---------------------------------------------------------------------------

    def _collect_facts(self) -> None:
        try:
            found = facts.slow_facts()
        finally:
            with self._changed:
                self._facts_done = True
        with self._changed:
            self.facts = {**self.facts, **found}
        self._open()

    # in the connection's thread ------------------------------------------------------------------

    def _on_up(self, hello: Message) -> None:
        self.unsay("spooling")
        if self.unsay("down"):
            _log.warning("ckptd: a daemon answers again (%s)", hello.get("server"))
        self.overflow.found(str(hello.get("spool_dir") or ""), is_shared=self.connection.is_shared)
        self._warn_of_spool()
        self._opening = False
        self._stream.up()
        self._beat_at_s = time.monotonic() + BEAT_S
        self._open()
        self.commits.up()
        self.leases.up()
        self.offers.up()
        self._watch()

    def _warn_of_spool(self) -> None:
        unread = self.overflow.unread()
        if unread is None:
            self.unsay("spool unread")
            return
        message = (
            "what this daemon can't take goes to %s, where it does not look: %s. It is brought over when that can be "
            "written to; in a container, mount the daemon's spool"
        )
        theirs = self.overflow.directory
        self.say("spool unread", message, unread, f"{theirs} can't be written to" if theirs else "it names no spool")

    def _on_down(self, reason: str) -> None:
        with self._changed:
            self._opened = False
            self._changed.notify_all()
        self.hot.tend(now=True)
        self._down_s = time.monotonic()
        if self._ended:
            return
        self.say("down", "the daemon is gone (%s); saves go on", reason)

    def _on_push(self, push: Message) -> None:
        kind = push.get("push")
        if kind == "level":
            handle = self.handles.apply(push)
            if handle is not None and handle.state in ENDED:
                self.count("failed")
                self.say(
                    f"ended {handle.id}", "step %s was not saved: %s (%s)", handle.step, handle.state, handle.error
                )
        elif kind == "reclaim":
            self.leases.reclaim(str(push.get("arena")))

    def _open(self) -> None:
        """Open the experiment, or, when this process has done so before, say that it is still there.

        The first time it waits for the facts, for at most FACTS_S: later saves carry those that come late.
        """
        wait_s = self._begun_s + FACTS_S - time.monotonic()
        if not self._facts_done and wait_s > 0:
            self.connection.tick_within(wait_s)
            return
        with self._changed:
            if self._opened or self._opening or not self.connection.is_up or not self.spec.name:
                return
            self._opening = True
        if not self._send_open():
            self._opening = False

    def _send_open(self) -> bool:
        if self._known:
            # Opening again would begin a new segment; a beat is enough, unless the daemon lost its catalog.
            return self.ask("experiment.beat", self._on_beat, step=self.latest_step)
        spec = self.spec
        return self.ask(
            "experiment.open", self._on_open, name=spec.name, project=spec.project, dir=spec.directory, tags=spec.tags,
            config=spec.config, parent=spec.parent, facts=self.facts, resume=spec.resume,
        )  # fmt: skip

    def _on_open(self, reply: Message, fds: List[int]) -> None:
        _ignore(reply, fds)
        error = error_of(reply) if reply.get("ok") is not True else None
        with self._changed:
            self._opening = False
            if error is not None and getattr(error, "code", "") == "unreachable":
                return
            self.refused = error
            if error is None:
                self.experiment = str(reply.get("experiment", self.experiment))
                self.segment = reply.get("segment")
                latest = reply.get("latest")
                if self.latest_step is None and isinstance(latest, dict):
                    self.latest_step = latest.get("step")
                self._opened = self._known = True
            self._changed.notify_all()
        if error is not None:
            self.say("open", "the daemon refused experiment %s/%s: %s", self.spec.project, self.spec.name, error)
        self.connection.tick_within(0.0)

    def _on_beat(self, reply: Message, fds: List[int]) -> None:
        _ignore(reply, fds)
        error = reply.get("error")
        with self._changed:
            self._opening = False
            self._opened = reply.get("ok") is True
            self._known = self._opened or not isinstance(error, dict) or error.get("code") != "not_found"
            self._changed.notify_all()
        if not self._known:
            self._open()
        self.connection.tick_within(0.0)

    def _watch(self) -> None:
        ids = self.handles.unsettled()
        for start in range(0, len(ids), WATCH_MAX):
            self.tell_watch(ids[start : start + WATCH_MAX])

    def tell_watch(self, ids: List[str]) -> None:
        """Follow these checkpoints, and learn where they are now."""
        self.connection.request_nowait("watch", self._on_states, checkpoints=ids)

    def _on_states(self, reply: Message, fds: List[int]) -> None:
        _ignore(reply, fds)
        for state in reply.get("states") or []:
            if isinstance(state, dict):
                self._on_push({"push": "level", **state})

    def _on_tick(self) -> float:
        self._close_when_settled()
        self.commits.tend()
        self.leases.tend()
        self.overflow.tend()
        self.hot.tend()
        self.reads.tend()
        self.offers.tend()
        has_threads = [background.tend() for background in (self._mapper, self._spooler)]
        now_s = time.monotonic()
        due = now_s >= self._beat_at_s
        if due:
            self._beat_at_s = now_s + BEAT_S
            self._watch()
        if not self._opened and (due or self.refused is None):
            self._open()  # what was refused may be possible by now: a root added, a disk mounted
        elif due:
            self.tell("experiment.beat", step=self.latest_step, rss_bytes=facts.rss_bytes())
        if self._opened:
            self._stream.send()
        delay_s = FLUSH_S if len(self.metrics) and self._opened else self._beat_at_s - now_s
        return delay_s if all(has_threads) else min(delay_s, THREAD_AGAIN_S)


def _ignore(_reply: Message, fds: List[int]) -> None:
    for fd in fds:
        os.close(fd)
