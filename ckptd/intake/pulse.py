"""The daemon's own pulse: does the event loop go round, does the catalog answer, did the clock jump?

Each beat is a sign of life to the service manager and one line of state. A beat that does not end is the
point: whatever stands still, the watchdog hears nothing, and the manager aborts this process and
starts another, which has the same arenas. An error is no standstill. A catalog that refuses for a full
disk refuses the next daemon as well; trainers are better served by this one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import anyio
import structlog

from ckptd.catalog import Catalog
from ckptd.clock import Clock
from ckptd.errors import CkptdError
from ckptd.jobs import Failing, Jobs
from ckptd.model import JobState
from ckptd.notify import Notifier

log = structlog.get_logger()

BEAT_S_MAX = 10.0  # without a watchdog, and with a patient one
AGAIN_S_MAX = 1.0  # after a beat that was late: held up once, it must not be silent for two beats more
ANSWER_S = 5.0  # a catalog that takes longer than this for nothing at all is slow
JUMP_S = 5.0  # between two beats: more than any clock is slewed, less than any lease
REMEMBERED_S = 3600.0  # how long a lag or a jump that is over is told of


@dataclass(frozen=True)
class Organs:
    """What a beat touches."""

    catalog: Catalog
    jobs: Jobs
    clock: Clock
    notifier: Notifier


class Pulse:
    """Beats for ever. What the last beats found can be asked at any time, without waiting.

    jobs     counts by state, as of the last beat
    failing  those of them that gave up or go on failing, likewise
    lag_s    the longest the loop was late lately; lagged_at when
    took_s   how long the catalog took to write and to read nothing
    jump_s   by how much the wall clock was set lately; jumped_at when, by the clock that it had then
    """

    def __init__(self, organs: Organs, lag_s_max: Callable[[], float], line: Callable[[], str]) -> None:
        """Not beating yet. `line` says in one line how the daemon is."""
        self._organs = organs
        self._lag_s_max = lag_s_max
        self._line = line
        self._interval_s = min((organs.notifier.watchdog_s or 2 * BEAT_S_MAX) / 2, BEAT_S_MAX)
        self._asked_s: float | None = None
        self._lagged_s = self._jumped_s = float("-inf")
        self.jobs: Mapping[JobState, int] = {}
        self.failing: Sequence[Failing] = ()
        self.lag_s = self.took_s = self.jump_s = 0.0
        self.lagged_at: datetime | None = None
        self.jumped_at: datetime | None = None

    async def run(self) -> None:
        """Beat until cancelled."""
        clock = self._organs.clock
        sleep_s = self._interval_s
        while True:
            slept_s, slept_at = clock.monotonic_s(), clock.now()
            await anyio.sleep(sleep_s)
            passed_s = clock.monotonic_s() - slept_s
            self._look_at_clock((clock.now() - slept_at) / timedelta(seconds=1) - passed_s)
            if self._look_at_loop(passed_s - sleep_s):
                sleep_s = min(self._interval_s, AGAIN_S_MAX)
                continue  # late once is no standstill, but nothing to be praised for either: that is the next round
            sleep_s = self._interval_s
            await self._beat()

    @property
    def silent_s(self) -> float:
        """How long the catalog has owed an answer."""
        return 0.0 if self._asked_s is None else self._organs.clock.monotonic_s() - self._asked_s

    async def _beat(self) -> None:
        clock = self._organs.clock
        self._asked_s = clock.monotonic_s()
        try:
            await self._organs.catalog.touch()
            self.jobs = await self._organs.jobs.counts()
            self.failing = await self._organs.jobs.failing() if any(self.jobs.values()) else ()
        except CkptdError as error:
            # It answers. What is wrong, status and doctor say; a restart would not mend it.
            log.error("catalog.refuses", cause=error.code, **error.to_wire())  # noqa: TRY400
        self.took_s = clock.monotonic_s() - self._asked_s
        self._asked_s = None
        if self.took_s > ANSWER_S:
            log.warning("catalog.slow", took_s=round(self.took_s, 3))
        self._organs.notifier.watchdog()
        self._organs.notifier.status(self._line())

    def _look_at_loop(self, lag_s: float) -> bool:
        now_s = self._organs.clock.monotonic_s()
        late = lag_s > self._lag_s_max()
        if late:
            log.error("loop.lag", lag_s=round(lag_s, 3))
            self.lag_s = max(self.lag_s, lag_s)
            self._lagged_s, self.lagged_at = now_s, self._organs.clock.now()
        elif now_s - self._lagged_s > REMEMBERED_S:
            self.lag_s = 0.0
        return late

    def _look_at_clock(self, jump_s: float) -> None:
        now_s = self._organs.clock.monotonic_s()
        if abs(jump_s) > JUMP_S:
            log.warning("clock.jumped", by_s=round(jump_s, 1))
            self.jump_s = jump_s
            self._jumped_s, self.jumped_at = now_s, self._organs.clock.now()
        elif now_s - self._jumped_s > REMEMBERED_S:
            self.jump_s = 0.0
