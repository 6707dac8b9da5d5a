"""The line of saves that wait for an arena.

A crowd may wait (some thousands), so nothing here costs all of them something each time: one look goes
down the line from its head, one waiter after the other, and ends with the first who proves that nobody
behind can be served; and one waiter's timer looks on behalf of all.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import anyio

from ckptd.errors import NoArena
from ckptd.intake.arena import Holder

WAITERS_MAX, WAITERS_PER_UID_MAX = 4096, 1024
RETRY_AFTER_S = 1.0  # for who came too late to wait
SOME_MAX = 64  # waiters on whose behalf one look asks for arenas
LOOK_S = 0.25  # what nobody is told of is looked for this often: a reader that died frees memory without a word


@dataclass(eq=False)
class Waiter:
    """One save that waits. `turn` is set when it is to look again."""

    experiment_id: str
    size_bytes: int
    holder: Holder
    turn: anyio.Event = field(default_factory=anyio.Event)
    wants_room: bool = False  # the budget stands in its way: who came later makes no new arena before it
    making: bool = False  # it has what it waited for, in a moment


class Line:
    """Who waits, oldest first, and whose turn it is to look."""

    def __init__(self, look: Callable[[], None]) -> None:
        """`look` is called every LOOK_S while anybody waits."""
        self._look = look
        self._waiters: dict[Waiter, None] = {}
        self._by_uid: Counter[int] = Counter()
        self._round: Iterator[Waiter] = iter(())
        self._at: Waiter | None = None  # whose turn it is
        self._again = False  # something was freed since this round began
        self._timer: Waiter | None = None
        self._told = 0  # how far down the line `some` has come

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiters)

    def some(self) -> Sequence[Waiter]:
        """Return SOME_MAX of them, the next ones each time."""
        waiters = tuple(self._waiters)
        start = self._told % len(waiters) if len(waiters) > SOME_MAX else 0
        self._told = start + SOME_MAX
        return waiters[start : start + SOME_MAX]

    def wants_room_before(self, waiter: Waiter) -> bool:
        """Whether the budget stands in the way of anybody before `waiter`."""
        for earlier in self._waiters:
            if earlier is waiter:
                return False
            if earlier.wants_room:
                return True
        return False

    def enter(self, waiter: Waiter) -> None:
        """Join at the end. NoArena when too many wait already, of all users or of this one."""
        same = self._by_uid[waiter.holder.uid]
        if len(self) >= WAITERS_MAX or same >= WAITERS_PER_UID_MAX:
            crowd = f"{len(self)} requests wait for an arena already, {same} of them yours"
            raise NoArena(crowd, retry_after_s=RETRY_AFTER_S)
        self._waiters[waiter] = None
        self._by_uid[waiter.holder.uid] = same + 1

    def leave(self, waiter: Waiter) -> None:
        """Go, with an arena or without; who is behind may have waited for this one's turn only."""
        del self._waiters[waiter]
        self._by_uid[waiter.holder.uid] -= 1
        if not self._by_uid[waiter.holder.uid]:
            del self._by_uid[waiter.holder.uid]
        self.wake()
        self.pass_on(waiter)

    def served(self, waiter: Waiter) -> None:
        """Memory is made for `waiter`, which takes a while: the others go on, and one of them keeps the time."""
        waiter.making = True
        self.wake()
        self.pass_on(waiter)

    def wake(self) -> None:
        """Something was freed: let all look again, in their order. A round under way is followed by another."""
        if self._at is not None:
            self._again = True
            return
        self._round = iter(tuple(self._waiters))
        self._next()

    def pass_on(self, waiter: Waiter, *, hopeless: bool = False) -> None:
        """The turn of `waiter` is over, if it is its turn. `hopeless`: there is nothing for anybody behind it."""
        if self._at is not waiter:
            return
        self._at = None
        if hopeless:
            self._round = iter(())
        self._next()
        if self._at is None and self._again:
            self._again = False
            self.wake()

    def _next(self) -> None:
        for waiter in self._round:
            if waiter in self._waiters and not waiter.making:
                self._at = waiter
                waiter.turn.set()
                return

    async def wait(self, waiter: Waiter) -> None:
        """Return when it is the turn of `waiter`."""
        try:
            while not waiter.turn.is_set():
                if self._timer is None:
                    self._timer = waiter
                with anyio.move_on_after(LOOK_S if self._timer is waiter else None) as timer:
                    await waiter.turn.wait()
                if timer.cancelled_caught:
                    self._look()
        finally:
            # Whoever looks next keeps the time: its turn comes by `pass_on` or by `leave`.
            if self._timer is waiter:
                self._timer = None
