"""The daemon's pulse: whom it convinces, and what it notices. F11, F30"""

from itertools import pairwise
from typing import Any

import anyio
import pytest

from ckptd.errors import NoSpace
from ckptd.intake import pulse as pulses
from ckptd.intake.pulse import Organs, Pulse
from ckptd.model import JobState
from tests.support.catalog import StillClock

pytestmark = pytest.mark.anyio

BEAT_S = 0.02


class Body:
    """Catalog, queue and service manager in one; `stuck` and `error` are what the catalog has."""

    watchdog_s = 2 * BEAT_S

    def __init__(self) -> None:
        self.stuck = False
        self.error: NoSpace | None = None
        self.takes_s = 0.0
        self.beats = 0
        self.lines: list[str] = []
        self.clock = StillClock()
        self.touches = 0
        self.jobs = {JobState.PARKED: 2}
        self.asked = 0

    async def touch(self) -> None:
        self.touches += 1
        self.clock.pass_s(self.takes_s)
        if self.stuck:
            await anyio.sleep_forever()
        if self.error is not None:
            raise self.error

    async def counts(self) -> dict[JobState, int]:
        return dict(self.jobs)

    async def failing(self) -> list[str]:
        self.asked += 1
        return ["of two"]

    def watchdog(self) -> None:
        self.beats += 1

    def status(self, line: str) -> None:
        self.lines.append(line)


def of(body: Any) -> Pulse:
    return Pulse(Organs(body, body, body.clock, body), lambda: 0.5, lambda: "all is well")


async def beating(made: Pulse, condition: Any) -> None:
    """Let it beat until something is so."""
    async with anyio.create_task_group() as group:
        group.start_soon(made.run)
        with anyio.fail_after(30):
            while not condition():
                await anyio.sleep(BEAT_S / 4)
        group.cancel_scope.cancel()


async def test_a_beat_is_told_with_the_state_in_one_line() -> None:
    body = Body()
    made = of(body)
    await beating(made, lambda: body.beats >= 2)
    assert body.lines[0] == "all is well"
    assert made.jobs == {JobState.PARKED: 2}
    assert list(made.failing) == ["of two"]
    assert (made.silent_s, made.lag_s, made.jump_s) == (0.0, 0.0, 0.0)


async def test_a_node_without_jobs_is_not_asked_which_of_them_fail() -> None:
    body = Body()
    body.jobs = {JobState.PARKED: 0}
    made = of(body)
    await beating(made, lambda: body.beats >= 2)
    assert (body.asked, list(made.failing)) == (0, [])


async def test_a_writer_that_never_answers_is_never_praised() -> None:
    """The event loop goes round all the time: that alone is no progress."""
    body = Body()
    body.stuck = True
    made = of(body)
    async with anyio.create_task_group() as group:
        group.start_soon(made.run)
        while not body.touches:
            await anyio.sleep(BEAT_S)
        body.clock.pass_s(40.0)
        await anyio.sleep(BEAT_S * 10)
        assert made.silent_s == 40.0
        assert (body.beats, body.lines) == (0, [])
        group.cancel_scope.cancel()


async def test_a_catalog_that_refuses_is_no_reason_to_restart() -> None:
    """The disk would be as full for the next daemon; status and doctor say what is wrong."""
    body = Body()
    body.error = NoSpace("full")
    await beating(of(body), lambda: body.beats >= 2)


async def test_a_slow_answer_is_measured() -> None:
    body = Body()
    body.takes_s = 7.0
    made = of(body)
    await beating(made, lambda: body.beats)
    assert made.took_s == 7.0 > pulses.ANSWER_S


@pytest.mark.parametrize("by_s", [-3600.0, 86400.0, -1.8e9])
async def test_a_clock_that_is_set_is_noticed_and_forgotten_after_an_hour(by_s: float) -> None:
    body = Body()
    made = of(body)
    steps = iter([by_s])

    def noticed() -> bool:
        if body.beats:
            body.clock.step_wall_s(next(steps, 0.0))  # while the next beat sleeps
        return made.jump_s != 0.0

    await beating(made, noticed)
    assert made.jump_s == pytest.approx(by_s)
    assert made.jumped_at is not None
    body.clock.pass_s(pulses.REMEMBERED_S + 1)
    await beating(made, lambda: made.jump_s == 0.0)


async def test_a_loop_that_was_held_up_is_not_praised_for_that_round() -> None:
    body = Body()
    made = of(body)
    slept = 0

    def late() -> bool:
        nonlocal slept
        slept += 1
        if slept == 2:
            body.clock.pass_s(9.0)  # while the beat sleeps
        return made.lag_s > 0

    await beating(made, late)
    assert made.lag_s == pytest.approx(9.0, abs=0.1)
    assert made.lagged_at is not None


@pytest.mark.parametrize("lag_s", [1.0, 12.0, 17.0])
async def test_a_loop_that_was_held_up_once_is_heard_of_before_the_watchdog_gives_it_up(
    monkeypatch: pytest.MonkeyPatch, lag_s: float
) -> None:
    """A machine that stood for some seconds goes on; to be aborted just then would be the second blow."""
    body = Body()
    body.watchdog_s = 30.0  # as in the units
    lags = iter([0.0, lag_s])
    heard_s = [body.clock.mono_s]
    wait = anyio.sleep

    async def sleep(seconds: float) -> None:
        body.clock.pass_s(seconds + next(lags, 0.0))
        await wait(0)

    def watchdog() -> None:
        heard_s.append(body.clock.mono_s)

    monkeypatch.setattr(body, "watchdog", watchdog)
    made = Pulse(Organs(body, body, body.clock, body), lambda: 5.0, lambda: "")  # type: ignore[arg-type]
    monkeypatch.setattr(pulses.anyio, "sleep", sleep)
    async with anyio.create_task_group() as group:
        group.start_soon(made.run)
        with anyio.fail_after(30):
            while len(heard_s) < 6:
                await wait(0)
        group.cancel_scope.cancel()
    assert max(after - before for before, after in pairwise(heard_s)) < body.watchdog_s


async def test_a_loop_that_is_late_every_time_is_never_praised(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes round, but nobody is served by a node that answers after many seconds."""
    body = Body()
    rounds = 0
    wait = anyio.sleep

    async def sleep(seconds: float) -> None:
        nonlocal rounds
        rounds += 1
        body.clock.pass_s(seconds + 9.0)
        await wait(0)

    monkeypatch.setattr(pulses.anyio, "sleep", sleep)
    made = of(body)
    async with anyio.create_task_group() as group:
        group.start_soon(made.run)
        with anyio.fail_after(30):
            while rounds < 20:
                await wait(0)
        group.cancel_scope.cancel()
    assert body.beats == 0
