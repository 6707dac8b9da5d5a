"""Arenas the daemon lends this process: asked for ahead of need, mapped in the background, given back when unused.

    asked ──reply with fd──► mapping ──► ready ──take()──► in use ──commit acknowledged──► idle mapping
      │ refused                            │ reclaim, too small                             (its pages stay
      ▼                                    ▼                                                 mapped for the next
    take() learns why                   abandon                                              lease of this arena)

A mapping is kept by arena id: when the daemon lends the same arena again, under a new generation,
its pages need no second mapping. An arena is written only between a lease and its commit.

A lease belongs to this process, not to a connection: the daemon frees it when the process dies or
abandons it, so what was ready before a reconnect is ready after it.
"""

import os
import threading
import time
from collections import OrderedDict, deque
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional, Tuple

from ckptd_client import control
from ckptd_client.arena import MappedArena
from ckptd_client.background import Background
from ckptd_client.wire import Message

LEASE_WAIT_S = 60.0  # how long the daemon may hold a request for the next save's arena
IDLE_MAPPINGS_MAX = 3
IDLE_S = 600.0  # an idle mapping keeps memory alive that the daemon may have given up
READY_MAX = 8

Ask = Callable[..., bool]


class Lease(NamedTuple):
    """One arena that this process may write: mapped, under one generation."""

    arena: MappedArena
    generation: int

    @property
    def name(self) -> str:
        """The arena's id as the wire writes it."""
        return self.arena.arena_id.hex()

    def is_ours(self) -> bool:
        """Whether the control page still speaks of this lease, in whatever state."""
        page = control.read(self.arena.buffer)
        return page is not None and page.arena == self.arena.arena_id and page.generation == self.generation

    def is_writable(self) -> bool:
        """Whether the arena waits for its first byte under this lease."""
        page = control.read(self.arena.buffer)
        return (
            page is not None
            and page.arena == self.arena.arena_id
            and page.generation == self.generation
            and page.state in (control.LEASED, control.WRITING)
        )

    def committed(self) -> Optional[memoryview]:
        """Return the committed image under this lease, whole pages; None when it is not there (any more)."""
        page = control.read(self.arena.buffer)
        if page is None or not self.is_ours():
            return None
        end = page.descriptor_offset + page.descriptor_size
        if not control.PAGE <= page.descriptor_offset <= end <= self.arena.size_bytes:
            return None
        if not control.is_whole(page, bytes(self.arena.buffer[page.descriptor_offset : end])):
            return None
        return self.arena.buffer[: control.round_up(end)]


class LeasePool:
    """The leases of one experiment in one process. Thread-safe."""

    def __init__(self, ask: Ask, background: Background, heard: Callable[[], None] = lambda: None) -> None:
        """`ask(op, on_reply, **fields)` sends a request without waiting and says whether it was sent.

        `heard()` is called, in the connection's thread, when the daemon has heard what was given back.
        """
        self._ask = ask
        self._heard = heard
        self._background = background
        self._changed = threading.Condition()
        self._ready: Deque[Lease] = deque()
        self._asked = 0  # requests without a reply, and replies that are being mapped
        self._mapped: OrderedDict[str, MappedArena] = OrderedDict()
        self._idle_since_s: dict[str, float] = {}
        self._in_use: Dict[str, int] = {}  # arena -> the generation under which it is
        self._refusals = 0
        self._refusal = ""
        self._told = ""
        self._abandoned: Dict[Tuple[str, int], bool] = {}  # unanswered, and whether it was sent on this connection
        self._closed = False

    def want(self, size_bytes: int, count: int, wait_s: float = LEASE_WAIT_S) -> None:
        """Ask for arenas until `count` are ready or on their way. Returns at once.

        What was ready but is too small goes back first: a model that grew must not be locked out.
        """
        with self._changed:
            small = [lease for lease in self._ready if lease.arena.size_bytes < size_bytes]
            for lease in small:
                self._ready.remove(lease)
            missing = 0 if self._closed else min(count, READY_MAX) - len(self._ready) - self._asked
            self._asked += max(0, missing)
        for lease in small:
            self.give_back(lease)
        for _ in range(missing):
            if not self._ask("lease", self._on_lease, size_bytes=size_bytes, wait_s=wait_s):
                self._refuse("unreachable")

    def take(self, size_bytes: int, wait_s: float) -> Tuple[Optional[Lease], str]:
        """Return a lease of at least `size_bytes`, or None and why: "unreachable", "timeout", "closed" or the daemon's code.

        Blocks for at most `wait_s`, or for one mapping where no thread is to be had; not at all when one is
        ready, or when no daemon is there to ask.
        """
        deadline_s = time.monotonic() + wait_s
        seen = self._refusals
        asked_here = False
        while True:
            self._background.stand_in(deadline_s)
            with self._changed:
                lease = self._pick(size_bytes)
                if lease is not None:
                    return lease, ""
                if self._closed:  # nothing is asked for any more
                    return None, "closed"
                left_s = deadline_s - time.monotonic()
                # What was refused may be a request that ran out of its own time before this call.
                if self._refusals != seen and (asked_here or self._refusal != "no_arena"):
                    return None, self._refusal
                if left_s <= 0:
                    return None, "timeout"
                seen = self._refusals
                if self._asked:
                    self._changed.wait(left_s)
                    continue
            asked_here = True
            self.want(size_bytes, 1, left_s)

    def explain(self, why: str) -> str:
        """Return what `take` said why, in the daemon's own words where it was the last to refuse."""
        return f"{why}: {self._told}" if self._told and why == self._refusal else why

    def is_coming(self) -> bool:
        """Whether a lease is asked for or being mapped."""
        return self._asked > 0

    def are_held(self) -> bool:
        """Whether somebody has taken a lease, or one is being mapped, that was neither committed nor given back."""
        return bool(self._in_use)

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until nothing is on its way any more; return whether a lease is ready."""
        with self._changed:
            self._changed.wait_for(lambda: not self._asked, timeout_s)
            return bool(self._ready)

    def give_back(self, lease: Lease) -> None:
        """Return an arena in which nothing was committed."""
        is_ours = lease.is_ours()  # asked first: rest() may unmap the page
        self.rest(lease)
        # Said last: from then on the arena may be lent to us again, and that lease is not at rest.
        if is_ours:
            self._abandon(lease.name, lease.generation)

    def up(self) -> None:
        """A daemon is there again: tell it what was given back and may not have been heard of."""
        with self._changed:
            waiting = list(self._abandoned)
        for arena, generation in waiting:
            self._abandon(arena, generation)

    def is_unheard(self) -> bool:
        """Whether something was given back that no daemon has confirmed."""
        return bool(self._abandoned)

    def rest(self, lease: Lease) -> None:
        """The arena's content is the daemon's now: keep only the mapping, for its next lease."""
        with self._changed:
            if self._in_use.get(lease.name, lease.generation) != lease.generation:
                return  # lent to us again since
            self._in_use.pop(lease.name, None)
            self._idle_since_s[lease.name] = time.monotonic()
            if self._closed:  # there will be no next lease
                self._unmap(lease.name)
            self._drop_idle()

    def reclaim(self, arena: str) -> None:
        """The daemon wants an arena back: give it up if it is ready and unused, and unmap it if it is idle."""
        with self._changed:
            lease = next((lease for lease in self._ready if lease.name == arena), None)
            if lease is not None:
                self._ready.remove(lease)
        if lease is not None:
            self.give_back(lease)
        with self._changed:
            if arena in self._idle_since_s:
                self._unmap(arena)

    def tend(self) -> None:
        """Unmap what has been idle for long, give back what could not be; called now and then."""
        with self._changed:
            self._drop_idle()
            unsent = [key for key, is_sent in self._abandoned.items() if not is_sent]
        for arena, generation in unsent:
            self._abandon(arena, generation)

    def close(self) -> None:
        """Give back what is ready and unmap what nobody uses. Arenas in use stay mapped: their commit is under way."""
        with self._changed:
            self._closed = True
            ready, self._ready = list(self._ready), deque()
            self._changed.notify_all()
        for lease in ready:
            self.give_back(lease)
        with self._changed:
            for name in list(self._idle_since_s):
                self._unmap(name)

    def _pick(self, size_bytes: int) -> Optional[Lease]:
        fits = [lease for lease in self._ready if lease.arena.size_bytes >= size_bytes]
        for lease in sorted(fits, key=lambda lease: lease.arena.size_bytes):
            self._ready.remove(lease)
            if lease.is_writable():
                return lease
            self.rest(lease)  # the daemon took it back while nobody listened
        return None

    def _on_lease(self, reply: Message, fds: List[int]) -> None:
        """Runs in the connection's thread: mapping and populating is the background's work."""
        if reply.get("ok") is not True:
            _close_fds(reply, fds)
            error = reply.get("error")
            error = error if isinstance(error, dict) else {}
            told = "; ".join(str(error[part]) for part in ("message", "hint") if error.get(part))
            self._refuse(str(error.get("code", "error")), told)
        elif len(fds) != 1 or not self._background.submit(lambda: self._map(reply, fds)):
            _close_fds(reply, fds)
            self._refuse("error")
        else:
            with self._changed:
                self._changed.notify_all()  # who waits for it maps it himself where no thread is to be had

    def _map(self, reply: Message, fds: List[int]) -> None:
        """Map what was lent. Ctrl-C leaves the descriptor open: the job is done again."""
        try:
            lease = self._lease_of(reply, fds[0])
        except Exception as error:  # noqa: BLE001 - whoever waits for the arena must hear of any end
            while fds:
                os.close(fds.pop())
            arena, generation = str(reply.get("arena")), reply.get("generation")
            self._forget(arena)
            self._abandon(arena, generation if type(generation) is int else 0)
            self._refuse(f"can't map the arena: {error}")
            return
        os.close(fds.pop())
        with self._changed:
            self._asked -= 1
            closed = self._closed
            if not closed:
                self._ready.append(lease)
            self._changed.notify_all()
        if closed:
            self.give_back(lease)

    def _lease_of(self, reply: Message, fd: int) -> Lease:
        name, generation, size_bytes = str(reply["arena"]), int(reply["generation"]), int(reply["size_bytes"])
        with self._changed:
            arena = self._mapped.get(name)
            self._idle_since_s.pop(name, None)
            self._in_use[name] = generation
        if arena is None or arena.size_bytes != size_bytes:
            if os.fstat(fd).st_size < size_bytes:
                raise ValueError("the descriptor is shorter than the lease says")
            arena = MappedArena(fd, size_bytes, bytes.fromhex(name))
            arena.populate()
            with self._changed:
                self._mapped[name] = arena
        lease = Lease(arena, generation)
        if not lease.is_writable():
            raise ValueError("the control page does not speak of this lease")
        return lease

    def _forget(self, arena: str) -> None:
        """Nothing came of a lease of this arena: what is mapped of it is idle."""
        with self._changed:
            self._in_use.pop(arena, None)
            if arena in self._mapped:
                self._idle_since_s.setdefault(arena, time.monotonic())

    def _abandon(self, arena: str, generation: int) -> None:
        key = arena, generation
        with self._changed:
            self._abandoned[key] = True
        if not self._ask(
            "abandon", lambda reply, fds: self._on_abandoned(key, reply, fds), arena=arena, generation=generation
        ):
            with self._changed:
                self._abandoned[key] = False

    def _on_abandoned(self, key: Tuple[str, int], reply: Message, fds: List[int]) -> None:
        _close_fds(reply, fds)
        error = reply.get("error")
        with self._changed:
            if isinstance(error, dict) and error.get("code") in ("unreachable", "busy"):
                self._abandoned[key] = False
                return
            self._abandoned.pop(key, None)
        self._heard()

    def _refuse(self, reason: str, told: str = "") -> None:
        with self._changed:
            self._asked -= 1
            self._refusals += 1
            self._refusal, self._told = reason, told
            self._changed.notify_all()

    def _drop_idle(self) -> None:
        now_s = time.monotonic()
        by_age = sorted(self._idle_since_s, key=lambda name: self._idle_since_s[name])
        for index, name in enumerate(by_age):
            if len(by_age) - index > IDLE_MAPPINGS_MAX or now_s - self._idle_since_s[name] > IDLE_S:
                self._unmap(name)

    def _unmap(self, name: str) -> None:
        self._idle_since_s.pop(name, None)
        arena = self._mapped.pop(name, None)
        if arena is not None:
            arena.close()


def _close_fds(_reply: Any, fds: List[int]) -> None:
    for fd in fds:
        os.close(fd)
